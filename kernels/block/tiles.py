"""How the block kernels may cut their work: the default, and what a tuner may try instead. Needs no Triton.

What is left out would not run, or would run badly, on the device of the problem: a pipeline that its shared memory does not
hold, or sums that its registers do not. `offline.py` compiles what remains and checks that.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from padst_compile.kernels import triton_limits
from padst_compile.kernels.launch import Problem, Tile
from padst_compile.structures import Block, parse

_SMALLEST = 16  # side of the smallest product of tiles
_WIDEST_OUTPUTS = 128
_STEP_BYTES = 128  # of one row of a step: what the memory and the widest shared-memory layout move at once
_STAGES = (3, 4, 5)
_GROUPS = (8, 1)
_FEW_TOKENS = 256


def default_tile(problem: Problem) -> Tile:
    """A tile that is never bad, for a problem of a block kernel."""
    return next(iter(tiles(problem)))


def tiles(problem: Problem) -> tuple[Tile, ...]:
    """All tiles worth measuring, the default first.

    Args:
        problem: of "block_forward", "block_input_gradient" (whose structure is that of S.T) or "block_value_gradient".
    """
    candidates = _value_gradient(problem) if problem.kernel == "block_value_gradient" else _linear(problem)
    fitting = [tile for tile in dict.fromkeys(candidates) if _fits(problem, tile)]
    return tuple(fitting) or (_smallest(problem),)


def step_bytes(problem: Problem, tile: Tile) -> int:
    """Bytes of the two tiles that one step of a loop multiplies."""
    size = triton_limits.ELEMENT_BYTES[problem.dtype]
    if problem.kernel == "block_value_gradient":
        return (tile.depth + tile.outputs) * tile.tokens * size
    return (tile.tokens + tile.outputs) * tile.depth * size


def _fits(problem: Problem, tile: Tile) -> bool:
    """Whether the pipeline fits into shared memory, and the sums and both tiles of a step into registers."""
    limits = triton_limits.limits_of(problem.device)
    if tile.stages * step_bytes(problem, tile) > limits.shared_bytes:
        return False
    sums = tile.tokens * tile.outputs if problem.kernel != "block_value_gradient" else tile.depth * tile.outputs
    return sums <= triton_limits.sums_per_thread(problem) * 32 * tile.warps


def _linear(problem: Problem) -> Iterator[Tile]:
    block = _block(problem)
    outputs, depth = _side(block.rows, _WIDEST_OUTPUTS), _side(block.columns, _depth(problem))
    few = problem.tokens <= _FEW_TOKENS
    widths = [outputs, outputs // 2, outputs // 4] if few else [outputs]
    groups = _GROUPS[:1] if few else _GROUPS
    variants = ("pointer", "descriptor") if _may_describe(problem, block) else ("pointer",)
    for variant, group, stages, tokens, width in itertools.product(variants, groups, _STAGES, _token_sides(problem), widths):
        if width >= _SMALLEST:
            for warps in _warps(problem, tokens * width):
                yield Tile(tokens, width, depth, group, warps, stages, variant)


def _value_gradient(problem: Problem) -> Iterator[Tile]:
    block, step = _block(problem), _depth(problem)
    outputs, depth = _side(block.rows, _WIDEST_OUTPUTS), _side(block.columns, _WIDEST_OUTPUTS)
    for stages, tokens in itertools.product(_STAGES, (step, 2 * step)):
        for warps in _warps(problem, depth * outputs):
            yield Tile(max(_SMALLEST, min(tokens, problem.tokens)), outputs, depth, 1, warps, stages)


def _smallest(problem: Problem) -> Tile:
    return Tile(_SMALLEST, _SMALLEST, _SMALLEST, group=1, warps=4, stages=2)


def _token_sides(problem: Problem) -> tuple[int, ...]:
    """Tokens of a tile, best guess first."""
    exact = problem.dtype == "float32"
    sides = (64, 128, 32) if exact else (128, 64, 256)
    small = max(_SMALLEST, problem.tokens)
    return sides if small >= 2 * max(sides) else tuple(dict.fromkeys(min(side, small) for side in sides))


def _warps(problem: Problem, sums: int) -> tuple[int, ...]:
    """Numbers of warps, best guess first: 64 sums per thread, or 128 where that is too many warps."""
    return (4,) if sums <= 64 * 128 else (8, 4)


def _depth(problem: Problem) -> int:
    return _STEP_BYTES // triton_limits.ELEMENT_BYTES[problem.dtype]


def _side(size: int, most: int) -> int:
    """The power of two from 16 to `most` that holds `size`, or as much of it as fits."""
    return min(most, max(_SMALLEST, 1 << (size - 1).bit_length()))


def _block(problem: Problem) -> Block:
    structure = parse(problem.structure)
    assert isinstance(structure, Block)
    return structure


def _may_describe(problem: Problem, block: Block) -> bool:
    """Whether the descriptor variant can serve this problem: see `triton.linear_launch`."""
    limits = triton_limits.limits_of(problem.device)
    whole = problem.in_features % block.columns == 0 and block.columns % _side(block.columns, _depth(problem)) == 0
    return limits.descriptors and whole and "in" not in problem.permuted.split("+") and problem.layout.startswith("token/")
