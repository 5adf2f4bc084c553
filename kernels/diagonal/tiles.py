"""How the Triton kernels for diagonals cut their work: the default, and what a search tries."""

from __future__ import annotations

import itertools

from padst_compile.kernels.launch import Problem, Tile

_PRODUCTS = 4096  # of one step: 32 accumulators for each of 128 threads
_MOST_SUMS = 2048  # of one program, for which it also needs addresses
_MOST_TURNED = 1024  # the same where tokens become neighbours in its results that were none in its inputs


def default_tile(problem: Problem) -> Tile:
    """The tile to start from, for `diagonal_forward`, `diagonal_input_gradient` or `diagonal_value_gradient`."""
    if problem.kernel == "diagonal_value_gradient":
        return Tile(tokens=16, outputs=64, depth=4, stages=2, variant="gather")
    # Neighbours in memory should be neighbours in the tile: outputs, or tokens where these are next to each other.
    tokens = 64 if problem.layout.startswith("feature") else 16
    tokens = min(problem.tokens, tokens)
    return _tile(tokens, 32 if tokens > 16 or _widened(problem) else 64, 4)


def tiles(problem: Problem) -> list[Tile]:
    """All tiles worth timing; each of them is right for every size."""
    if problem.kernel == "diagonal_value_gradient":
        shapes = ((8, 64, 8), (16, 32, 8), (16, 64, 4), (32, 32, 4), (32, 64, 2), (64, 32, 2))
        return [Tile(*shape, warps=4, stages=2, variant="gather") for shape in shapes]
    sides = (1, 4) if problem.tokens <= 8 else (8, 16, 32, 64)
    most = _MOST_TURNED if problem.layout == "token/feature" else _MOST_SUMS
    found = [
        _tile(min(tokens, problem.tokens), outputs, warps)
        for tokens, outputs, warps in itertools.product(sides, (32, 64), (4, 8))
        if tokens * outputs <= most and not (_widened(problem) and tokens >= 8 and outputs > 32)
    ]
    return list(dict.fromkeys(found))


def _widened(problem: Problem) -> bool:
    """Whether operands take registers twice, as they are and in float32: with wide tiles Triton 3.6 spills some."""
    return problem.kernel == "diagonal_input_gradient" and problem.dtype != "float32"


def _tile(tokens: int, outputs: int, warps: int) -> Tile:
    depth = max(1, min(32, _PRODUCTS * warps // 4 // (tokens * outputs)))
    return Tile(tokens, outputs, depth, warps=warps, stages=2, variant="gather")
