"""How the Triton kernels for N:M cut their work: the default, and what a search tries."""

from __future__ import annotations

import itertools

import torch

from padst_compile.kernels import triton_limits
from padst_compile.kernels.launch import Problem, Tile
from padst_compile.structures import NM, parse

LEAST_DOT = 16  # rows, columns and depth of the smallest product of tensor cores
_LARGEST_DOT = 128  # rows of one program: accumulators of more tokens than that do not fit in registers
_MANY_SUMS = 128 * 64  # of four warps
_FEWEST_SUMS = 2  # of a thread
_MOST_GATHERED = 32  # inputs that a thread fetches one by one in a step
_TALL = 128  # tokens of a tile, unless it is narrow
_MOST_TOKENS = 64  # in float32, whose operands take twice the registers
_PRODUCTS = 4096  # of one step of a gathering program: 32 accumulators for each of 128 threads


def default_tile(problem: Problem) -> Tile:
    """The tile to start from, for `nm_forward`, `nm_input_gradient` or `nm_value_gradient`."""
    structure = _structure(problem)
    if structure.vector >= LEAST_DOT and problem.kernel != "nm_input_gradient":
        return _dot(problem, structure)
    if problem.kernel == "nm_value_gradient":
        return Tile(tokens=32, outputs=8, depth=16, stages=2, variant="gather")
    return _gather(min(problem.tokens, 64), 32)


def tiles(problem: Problem) -> list[Tile]:
    """All tiles worth timing; each of them is right for every size."""
    structure = _structure(problem)
    found: list[Tile] = []
    if may_use_tensor_cores(problem):
        found += _dots(problem, structure)
    if structure.vector < LEAST_DOT or problem.kernel == "nm_input_gradient":
        found += _gathers(problem)
    return found


def may_use_tensor_cores(problem: Problem) -> bool:
    """Whether enough rows share their choice of inputs for a form of the kernel that multiplies tiles."""
    return _structure(problem).vector > LEAST_DOT // 2 and problem.kernel != "nm_input_gradient"


def _structure(problem: Problem) -> NM:
    structure = parse(problem.structure)
    assert isinstance(structure, NM)
    return structure


def _dot(problem: Problem, structure: NM) -> Tile:
    outputs = _rows(structure)
    if problem.kernel == "nm_value_gradient":
        side = 64 if _itemsize(problem) == 2 else 32
        return Tile(tokens=side, outputs=outputs, depth=side, variant="dot")
    # Inputs that are gathered one by one pass through registers, which exact float32 products need for themselves.
    wide = problem.layout.startswith("feature") and _itemsize(problem) == 2
    tokens = max(LEAST_DOT, min(problem.tokens, 128 if wide else 64))
    return Tile(tokens, outputs, 64 if wide else 32, warps=8 if tokens * outputs >= _MANY_SUMS else 4, variant="dot")


def _dots(problem: Problem, structure: NM) -> list[Tile]:
    rows, depths = _rows(structure), (32, 64) if _itemsize(problem) == 2 else (32,)
    sums_tokens = problem.kernel == "nm_value_gradient"
    least = 16 if sums_tokens else min(problem.tokens, 128) // 2  # smaller tiles would read the weights more often
    found = []
    for tokens, depth, stages in itertools.product((16, 32, 64, 128, 256), depths, (3, 4)):
        for warps in (4,) if rows * (depth if sums_tokens else tokens) < _MANY_SUMS else (4, 8):
            tile = Tile(tokens, rows, depth, warps=warps, stages=stages, variant="dot")
            if least <= tokens <= max(LEAST_DOT, problem.tokens) and _fits(problem, tile):
                found.append(tile)
    return found or [_dot(problem, structure)]


def step_bytes(problem: Problem, tile: Tile) -> int:
    """Bytes of the two tiles that one step of a `dot` multiplies."""
    inputs, outputs = _operands(problem, tile)
    return (inputs + outputs) * _itemsize(problem)


def _fits(problem: Problem, tile: Tile) -> bool:
    """Whether the pipeline of a `dot` fits into shared memory, and what a thread holds at once into its registers."""
    threads, single = tile.warps * 32, problem.dtype == "float32"
    if step_bytes(problem, tile) * tile.stages > triton_limits.limits_of(problem.device).shared_bytes:
        return False
    one_by_one = not problem.layout.startswith("feature")  # with an address for each input
    if one_by_one and (_operands(problem, tile)[0] > _MOST_GATHERED * threads or (single and tile.tokens > _MOST_TOKENS)):
        return False
    if single and problem.kernel == "nm_value_gradient" and tile.tokens > _MOST_TOKENS // 2:
        return False
    sums = (tile.depth if problem.kernel == "nm_value_gradient" else tile.tokens) * tile.outputs // threads
    most_sums = triton_limits.sums_per_thread(problem) // 2  # the rest is for addresses and the epilogue
    return _FEWEST_SUMS <= sums <= most_sums and (tile.tokens <= _TALL or tile.outputs <= _TALL // 4)


def _operands(problem: Problem, tile: Tile) -> tuple[int, int]:
    """Entries of the tile of inputs and of the other one that one step multiplies."""
    if problem.kernel == "nm_value_gradient":
        return tile.depth * tile.tokens, tile.outputs * tile.tokens
    return tile.tokens * tile.depth, tile.outputs * tile.depth


def _gather(tokens: int, outputs: int) -> Tile:
    depth = max(1, min(32, _PRODUCTS // (tokens * outputs)))
    return Tile(tokens, outputs, depth, warps=4, stages=2, variant="gather")


def _gathers(problem: Problem) -> list[Tile]:
    if problem.kernel == "nm_value_gradient":
        shapes = ((16, 8, 32), (16, 16, 16), (32, 8, 16), (64, 8, 8), (64, 4, 16))
        return [Tile(*shape, warps=4, stages=2, variant="gather") for shape in shapes]
    sides = (1, 8) if problem.tokens <= 8 else (16, 32, 64)
    widths = (32,) if problem.kernel == "nm_input_gradient" else (32, 64)
    found = [_gather(min(tokens, problem.tokens), outputs) for tokens in sides for outputs in widths]
    return [tile for tile in dict.fromkeys(found) if tile.tokens * tile.outputs <= _PRODUCTS // 2]


def _rows(structure: NM) -> int:
    """Rows of one group that a program of `dot` takes: a power of two."""
    return max(LEAST_DOT, min(_LARGEST_DOT, 1 << (structure.vector - 1).bit_length()))


def _itemsize(problem: Problem) -> int:
    dtype: torch.dtype = getattr(torch, problem.dtype)
    return dtype.itemsize
