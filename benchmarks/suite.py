"""What the benchmark scripts share: measure a list of cases with one thread, print them, record them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from padst_compile import SparsitySpec
from padst_compile.benchmarking.report import comparison_table, write_results
from padst_compile.benchmarking.run import Comparison
from padst_compile.structures import parse

RESULTS = Path(__file__).parent / "results"


def spec(structure: str) -> SparsitySpec:
    """90 % sparsity, or what N:M fixes, with a random input permutation on every layer."""
    chosen = parse(structure)
    return SparsitySpec(structure=chosen, sparsity=chosen.natural_sparsity() or 0.9, permutation="random")


def arguments(
    description: str | None, result: str, quick: str = "the first case, few repetitions, nothing written"
) -> argparse.Namespace:
    """The arguments that scripts have in common: `quick`, and `out`, the file to write.

    Args:
        description: the script's docstring, for --help.
        result: name of the recorded file, without its prefix.
        quick: what --quick does.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="folder to write into; that of the recorded results if not given"
    )
    parser.add_argument("--prefix", default="cpu", help="of the file's name, to keep results of several machines side by side")
    given = parser.parse_args()
    given.out = given.out / f"{given.prefix}-{result}"
    return given


def run(
    description: str | None, cases: Sequence[tuple[Any, ...]], measure: Callable[..., Comparison], repetitions: int, name: str
) -> None:
    """Measure every case, and keep it in `results/cpu-NAME.json`, or as --out and --prefix say; with --quick, one, and no file.

    Args:
        description: the script's docstring, for --help.
        cases: arguments of `measure`.
        measure: takes a case and the keyword `repetitions`.
        repetitions: timed calls of each candidate.
        name: of the result.
    """
    given = arguments(description, f"{name}.json")
    quick = given.quick
    torch.set_num_threads(1)
    console = Console(width=200)
    comparisons = []
    for case in cases[:1] if quick else cases:
        console.print("measuring", *case)
        comparisons.append(measure(*case, repetitions=3 if quick else repetitions))
        if not quick:
            write_results(comparisons, given.out)  # what is measured is kept, whatever becomes of the others
    console.print(comparison_table(comparisons, f"{name}, one thread, medians of interleaved calls"))
    if not quick:
        console.print(f"written to {given.out}")
