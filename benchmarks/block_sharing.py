"""What neighbouring block rows share, and what merging blocks would store: writes results/block-sharing.json.

Counts of synthetic masks, no times. Two uses of the freedom to order block rows (and columns, by the permutations that a layer
has anyway) are judged by them:

    order   block rows that read the same inputs follow each other, so that these are in a nearer cache
    merge   two block rows in one tile, or blocks two by two in one block, with zeros where one of them has no block

Masks are "random" (scores that know nothing of rows and columns) or "skewed" (scores times a log-normal factor of each block
row and of each block column: rows and columns that matter more). Masks that a training left are not among them.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from pathlib import Path

import torch

from padst_compile.files import replace_text

SHAPES = ((768, 3072), (3072, 768), (4096, 16384))  # inputs, outputs
SIDES = (16, 64)
SPARSITIES = (0.9, 0.95)
SEEDS = range(5)
SKEW = 0.5  # standard deviation of the logarithm of a factor
TILE_TOKENS = 128  # of a tile of the Triton kernel
RESULT = Path(__file__).resolve().parent / "results" / "block-sharing.json"

_SCHEMA = 1


@dataclasses.dataclass(frozen=True)
class Sharing:
    """One layer; means over seeds.

    Args:
        in_features: inputs of the layer.
        out_features: outputs of the layer.
        side: of a block.
        sparsity: share of blocks that are zero.
        mask: "random" or "skewed".
        shared: share of its block columns that a block row has in common with the one before.
        shared_in_order: the same after `ordered`.
        pair_stored: values of tiles of two block rows over those of the blocks, with rows in order.
        pair_traffic: what those tiles read from the shared cache, inputs and weights, over what single rows read.
        square_stored: values of blocks of twice the side over those of the blocks, with rows and columns in order.
    """

    in_features: int
    out_features: int
    side: int
    sparsity: float
    mask: str
    shared: float
    shared_in_order: float
    pair_stored: float
    pair_traffic: float
    square_stored: float


def draw(rows: int, columns: int, sparsity: float, mask: str, seed: int) -> torch.Tensor:
    """Which blocks of a grid `[rows, columns]` are kept."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(rows, columns, generator=generator).log()
    if mask == "skewed":
        scores += SKEW * (torch.randn(rows, 1, generator=generator) + torch.randn(1, columns, generator=generator))
    kept = torch.zeros(rows * columns, dtype=torch.bool)
    kept[scores.flatten().argsort(descending=True)[: round((1 - sparsity) * rows * columns)]] = True
    return kept.reshape(rows, columns)


def ordered(grid: torch.Tensor) -> torch.Tensor:
    """The rows of a grid, the fullest first, then always the one that shares most columns with the last."""
    overlap, size = (grid.float() @ grid.float().T).long(), grid.sum(1)
    order, left = [int(size.argmax())], torch.ones(len(grid), dtype=torch.bool)
    for _ in range(len(grid) - 1):
        left[order[-1]] = False
        worth = 2 * overlap[order[-1]] - size  # a column of its own costs as much as a shared one saves
        order.append(int(worth.masked_fill(~left, -(1 << 30)).argmax()))
    return grid[order]


def shared(grid: torch.Tensor) -> float:
    """Share of the blocks in whose column the row before has one, too."""
    return int((grid[1:] & grid[:-1]).sum()) / int(grid.sum())


def merged(grid: torch.Tensor, rows: int, columns: int) -> int:
    """Blocks of so many times the sides that hold any block."""
    return int(grid.unflatten(0, (-1, rows)).unflatten(2, (-1, columns)).any(3).any(1).sum())


def measure(in_features: int, out_features: int, side: int, sparsity: float, mask: str) -> Sharing:
    """Count for one layer."""
    counts = []
    for seed in SEEDS:
        grid = draw(out_features // side, in_features // side, sparsity, mask, seed)
        blocks, rows = int(grid.sum()), ordered(grid)
        pairs, squares = merged(rows, 2, 1), merged(ordered(rows.T).T, 2, 2)
        traffic = pairs * (TILE_TOKENS + 2 * side) / (blocks * (TILE_TOKENS + side))
        counts.append((shared(grid), shared(rows), 2 * pairs / blocks, traffic, 4 * squares / blocks))
    means = (round(sum(values) / len(counts), 3) for values in zip(*counts, strict=True))
    return Sharing(in_features, out_features, side, sparsity, mask, *means)


def main() -> None:
    """Count for all layers, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULT)
    out = parser.parse_args().out
    cases = [
        measure(*shape, side, sparsity, mask)
        for shape, side, sparsity, mask in itertools.product(SHAPES, SIDES, SPARSITIES, ("random", "skewed"))
    ]
    for case in cases:
        print(case)
    record = {"schema": _SCHEMA, "tile_tokens": TILE_TOKENS, "skew": SKEW, "cases": [dataclasses.asdict(c) for c in cases]}
    replace_text(out, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
