"""How the block kernels may cut their work: the default, and what a tuner may try instead. Needs no Triton.

What is left out would not run, or would run badly, on the device of the problem: a pipeline that its shared memory does not
hold, or sums that its registers do not. `offline.py` compiles what remains and checks that.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator

from padst_compile.kernels import triton_limits
from padst_compile.kernels.launch import Problem, Tile
from padst_compile.structures import Block, parse

_SMALLEST = 16  # side of the smallest product of tiles
_SMALLEST_TILE = Tile(_SMALLEST, _SMALLEST, _SMALLEST, group=1, warps=4, stages=2)
_WIDEST_OUTPUTS = 128
_STEP_BYTES = 128  # of one row of a step: what the memory and the widest shared-memory layout move at once
_STAGES = (3, 4, 5)
_GROUPS = (8, 1)
_FEW_TOKENS = 256
_ALIGNED = 16  # elements: what Triton asks of sizes and strides before it copies 16 bytes at once
LEAST_COPY = 4  # bytes that a copy to shared memory moves at least, if it does not wait
_MOST_POINTERS = 32  # of inputs, per thread, two registers each


@functools.lru_cache(maxsize=4096)  # asked for at every call
def default_tile(problem: Problem) -> Tile:
    """A tile that is never bad, for a problem of a block kernel."""
    return tiles(problem)[0]


def tiles(problem: Problem) -> tuple[Tile, ...]:
    """All tiles worth measuring, the default first.

    Args:
        problem: of "block_forward", "block_input_gradient" (whose structure is that of S.T) or "block_value_gradient".
    """
    candidates = _value_gradient(problem) if problem.kernel == "block_value_gradient" else _linear(problem)
    forms = tuple(dict.fromkeys(candidates))
    fitting = tuple(tile for tile in forms if _fits(problem, tile))
    shallow = (dataclasses.replace(tile, stages=2) for tile in forms)  # where shared memory is small
    return fitting or tuple(dict.fromkeys(tile for tile in shallow if _fits(problem, tile))) or (_SMALLEST_TILE,)


def step_bytes(problem: Problem, tile: Tile) -> int:
    """Bytes of the two tiles that one step of a loop multiplies."""
    size = triton_limits.ELEMENT_BYTES[problem.dtype]
    if problem.kernel == "block_value_gradient":
        return (tile.depth + tile.outputs) * tile.tokens * size
    return (tile.tokens + tile.outputs) * tile.depth * size


def _fits(problem: Problem, tile: Tile) -> bool:
    """Whether the pipeline fits into shared memory, and the sums and both tiles of a step into registers."""
    if tile.stages * step_bytes(problem, tile) > triton_limits.limits_of(problem.device).shared_bytes:
        return False
    if problem.kernel == "block_input_gradient" and tile.variant == "pointer" and tile.tokens > 8 * tile.depth:
        return False  # Triton 3.8 spills registers of 256 tokens by 16 inputs on sm_80
    threads = 32 * tile.warps
    gradient = problem.kernel == "block_value_gradient"
    if element_by_element(problem) and tile.tokens * tile.depth > _MOST_POINTERS * threads:
        return False
    sums = tile.depth * tile.outputs if gradient else tile.tokens * tile.outputs
    return sums <= _most_sums(problem) * threads


def element_by_element(problem: Problem) -> bool:
    """Whether inputs come one by one, each by a pointer of its own: permuted, or at places that no 16 bytes align with."""
    block = _block(problem)
    odd = any(size % _ALIGNED for size in (problem.in_features, problem.out_features, block.rows, block.columns))
    return odd or ("in" in problem.permuted.split("+") and problem.layout.startswith("token/"))


def gathered_in_half(problem: Problem) -> bool:
    """Whether inputs come by loads of 2 bytes, which cannot be in flight by themselves: copies that do not wait take 4."""
    return element_by_element(problem) and triton_limits.ELEMENT_BYTES[problem.dtype] < LEAST_COPY


def _linear(problem: Problem) -> Iterator[Tile]:
    block = _block(problem)
    outputs, few = _side(block.rows, _WIDEST_OUTPUTS), problem.tokens <= _FEW_TOKENS
    widths = [outputs, outputs // 2, outputs // 4] if few else [outputs]
    groups = _GROUPS[:1] if few else _GROUPS
    forms = itertools.product(_variants(problem, block), groups, _STAGES, _token_sides(problem), widths)
    for (variant, depth), group, stages, tokens, width in forms:
        if width >= _SMALLEST:
            yield Tile(tokens, width, depth, group, _warps(problem, tokens * width), stages, variant)


def _variants(problem: Problem, block: Block) -> Iterator[tuple[str, int]]:
    """The forms of the kernel that can serve a problem, best guess first, each with the inputs of a step."""
    whole = problem.in_features % block.columns == 0
    deepest = min(_depth(problem), _MOST_POINTERS) if element_by_element(problem) else _depth(problem)
    if whole and block.columns < deepest:
        yield "joined", deepest
    yield "pointer", _side(block.columns, deepest)
    if gathered_in_half(problem):
        yield "ahead", _side(block.columns, deepest)
    if whole and block.columns % deepest == 0 and _may_describe(problem):
        yield "descriptor", deepest


def _value_gradient(problem: Problem) -> Iterator[Tile]:
    block, step = _block(problem), _depth(problem)
    outputs, depth = _side(block.rows, _WIDEST_OUTPUTS), _side(block.columns, _WIDEST_OUTPUTS)
    steps = (step, step // 2) if _exact(problem) else (step, 2 * step)
    for stages, tokens in itertools.product(_STAGES, steps):
        yield Tile(max(_SMALLEST, min(tokens, problem.tokens)), outputs, depth, 1, _warps(problem, depth * outputs), stages)


def _token_sides(problem: Problem) -> tuple[int, ...]:
    """Tokens of a tile, best guess first."""
    sides = (64, 128) if _exact(problem) else (128, 64, 256)
    small = max(_SMALLEST, problem.tokens)
    return sides if small >= 2 * max(sides) else tuple(dict.fromkeys(min(side, small) for side in sides))


def _exact(problem: Problem) -> bool:
    """Whether ordinary cores multiply, which keep operands in registers."""
    return problem.dtype == "float32" and problem.precision == "ieee"


def _warps(problem: Problem, sums: int) -> int:
    return 4 if sums <= _most_sums(problem) * 128 else 8


def _most_sums(problem: Problem) -> int:
    """Sums per thread: twice as many leave no registers for GELU, or for operands that are split into parts."""
    return 32 if problem.precision == "tf32x3" else 64


def _depth(problem: Problem) -> int:
    return _STEP_BYTES // triton_limits.ELEMENT_BYTES[problem.dtype]


def _side(size: int, most: int) -> int:
    """The power of two from 16 to `most` that holds `size`, or as much of it as fits."""
    return min(most, max(_SMALLEST, 1 << (size - 1).bit_length()))


def _block(problem: Problem) -> Block:
    structure = parse(problem.structure)
    assert isinstance(structure, Block)
    return structure


def _described_precision(problem: Problem) -> str:
    """The precision whose products take operands from shared memory as they are; others hold too much in registers."""
    return "tf32" if problem.dtype == "float32" else "ieee"


def _may_describe(problem: Problem) -> bool:
    """Whether tiles can be copied by descriptor: see `triton.linear_launch`."""
    able = triton_limits.limits_of(problem.device).descriptors and problem.precision == _described_precision(problem)
    return able and "in" not in problem.permuted.split("+") and problem.layout.startswith("token/")
