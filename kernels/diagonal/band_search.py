"""Along which steps the offsets of diagonals lie in bands, and how many blocks these take.

`pairs(d) = |O ∩ (O + d)|` counts the offsets `O` that another one stands `d` before: the others begin the progressions of
difference `d` that `O` consists of, and there are none where these are whole classes. A Fourier transform counts for all `d`.

A block row whose rows are `W`, as residues of the period, reads the columns `O + W`: of a run of `w` offsets `w + b - 1` in
blocks of `b`, and of scattered offsets `b` each. How many blocks hold these columns is counted for a few block rows, which are
all alike but where a class ends within them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch

from padst_compile.kernels.diagonal.bands import Bands
from padst_compile.permutation import inverse
from padst_compile.structures import Block, Diagonal, Shape

MOST_STORED = 4
"""Times the weights of the diagonals that their blocks may store."""

_MOST_OF_DENSE = 2  # blocks may store one part in so many of the dense weight
_SIDES = (16, 32, 64)  # of blocks
_STEPS = 4  # that are looked at
_SHORTEST = 4  # progression, on average, that fills any block
_BLOCK_ROWS = 8  # that stand for all


@dataclasses.dataclass(frozen=True)
class Fold:
    """A way to fold diagonals into blocks.

    Args:
        bands: how the layer is read.
        stored: values of the blocks, with the zeros among them, by the block rows that stand for all.
    """

    bands: Bands
    stored: int


def folds(offsets: torch.Tensor, shape: Shape) -> Iterator[Fold]:
    """The folds of diagonals into few enough blocks.

    Args:
        offsets: int32 `[diagonals]`, ascending.
        shape: of the layer.
    """
    offsets = offsets.long().cpu()
    if not offsets.numel():
        return
    length, period = min(shape.out_features, shape.in_features), max(shape.out_features, shape.in_features)
    for step, begun in likely_steps(offsets, length, period):
        for blocks in _sizes(math.gcd(step, period), shape, whole=begun == 0):
            rows = _BlockRows(offsets, step, blocks, shape)
            shift, count = rows.best_shift()
            fold = Fold(Bands(step, shift, blocks), count * blocks.rows * blocks.columns)
            if few_enough(fold.stored, offsets.numel() * length, shape):
                yield fold


def few_enough(stored: int, active: int, shape: Shape) -> bool:
    """Whether blocks store few enough values for the weights that they hold, and less than the dense weight would."""
    return stored <= min(MOST_STORED * active, shape.numel // _MOST_OF_DENSE)


def count_blocks(bands: Bands, offsets: torch.Tensor, shape: Shape) -> int:
    """How many blocks hold a weight.

    Args:
        bands: how the layer is read.
        offsets: int32 `[diagonals]`.
        shape: of the layer.
    """
    rows, columns = Diagonal().positions((offsets.cpu(),), shape)
    grid = torch.zeros(bands.blocks.grid(shape), dtype=torch.bool)
    grid[bands.output_places(shape)[rows] // bands.blocks.rows, bands.input_places(shape)[columns] // bands.blocks.columns] = (
        True
    )
    return int(grid.count_nonzero())


def likely_steps(offsets: torch.Tensor, length: int, period: int) -> list[tuple[int, int]]:
    """The steps along which offsets form the fewest progressions, and how many these are; the fewest first.

    Args:
        offsets: int64 `[diagonals]`.
        length: of the shorter side.
        period: of the longer side.
    """
    spectrum = torch.fft.rfft(torch.zeros(period, dtype=torch.float64).index_fill(0, offsets, 1.0))
    pairs = torch.fft.irfft(spectrum.abs().square(), period).round().long()
    steps = torch.arange(1, max(2, period // 2 + 1))  # a step and its negative make the same progressions
    if length < period:
        steps = steps[(length % steps == 0) & (period % steps == 0)]
    begun = offsets.numel() - pairs[steps % period]
    chosen = begun.argsort(stable=True)[:_STEPS].tolist()
    return [(int(steps[i]), int(begun[i])) for i in chosen if _SHORTEST * int(begun[i]) <= offsets.numel()]


def _sizes(classes: int, shape: Shape, *, whole: bool) -> Iterator[Block]:
    """The blocks to try; whole classes fill blocks that are as large as they are."""
    sides = shape.out_features // classes, shape.in_features // classes
    if whole and min(sides) >= _SIDES[0]:
        yield Block(sides)
    yield from (Block(side) for side in _SIDES if side <= min(shape.out_features, shape.in_features))


class _BlockRows:
    """Blocks along the shorter side, and what they read of the longer one."""

    def __init__(self, offsets: torch.Tensor, step: int, blocks: Block, shape: Shape) -> None:
        wide, bands = shape.in_features >= shape.out_features, Bands(step, 0, blocks)
        inputs, outputs = bands.input_places(shape), bands.output_places(shape)
        short, long = (outputs, inputs) if wide else (inputs, outputs)
        side, self._width = (blocks.rows, blocks.columns) if wide else (blocks.columns, blocks.rows)
        self._count = -(-short.numel() // side)
        numbers = [part * self._count // _BLOCK_ROWS for part in range(_BLOCK_ROWS)]
        rows = inverse(short).long()
        read = torch.zeros(_BLOCK_ROWS, long.numel(), dtype=torch.bool)
        for mask, number in zip(read, numbers, strict=True):
            mask[long[(offsets[:, None] + rows[number * side : (number + 1) * side]).flatten() % long.numel()].long()] = True
        self._read = read.reshape(_BLOCK_ROWS, math.gcd(step, long.numel()), -1)

    def best_shift(self) -> tuple[int, int]:
        """The shift with which they read the fewest blocks, the smallest of those, and how many blocks all of them then are."""
        counts = [self._blocks(shift) for shift in range(min(self._width, self._read.shape[2]))]
        fewest = min(counts)
        return counts.index(fewest), -(-fewest * self._count // _BLOCK_ROWS)

    def _blocks(self, shift: int) -> int:
        places = self._read.roll(-shift, 2).flatten(1)
        whole = torch.nn.functional.pad(places, (0, -places.shape[1] % self._width))
        return int(whole.unflatten(1, (-1, self._width)).any(2).count_nonzero())
