"""Single layers, sparse beside dense, one thread: writes results/cpu-layers.json.

python benchmarks/layers.py [--quick]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console

from padst_compile import SparsitySpec
from padst_compile.benchmarking.models import build_model
from padst_compile.benchmarking.report import comparison_table, write_results
from padst_compile.benchmarking.run import Comparison, Settings, compare
from padst_compile.structures import parse

RESULTS = Path(__file__).parent / "results"
CASES = [
    ("linear:768:3072", "block:64", torch.float32, 1576),
    ("linear:3072:768", "block:64", torch.float32, 1576),
    ("linear:768:3072", "block:32", torch.float32, 1576),
    ("linear:768:3072", "block:16", torch.float32, 1576),
    ("linear:768:3072", "nm:1:10", torch.float32, 1576),
    ("linear:768:3072", "diagonal", torch.float32, 1576),
    ("linear:768:3072", "block:64", torch.float32, 197),
    ("linear:3072:768", "block:64", torch.float32, 197),
    ("linear:768:3072", "block:64", torch.float32, 16),
    ("linear:768:3072", "block:64", torch.bfloat16, 1576),
    ("linear:3072:768", "block:64", torch.bfloat16, 1576),
]


def measure(model: str, structure: str, dtype: torch.dtype, tokens: int, repetitions: int) -> Comparison:
    """One layer at 90 % sparsity with a random input permutation, and without."""
    chosen = parse(structure)
    spec = SparsitySpec(structure=chosen, sparsity=chosen.natural_sparsity() or 0.9, permutation="random")
    settings = Settings(dtype=dtype, repetitions=repetitions, unpermuted=True)
    return compare(build_model(model, tokens=tokens), spec, settings)


def main() -> None:
    """Measure every case and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the first two cases, few repetitions")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=200)
    comparisons = []
    for case in CASES[:2] if arguments.quick else CASES:
        console.print("measuring", *case)
        comparisons.append(measure(*case, repetitions=5 if arguments.quick else 31))
    console.print(comparison_table(comparisons, "layers at 90 %, one thread, medians of interleaved calls"))
    if not arguments.quick:
        console.print(f"written to {write_results(comparisons, RESULTS / 'cpu-layers.json')}")


if __name__ == "__main__":
    main()
