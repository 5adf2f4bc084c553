"""What the N:M kernels must compile to: every tile of the search spaces of some problems."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from padst_compile.kernels import meta_arguments
from padst_compile.kernels.launch import Problem, Tile
from padst_compile.kernels.nm.tiles import default_tile, step_bytes, tiles
from padst_compile.kernels.nm.triton import input_gradient_launch, linear_launch, value_gradient_launch
from padst_compile.kernels.offline_case import DEVICES, TENSOR_CORES, Case, Target, pipeline_depth, reads_runs_of_tokens
from padst_compile.kernels.token_shares import TokenShares
from padst_compile.kernels.triton_support import Launch, token_bucket
from padst_compile.structures import NM, Shape, parse

_WARP_GROUP_ROWS = 64  # of the smallest product of wgmma and tcgen05


def offline_cases(target: Target) -> Iterator[Case]:
    """Every tile that a tuner may choose for the problems below."""
    for problem in _problems(DEVICES[target]):
        for tile in dict.fromkeys([default_tile(problem), *tiles(problem)]):
            dot = tile.variant == "dot"
            product = _product(problem, tile, target) if dot else None
            yield Case(
                problem,
                tile,
                launch_of(problem, tile),
                step_bytes=step_bytes(problem, tile) if dot else 0,
                product=product,
                wide_loads=dot and _wide(problem, tile, target),
                vector_loads=not dot and problem.kernel == "nm_forward" and reads_runs_of_tokens(problem, tile),
                depth=pipeline_depth(problem, tile, product) if dot and _in_flight(problem) else 0,
            )


def launch_of(problem: Problem, tile: Tile) -> Launch:
    """The launch of a problem and tile, on meta tensors of its sizes."""
    structure, dtype = parse(problem.structure), getattr(torch, problem.dtype)
    assert isinstance(structure, NM)
    row_groups, input_groups = structure.groups(Shape(problem.out_features, problem.in_features))
    slots = input_groups * structure.n
    x, y = (
        meta_arguments.activations(problem, size, side) for side, size in enumerate((problem.in_features, problem.out_features))
    )
    values = torch.empty(row_groups, slots, structure.vector, device="meta", dtype=dtype)
    offsets = torch.empty(row_groups, slots, device="meta", dtype=torch.uint8)
    if problem.kernel == "nm_value_gradient":
        sums = torch.empty(2, *values.shape, device="meta")
        return value_gradient_launch(structure, y, x, offsets, sums, TokenShares(2, problem.tokens // 2), problem, tile)
    if problem.kernel == "nm_input_gradient":
        lists = meta_arguments.index(problem.in_features + 1), meta_arguments.index(offsets.numel())
        result = torch.empty(problem.tokens, problem.in_features, device="meta", dtype=dtype)
        return input_gradient_launch(structure, y, values, lists, result, tile)
    return linear_launch(structure, x, values, offsets, y, meta_arguments.extras(problem), problem, tile)


def _problems(device: str) -> Iterator[Problem]:
    """Layers of ViT-B/16 at batch 256, a decoding step, and what the kernels do besides."""
    for vector, layout in ((128, "feature/feature"), (64, "feature/feature"), (16, "feature/token"), (64, "token/token")):
        yield _problem(NM(1, 10, vector), 50432, "bfloat16", device, permuted="in", epilogue="bias+gelu", layout=layout)
    yield _problem(NM(2, 10, 32), 50432, "float16", device, permuted="in+out", epilogue="bias+residual")
    yield _problem(NM(1, 10, 64), 50432, "float32", device, layout="feature/feature")
    yield _problem(NM(1, 10, 64), 50432, "float32", device, precision="tf32")
    yield _problem(NM(1, 10, 128), 16, "bfloat16", device, epilogue="bias+silu+gate")
    for dtype, tokens in (("float32", 50432), ("bfloat16", 1)):
        yield _problem(NM(1, 10), tokens, dtype, device, permuted="in+out", epilogue="bias+gelu")
    yield _problem(NM(1, 10), 50432, "float32", device, permuted="in", epilogue="bias", layout="feature/feature")
    yield _problem(NM(1, 10), 50432, "bfloat16", device, epilogue="bias+gelu", layout="feature/token")
    yield _problem(NM(1, 10, 64), 50432, "bfloat16", device, epilogue="bias+gelu", layout="token/feature")
    for structure, dtype in ((NM(1, 10, 64), "bfloat16"), (NM(1, 10, 64), "float32"), (NM(1, 10), "float32")):
        yield _problem(structure, 50432, dtype, device, kernel="nm_value_gradient")
    for dtype in ("float32", "bfloat16"):
        yield _problem(NM(1, 10), 50432, dtype, device, kernel="nm_input_gradient")


def _problem(
    structure: NM,
    tokens: int,
    dtype: str,
    device: str,
    *,
    kernel: str = "nm_forward",
    precision: str = "ieee",
    permuted: str = "",
    epilogue: str = "",
    layout: str = "token/token",
) -> Problem:
    row_groups, input_groups = structure.groups(Shape(3072, 768))
    active = row_groups * input_groups * structure.n * structure.vector
    return Problem(
        kernel, structure.to_string(), 768, 3072, active, token_bucket(tokens), dtype, precision, permuted, epilogue, layout,
        device,
    )  # fmt: skip


def _wide(problem: Problem, tile: Tile, target: Target) -> bool:
    """Whether 16-byte copies are claimed: not from token-major activations, of which a gather takes an element at a time."""
    threads = tile.warps * (64 if target == "gfx942" else 32)
    enough = tile.tokens * tile.depth * getattr(torch, problem.dtype).itemsize >= 16 * threads
    return enough and problem.layout.startswith("feature/") and problem.kernel == "nm_forward"


def _in_flight(problem: Problem) -> bool:
    """Whether copies need not wait, which takes 4 bytes at least: not where a gather takes 16-bit inputs one at a time."""
    return problem.dtype == "float32" or (problem.layout.startswith("feature/") and problem.kernel == "nm_forward")


def _product(problem: Problem, tile: Tile, target: Target) -> str | None:
    """The instruction that multiplies: tensor cores, those of Hopper and later where the tile is tall enough for them."""
    if problem.dtype == "float32" and problem.precision == "ieee":
        return None
    side = tile.depth if problem.kernel == "nm_value_gradient" else tile.tokens
    return TENSOR_CORES[target] if side >= _WARP_GROUP_ROWS or target in ("sm_80", "gfx942") else "mma"
