"""What a tuner may try with cuSPARSELt: its algorithms, which it numbers, and of which only measuring tells."""

from __future__ import annotations

import re

from padst_compile.kernels.launch import Problem, Tile

_NUMBERS = 64  # more than any version has; how many there are depends on version, dtype and device, and others fail at once


def default_tile(problem: Problem) -> Tile:
    """The library's own default."""
    return _tile(0)


def tiles(problem: Problem) -> list[Tile]:
    """All algorithms; those that a device or version does not have cannot be launched, and are left out."""
    return [_tile(number) for number in range(_NUMBERS)]


def algorithm(tile: Tile) -> int:
    """The number of a tile's algorithm; the default's for a tile that names none."""
    found = re.fullmatch(r"algorithm (\d{1,4})", tile.variant, re.ASCII)
    return 0 if found is None else int(found[1])


def _tile(number: int) -> Tile:
    return Tile(tokens=0, outputs=0, depth=0, variant=f"algorithm {number}")
