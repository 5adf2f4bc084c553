"""What the block kernels must compile to: every tile of the search spaces of some problems."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from padst_compile.kernels import triton_limits
from padst_compile.kernels.block.tiles import LEAST_COPY, element_by_element, gathered_in_half, step_bytes, tiles
from padst_compile.kernels.block.triton import Blocks, linear_launch, value_gradient_launch
from padst_compile.kernels.block.triton_mlp import default_tile as mlp_tile
from padst_compile.kernels.block.triton_mlp import mlp_launch
from padst_compile.kernels.diagonal.blocks import block_size
from padst_compile.kernels.launch import Problem, Tile
from padst_compile.kernels.meta_arguments import activations, extras, index
from padst_compile.kernels.offline_case import DEVICES, TENSOR_CORES, Case, Target, pipeline_depth
from padst_compile.kernels.token_shares import TokenShares
from padst_compile.kernels.triton_support import Launch, token_bucket
from padst_compile.structures import Block, Diagonal, Shape, parse

_AMD_WARP = 64  # threads
_WARP_GROUP_TOKENS = 64  # rows of the smallest product of wgmma and tcgen05


def offline_cases(target: Target) -> Iterator[Case]:
    """Every tile that a tuner may choose for the problems below, once per machine code."""
    for problem in _problems(DEVICES[target]):
        if problem.precision == "tf32x3" and target == "gfx942":
            continue  # Triton has it for NVIDIA alone, see `triton_support.precision`
        # `group` orders the programs, which compiles to the same.
        for tile in dict.fromkeys(dataclasses.replace(tile, group=8) for tile in tiles(problem)):
            launch, product = launch_of(problem, tile), _product(problem, tile, target)
            yield Case(
                problem,
                tile,
                launch,
                step_bytes=_copied_ahead(problem, tile, target),
                product=product,
                wide_loads=_wide(problem, tile, target),
                depth=0 if gathered_in_half(problem) else pipeline_depth(problem, tile, product),
                carried=tile.variant == "ahead",
            )
    yield from _folded_diagonals(target)
    yield from _mlps(target)


def _copied_ahead(problem: Problem, tile: Tile, target: Target) -> int:
    """Bytes of a step that wait in shared memory, on AMD's chips not those of weights too few for copies of 4 bytes."""
    whole = step_bytes(problem, tile)
    if target != "gfx942" or problem.kernel == "block_value_gradient":
        return whole
    weights = tile.outputs * tile.depth * triton_limits.ELEMENT_BYTES[problem.dtype]
    return whole - weights if weights < LEAST_COPY * _AMD_WARP * tile.warps else whole


