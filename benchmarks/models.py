"""Whole models, sparse beside dense, one thread: writes results/cpu-models.json.

python benchmarks/models.py [--quick]
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
    ("timm:vit_base_patch16_224", "block:64", 1),
    ("timm:vit_base_patch16_224", "block:64", 8),
    ("hf:gpt2", "block:64", 1),
    ("timm:mixer_s16_224", "block:64", 1),
    ("timm:vit_base_patch16_224", "nm:1:10", 1),
    ("timm:vit_base_patch16_224", "diagonal", 1),
    ("hf:gpt2", "nm:1:10", 1),
    ("hf:gpt2", "diagonal", 1),
]


def measure(model: str, structure: str, batch: int, repetitions: int) -> Comparison:
    """One model at 90 % sparsity with random input permutations on every layer, and without."""
    chosen = parse(structure)
    spec = SparsitySpec(structure=chosen, sparsity=chosen.natural_sparsity() or 0.9, permutation="random")
    return compare(build_model(model, batch=batch), spec, Settings(batch=batch, repetitions=repetitions, unpermuted=True))


def main() -> None:
    """Measure every case and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the first case, few repetitions")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=200)
    comparisons = []
    for case in CASES[:1] if arguments.quick else CASES:
        console.print("measuring", *case)
        comparisons.append(measure(*case, repetitions=3 if arguments.quick else 15))
    console.print(comparison_table(comparisons, "models at 90 %, one thread, medians of interleaved calls"))
    if not arguments.quick:
        console.print(f"written to {write_results(comparisons, RESULTS / 'cpu-models.json')}")


if __name__ == "__main__":
    main()
