"""Two block layers of ViT-B in one C++ kernel and in two, one thread: writes results/cpu-mlp.json.

Block(64) layers 768 → 3072 → 768 with biases, GELU between and a residual behind, by dtype, density, tokens, and with or
without a permutation between the layers. Times are medians over the quietest quarter of the rounds, in each of which both run.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Callable
from typing import Any

import suite
import torch
from rich.console import Console
from rich.table import Table

from padst_compile import permutation
from padst_compile.autotune.measure import interleaved_samples
from padst_compile.benchmarking.machine import describe_machine
from padst_compile.benchmarking.report import write_json
from padst_compile.kernels import native
from padst_compile.structures import Block, Shape

WIDTH, HIDDEN, STRUCTURE = 768, 3072, Block(64)
CASES = tuple(itertools.product((torch.float32, torch.bfloat16), (0.9, 0.95), (1, 16, 197, 1576), (False, True)))
REPETITIONS = 101

_SCHEMA = 1


@dataclasses.dataclass(frozen=True)
class Result:
    """Milliseconds of both ways to run two layers.

    Args:
        dtype: as in "float32".
        sparsity: of both layers.
        tokens: rows of the input.
        permuted: whether the second layer reads the hidden features in another order.
        two: milliseconds of two kernels.
        one: milliseconds of one.
    """

    dtype: str
    sparsity: float
    tokens: int
    permuted: bool
    two: float
    one: float


def measure(dtype: torch.dtype, sparsity: float, tokens: int, permuted: bool, *, repetitions: int) -> Result:
    """Both ways side by side."""
    samples = interleaved_samples(_candidates(dtype, sparsity, tokens, permuted), repetitions=repetitions, warmup=3)
    rounds = sorted(zip(samples["two"], samples["one"], strict=True), key=sum)[: repetitions // 4 + 1]
    two, one = (1e3 * statistics.median(times) for times in zip(*rounds, strict=True))
    return Result(str(dtype).removeprefix("torch."), sparsity, tokens, permuted, two, one)


def _candidates(dtype: torch.dtype, sparsity: float, tokens: int, permuted: bool) -> dict[str, Callable[[], Any]]:
    generator = torch.Generator().manual_seed(0)
    first = _layer(Shape(HIDDEN, WIDTH), sparsity, dtype, None, generator)
    second = _layer(
        Shape(WIDTH, HIDDEN), sparsity, dtype, permutation.random(HIDDEN, generator) if permuted else None, generator
    )
    x = torch.randn(tokens, WIDTH, generator=generator).to(dtype)
    linear, mlp = torch.ops.padst_native.block_linear, torch.ops.padst_native.block_mlp
    return {
        "two": lambda: linear(linear(x, *first, "gelu"), *second, "none", x),
        "one": lambda: mlp(x, *first[:-2], HIDDEN, *second, "gelu", x),
    }


def _layer(
    shape: Shape, sparsity: float, dtype: torch.dtype, table: torch.Tensor | None, generator: torch.Generator
) -> tuple[Any, ...]:
    """What an op takes of a random layer, its blocks arranged as compiled models have them."""
    weight = torch.randn(shape.out_features, shape.in_features, generator=generator) * shape.in_features**-0.5
    topology = STRUCTURE.choose(weight.abs(), sparsity)
    values = STRUCTURE.pack(weight, topology).to(dtype)
    if native.interleaves(dtype):
        values = torch.ops.padst_native.interleave_blocks(values, *topology, shape.in_features, shape.out_features)
    bias = torch.randn(shape.out_features, generator=generator).to(dtype)
    return values, *topology, bias, table, None, shape.out_features


def _table(results: list[Result]) -> Table:
    table = Table(title="768 → 3072 → 768, Block(64), one thread, milliseconds", title_justify="left")
    for column in ("dtype", "sparsity", "tokens", "permuted", "two kernels", "one kernel", "two / one"):
        table.add_column(column, justify="right")
    for r in results:
        times = (f"{r.two:.3f}", f"{r.one:.3f}", f"{r.two / r.one:.2f}")
        table.add_row(r.dtype, str(r.sparsity), str(r.tokens), "yes" if r.permuted else "", *times)
    return table


def main() -> None:
    """Measure, print, record."""
    given = suite.arguments(__doc__, "mlp.json", quick="few repetitions, nothing written")
    quick = given.quick
    if not (native.load() and native.supports("block", torch.float32)):
        raise SystemExit("blocks have no native kernel here; `padst doctor` says why")
    torch.set_num_threads(1)
    results = [measure(*case, repetitions=9 if quick else REPETITIONS) for case in CASES]
    console = Console(width=120)
    console.print(_table(results))
    if not quick:
        data = {"schema": _SCHEMA, "machine": describe_machine(), "cases": [dataclasses.asdict(r) for r in results]}
        console.print(f"written to {write_json(data, given.out)}")


if __name__ == "__main__":
    main()
