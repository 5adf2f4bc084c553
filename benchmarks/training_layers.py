"""Forward and backward of single layers at 90 %, sparse beside dense, both compiled, one thread.

Writes cpu-training-layers.json: median milliseconds of one call with the gradients of inputs and parameters. Dense runs
under torch.compile's defaults; freezing is for inference alone.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import suite
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from padst_compile import sparsify
from padst_compile.autotune.measure import interleaved_medians
from padst_compile.backend import padst
from padst_compile.benchmarking.machine import describe_machine
from padst_compile.benchmarking.report import write_json

TOKENS = 1576
CASES = [
    (768, 3072, "block:64", torch.float32),
    (3072, 768, "block:64", torch.float32),
    (768, 3072, "block:32", torch.float32),
    (768, 3072, "block:64", torch.bfloat16),
    (768, 3072, "nm:1:10", torch.float32),
    (768, 3072, "diagonal", torch.float32),
]


@dataclasses.dataclass(frozen=True)
class Case:
    """One layer, forward and backward.

    Args:
        layer: inputs and outputs.
        structure: short form.
        dtype: of weights and activations.
        tokens: rows of the activations.
        dense: milliseconds, torch.compile.
        sparse: milliseconds, backend padst, with a random input permutation.
    """

    layer: str
    structure: str
    dtype: str
    tokens: int
    dense: float
    sparse: float

    @property
    def speedup(self) -> float:
        """Dense time over sparse time."""
        return self.dense / self.sparse


def measure(in_features: int, out_features: int, structure: str, dtype: torch.dtype, repetitions: int) -> Case:
    """One layer, in turns with its dense self."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(in_features, out_features)).to(dtype)
    sparse = sparsify(copy.deepcopy(dense), suite.spec(structure))
    x = torch.randn(TOKENS, in_features, dtype=dtype)
    direction = torch.randn(TOKENS, out_features, dtype=dtype)
    runs = {
        "dense": _step(torch.compile(dense), x, direction),
        "sparse": _step(torch.compile(sparse, backend=padst), x, direction),
    }
    seconds = interleaved_medians(runs, repetitions=repetitions, warmup=2)
    name, size = str(dtype).removeprefix("torch."), f"{in_features} -> {out_features}"
    return Case(size, structure, name, TOKENS, seconds["dense"] * 1e3, seconds["sparse"] * 1e3)


def _step(model: Callable[..., torch.Tensor], x: torch.Tensor, direction: torch.Tensor) -> Callable[[], None]:
    leaf = x.requires_grad_()

    def run() -> None:
        model(leaf).backward(direction)

    return run


def main() -> None:
    """Measure, print, record."""
    given = suite.arguments(__doc__, "training-layers.json")
    quick = given.quick
    torch.set_num_threads(1)
    console = Console(width=120)
    table = Table(
        title=f"forward and backward, {TOKENS} tokens, one thread, medians of interleaved calls", title_justify="left"
    )
    for column in ("layer", "sparse as", "dtype", "dense", "padst", "speed-up"):
        table.add_column(column, justify="right")
    cases = []
    for case in CASES[:1] if quick else CASES:
        console.print("measuring", *case)
        result = measure(*case, repetitions=3 if quick else 15)
        cases.append({**dataclasses.asdict(result), "speedup": result.speedup})
        times = f"{result.dense:.2f} ms", f"{result.sparse:.2f} ms", f"{result.speedup:.2f}x"
        table.add_row(result.layer, result.structure, result.dtype, *times)
    console.print(table)
    if not quick:
        console.print(f"written to {write_json({'schema': 1, 'machine': describe_machine(), 'cases': cases}, given.out)}")


if __name__ == "__main__":
    main()
