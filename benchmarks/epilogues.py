"""What a bias, an activation and a residual cost inside a kernel: writes results/cpu-epilogues.json.

Layers 768 → 3072 at 90 %, 1576 tokens, one thread, each compiled as a bare product and, with the same weights, with more behind
it. Times are medians over the quietest quarter of the rounds, in each of which all run, and the least of several copies: where
memory happens to lie changes them by more than that. "apart" is the bare product, and then PyTorch's operators
on its result.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import Any

import suite
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from padst_compile import sparsify
from padst_compile.autotune.measure import interleaved_samples
from padst_compile.backend import padst
from padst_compile.benchmarking.machine import describe_machine
from padst_compile.benchmarking.report import write_json

WIDTH, HIDDEN, TOKENS = 768, 3072, 1576
CASES = (
    ("block:64", torch.float32),
    ("block:64", torch.bfloat16),
    ("nm:1:10", torch.float32),
    ("diagonal", torch.float32),
)
REPETITIONS, COPIES = 41, 4
BARE, APART = "product", "bias, gelu apart"

_SCHEMA = 1


class _Layer(nn.Module):
    """A linear layer and what follows it, an activation or the addition of a residual."""

    def __init__(self, linear: nn.Module, activation: nn.Module | None) -> None:
        super().__init__()
        self.linear, self.activation = linear, activation

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        return y + residual if self.activation is None else self.activation(y)


def measure(structure: str, dtype: torch.dtype, *, repetitions: int, copies: int) -> dict[str, Any]:
    """Milliseconds of every form of a layer.

    Args:
        structure: short form.
        dtype: of weights and activations.
        repetitions: rounds, for each copy.
        copies: of all forms, made one after the other.
    """
    taken: dict[str, float] = {}
    for _ in range(copies):
        for name, seconds in _medians(structure, dtype, repetitions).items():
            taken[name] = min(1e3 * seconds, taken.get(name, float("inf")))
    return {"structure": structure, "dtype": str(dtype).removeprefix("torch."), "milliseconds": taken}


def _medians(structure: str, dtype: torch.dtype, repetitions: int) -> dict[str, float]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    x, residual = torch.randn(TOKENS, WIDTH, dtype=dtype), torch.randn(TOKENS, HIDDEN, dtype=dtype)
    with torch.no_grad():
        samples = interleaved_samples(_forms(structure, x, residual), repetitions=repetitions, warmup=3)
    rounds = sorted(zip(*samples.values(), strict=True), key=sum)[: repetitions // 4 + 1]
    return dict(zip(samples, map(statistics.median, zip(*rounds, strict=True)), strict=True))


def _forms(structure: str, x: torch.Tensor, residual: torch.Tensor) -> dict[str, Callable[[], Any]]:
    bare, biased = nn.Linear(WIDTH, HIDDEN, bias=False).to(x.dtype), nn.Linear(WIDTH, HIDDEN).to(x.dtype)
    biased.weight = bare.weight
    behind = {
        BARE: (bare, nn.Identity()),
        "bias": (biased, nn.Identity()),
        "bias, gelu": (biased, nn.GELU()),
        "bias, gelu (tanh)": (biased, nn.GELU("tanh")),
        "bias, silu": (biased, nn.SiLU()),
        "bias, residual": (biased, None),
    }
    forms: dict[str, Callable[[], Any]] = {}
    for name, (linear, activation) in behind.items():
        torch.manual_seed(0)  # the same permutation
        model = sparsify(_Layer(copy.deepcopy(linear), activation), suite.spec(structure)).eval()
        run = torch.compile(model, backend=padst, options={"kernels": "sparse"})
        run(x, residual)
        forms[name] = lambda run=run: run(x, residual)
    product = forms[BARE]
    forms[APART] = lambda: nn.functional.gelu(product() + biased.bias)
    return forms


def _table(results: list[dict[str, Any]]) -> Table:
    title = f"{WIDTH} → {HIDDEN}, 90 %, {TOKENS} tokens, one thread: milliseconds of the product, and times as long with more"
    table = Table(title=title, title_justify="left")
    names = list(results[0]["milliseconds"])
    for column in ("sparse as", *names):
        table.add_column(column, justify="right")
    for result in results:
        taken = result["milliseconds"]
        ratios = (f"{taken[name] / taken[BARE]:.2f}x" for name in names[1:])
        table.add_row(f"{result['structure']}, {result['dtype']}", f"{taken[BARE]:.2f} ms", *ratios)
    return table


def main() -> None:
    """Measure, print, record."""
    given = suite.arguments(__doc__, "epilogues.json", quick="the first case, few repetitions, nothing written")
    torch.set_num_threads(1)
    cases, repetitions, copies = (CASES[:1], 5, 1) if given.quick else (CASES, REPETITIONS, COPIES)
    results = [measure(*case, repetitions=repetitions, copies=copies) for case in cases]
    console = Console(width=150)
    console.print(_table(results))
    if not given.quick:
        data = {"schema": _SCHEMA, "machine": describe_machine(), "cases": results}
        console.print(f"written to {write_json(data, given.out)}")


if __name__ == "__main__":
    main()
