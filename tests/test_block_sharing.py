"""What neighbouring block rows share: the counts that docs/kernels.md quotes."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
CASES = json.loads((ROOT / "benchmarks" / "results" / "block-sharing.json").read_text())["cases"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("block_sharing", ROOT / "benchmarks" / "block_sharing.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("mask", ["random", "skewed"])
def test_recorded_counts_are_those_of_the_script(script: ModuleType, mask: str) -> None:
    (recorded,) = [
        case
        for case in CASES
        if (case["in_features"], case["out_features"], case["side"], case["sparsity"], case["mask"])
        == (768, 3072, 64, 0.9, mask)
    ]
    assert dataclasses.asdict(script.measure(768, 3072, 64, 0.9, mask)) == recorded


def test_rows_in_order_are_the_same_rows_and_alike_ones_follow_each_other(script: ModuleType) -> None:
    grid = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1]], dtype=torch.bool)
    assert script.shared(grid) == 0
    assert script.ordered(grid).tolist() == grid[[0, 2, 1, 3]].tolist()
    assert script.shared(script.ordered(grid)) == 0.5


def test_merged_blocks_are_counted(script: ModuleType) -> None:
    grid = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1]], dtype=torch.bool)
    assert [script.merged(grid, rows, columns) for rows, columns in ((1, 1), (2, 1), (2, 2))] == [4, 4, 2]


def test_the_documentation_quotes_what_is_recorded() -> None:
    text = " ".join((ROOT / "docs" / "kernels.md").read_text().split())
    found = {(c["in_features"], c["side"], c["mask"]): c for c in CASES if c["sparsity"] == 0.9}
    wide, fine, skewed = found[768, 64, "random"], found[768, 16, "random"], found[768, 16, "skewed"]
    squares = [[c["square_stored"] for c in CASES if (c["side"], c["mask"]) == (16, mask)] for mask in ("random", "skewed")]
    for quote in (
        f"has {percent(wide['shared'])} of its columns",
        f"and {percent(wide['shared_in_order'])} after rows were ordered",
        f"blocks of 16, {percent(fine['shared'])} and {percent(fine['shared_in_order'])}.",
        f"{percent(1 - fine['pair_traffic'])} less traffic",
        f"{fine['pair_stored']:.2f} times the values",
        f"({percent(1 - skewed['pair_traffic'])} and {skewed['pair_stored']:.2f} times",
        f"traffic grows by {percent(found[3072, 64, 'random']['pair_traffic'] - 1)}",
        *(f"{min(stored):.1f} to {max(stored):.1f} times" for stored in squares),
    ):
        assert quote in text


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"