def launch_of(problem: Problem, tile: Tile, *, equal_rows: bool = False) -> Launch:
    """The launch of a problem and tile, on meta tensors of its sizes; see `triton.Blocks` for `equal_rows`."""
    structure, dtype = parse(problem.structure), getattr(torch, problem.dtype)
    assert isinstance(structure, Block)
    blocks = problem.active // (structure.rows * structure.columns)
    row_count = -(-problem.out_features // structure.rows)
    x, y = activations(problem, problem.in_features, 0), activations(problem, problem.out_features, 1)
    row_pointers, columns = index(row_count + 1), index(blocks)
    if problem.kernel == "block_value_gradient":
        shares = TokenShares(2, problem.tokens // 2)
        sums = torch.empty(2, blocks, structure.columns, structure.rows, device="meta")
        return value_gradient_launch(structure, x, y, (row_pointers, columns), sums, shares, problem, tile)
    transposed = problem.kernel == "block_input_gradient"
    sides = (structure.rows, structure.columns) if transposed else (structure.columns, structure.rows)
    values = torch.empty(blocks, *sides, device="meta", dtype=dtype)
    order = index(blocks) if transposed else None
    stored = Blocks(structure, values, row_pointers, columns, order, transposed, equal_rows)
    return linear_launch(x, stored, y, extras(problem), problem, tile)


def _problems(device: str) -> Iterator[Problem]:
    """Layers of ViT-B/16 at batch 256 and of a larger model, a decoding step, and what the kernels do besides."""
    half, full = "bfloat16", "float32"
    for size in (16, 32, 64):
        yield _problem(size, 768, 3072, 50432, half, device, epilogue="bias+gelu")
    yield _problem(128, 4096, 16384, 16384, half, device, epilogue="bias+gelu")
    yield _problem(64, 3072, 768, 50432, "float16", device, epilogue="bias+residual")
    yield _problem(64, 4096, 16384, 16, half, device, epilogue="bias+silu+gate")
    yield _problem(64, 768, 3072, 16, full, device, epilogue="bias+gelu")
    yield _problem(64, 768, 3072, 50432, half, device, permuted="in+out")
    yield _problem(64, 3072, 768, 50432, half, device, permuted="in", layout="feature/token")
    yield _problem(64, 3072, 768, 50432, full, device, permuted="in", layout="feature/token")
    yield _problem(64, 768, 3072, 50432, half, device, permuted="out", epilogue="bias+gelu", layout="token/feature")
    yield _problem((24, 40), 1000, 1003, 4096, half, device, epilogue="bias")
    yield _problem(64, 768, 3072, 50432, full, device, precision="tf32x3")
    for precision in ("ieee", "tf32"):
        for kernel in ("block_forward", "block_input_gradient", "block_value_gradient"):
            yield _problem(64, 768, 3072, 50432, full, device, kernel=kernel, precision=precision)
    for size in (16, 64):
        for kernel in ("block_input_gradient", "block_value_gradient"):
            yield _problem(size, 3072, 768, 50432, half, device, kernel=kernel)


def _folded_diagonals(target: Target) -> Iterator[Case]:
    """One and five classes of diagonals: a step without a loop, and joined blocks in a loop; both from pointers, too."""
    in_features, out_features = 768, 3072
    for group, kept in ((64, 1), (16, 5)):
        diagonals, shape = Diagonal(group), Shape(out_features, in_features)
        blocks = block_size(diagonals, shape)
        active = kept * diagonals.classes(shape) * blocks.rows * blocks.columns
        problem = _problem((blocks.rows, blocks.columns), in_features, out_features, 50432, "bfloat16", DEVICES[target])
        problem = dataclasses.replace(problem, active=active)
        yield _folded(problem, tiles(problem)[0], target)
        for tile in dict.fromkeys(dataclasses.replace(tile, group=8) for tile in tiles(problem)):
            yield _folded(problem, tile, target, kept)


def _folded(problem: Problem, tile: Tile, target: Target, kept: int = 0) -> Case:
    """A product of diagonals in classes; with `kept`, the compiler knows how many blocks there are in each row."""
    launch, product, loops = launch_of(problem, tile, equal_rows=kept > 0), _product(problem, tile, target), kept != 1
    return Case(
        problem,
        tile,
        launch,
        step_bytes=step_bytes(problem, tile),
        product=product,
        wide_loads=loops and _wide(problem, tile, target),
        depth=pipeline_depth(problem, tile, product) if loops else 0,
        known=f"{kept} in each row" if kept else "",
    )


def _mlps(target: Target) -> Iterator[Case]:
    """The two layers of ViT-B's MLP in one kernel."""
    for size, dtype, precision in ((64, "bfloat16", "ieee"), (32, "bfloat16", "ieee"), (64, "float32", "tf32")):
        problem = _problem(size, 768, 768, 50432, dtype, DEVICES[target], kernel="block_mlp", precision=precision)
        first, second = (_stored(size, *sides, getattr(torch, dtype)) for sides in ((768, 3072), (3072, 768)))
        x = activations(problem, 768, 0)
        tile = mlp_tile(x, size, size)
        launch = mlp_launch(x, first, second, 3072, x, (None, x[0]), x, "gelu", precision)
        step = (tile.tokens + size) * tile.depth * x.element_size()
        product = TENSOR_CORES[target]
        yield Case(problem, tile, launch, step, product, wide_loads=True, depth=pipeline_depth(problem, tile, product))


def _stored(size: int, in_features: int, out_features: int, dtype: torch.dtype) -> Blocks:
    """A layer with one block in ten."""
    rows, blocks = out_features // size, out_features // size * in_features // size // 10
    values = torch.empty(blocks, size, size, device="meta", dtype=dtype)
    return Blocks(Block(size), values, index(rows + 1), index(blocks))


def _problem(
    size: int | tuple[int, int],
    in_features: int,
    out_features: int,
    tokens: int,
    dtype: str,
    device: str,
    *,
    kernel: str = "block_forward",
    precision: str = "ieee",
    permuted: str = "",
    epilogue: str = "",
    layout: str = "token/token",
) -> Problem:
    """A layer with one block in ten."""
    structure = Block(size)
    blocks = -(-out_features // structure.rows) * -(-in_features // structure.columns) // 10
    return Problem(
        kernel, structure.to_string(), in_features, out_features, blocks * structure.rows * structure.columns,
        token_bucket(tokens), dtype, precision, permuted, epilogue, layout, device,
    )  # fmt: skip


def _product(problem: Problem, tile: Tile, target: Target) -> str | None:
    """The instruction that multiplies: tensor cores, those of Hopper and later where the tile is tall enough for them."""
    if problem.dtype == "float32" and problem.precision == "ieee":
        return None
    side = tile.depth if problem.kernel == "block_value_gradient" else tile.tokens
    return TENSOR_CORES[target] if side >= _WARP_GROUP_TOKENS or target in ("sm_80", "gfx942") else "mma"


def _wide(problem: Problem, tile: Tile, target: Target) -> bool:
    """Whether 16-byte copies are claimed.

    Not where inputs come one by one, or where a small tile is spread over the many threads of an AMD GPU. Nor for sums over
    tokens in TF32 on Hopper and later, whose tensor cores want the tokens of both operands adjacent: copies in flight cannot
    transpose.
    """
    transposed = problem.kernel == "block_value_gradient" and problem.dtype == "float32" and target in ("sm_90", "sm_100")
    return target != "gfx942" and not transposed and not element_by_element(problem)
