"""What a permutation costs by where it is put, float32, one thread: writes results/cpu-permute-costs.json.

Every place is timed in rounds with the plain kernel, and its cost is the median of the differences to it, over the quietest
quarter of the rounds:

    load       the kernel with an input permutation
    store      the kernel with an output permutation
    separate   padst::permute, then the kernel on its result
    copy       the same with x.clone(): what separate costs for its traffic alone

The coefficients of `padst_compile.passes.costs` follow from these, in bytes that a copy moves in the same time.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import suite
import torch
from rich.console import Console
from rich.table import Table

from padst_compile import permutation
from padst_compile.autotune.measure import interleaved_medians, interleaved_samples
from padst_compile.benchmarking.machine import describe_machine
from padst_compile.benchmarking.report import write_json
from padst_compile.kernels.dispatch import has_native_kernel, native_op, native_sizes
from padst_compile.structures import parse

PLACES = ("load", "store", "separate", "copy")
CASES = [
    (structure, in_features, out_features, tokens)
    for structure in ("block:64", "nm:1:10", "diagonal")
    for in_features, out_features in ((768, 3072), (3072, 768))
    for tokens in (197, 1576)
]
REPETITIONS = 201
COPIED_BYTES = 2 * torch.float32.itemsize  # read and written, for each element of a copy

_SCHEMA = 1


@dataclasses.dataclass(frozen=True)
class PlaceCosts:
    """What a permutation adds to one layer.

    Args:
        structure: short form.
        in_features: what `load`, `separate` and `copy` move.
        out_features: what `store` moves.
        tokens: rows of the input.
        kernel_milliseconds: the kernel without a permutation.
        nanoseconds: by place, for each element moved.
    """

    structure: str
    in_features: int
    out_features: int
    tokens: int
    kernel_milliseconds: float
    nanoseconds: Mapping[str, float]


def measure(structure: str, in_features: int, out_features: int, tokens: int, *, repetitions: int) -> PlaceCosts:
    """All places on one layer."""
    candidates = _candidates(structure, in_features, out_features, tokens)
    samples = _quietest(interleaved_samples(candidates, repetitions=repetitions, warmup=3))
    elements = {place: tokens * (out_features if place == "store" else in_features) for place in PLACES}
    nanoseconds = {place: 1e9 * _added(samples, place) / elements[place] for place in PLACES}
    kernel = 1e3 * statistics.median(samples["kernel"])
    return PlaceCosts(structure, in_features, out_features, tokens, kernel, nanoseconds)


def _quietest(samples: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """The quarter of the rounds that took the least time as a whole: what else runs on the machine only adds to them."""
    rounds = sorted(zip(*samples.values(), strict=True), key=sum)
    return {name: list(times) for name, times in zip(samples, zip(*rounds[: len(rounds) // 4 + 1], strict=True), strict=True)}


def _added(samples: Mapping[str, Sequence[float]], place: str) -> float:
    """Differences within rounds: from round to round a shared machine changes more than a permutation does."""
    return statistics.median(a - b for a, b in zip(samples[place], samples["kernel"], strict=True))


def _candidates(structure: str, in_features: int, out_features: int, tokens: int) -> dict[str, Callable[[], Any]]:
    generator = torch.Generator().manual_seed(0)
    kernel = _random_layer(structure, in_features, out_features, generator)
    x = torch.randn(tokens, in_features, generator=generator)
    before, after = (permutation.random(size, generator) for size in (in_features, out_features))
    return {
        "kernel": lambda: kernel(x, None, None),
        "load": lambda: kernel(x, before, None),
        "store": lambda: kernel(x, None, after),
        "separate": lambda: kernel(torch.ops.padst.permute(x, before), None, None),
        "copy": lambda: kernel(x.clone(), None, None),
    }


def _random_layer(
    structure: str, in_features: int, out_features: int, generator: torch.Generator
) -> Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor | None], torch.Tensor]:
    """The native product of a random layer: a function of its input and its two permutations."""
    chosen = parse(structure)
    if not has_native_kernel(chosen, torch.device("cpu"), torch.float32):
        raise SystemExit(f"{structure} has no native kernel here; `padst doctor` says why")
    weight = torch.randn(out_features, in_features, generator=generator)
    topology = chosen.choose(weight.abs(), suite.spec(structure).sparsity)
    values, bias = chosen.pack(weight, topology), torch.randn(out_features, generator=generator)

    def product(x: torch.Tensor, before: torch.Tensor | None, after: torch.Tensor | None) -> torch.Tensor:
        y: torch.Tensor = native_op(chosen)(x, values, *topology, bias, before, after, out_features, *native_sizes(chosen))
        return y

    return product


def call_nanoseconds(*, repetitions: int) -> float:
    """One call of `padst::permute` that has nothing to move."""
    x, table = torch.zeros(1, 1), permutation.identity(1)
    calls = {"call": lambda: torch.ops.padst.permute(x, table)}
    return 1e9 * interleaved_medians(calls, repetitions=10 * repetitions, warmup=10)["call"]


def coefficients(costs: Sequence[PlaceCosts], call: float) -> dict[str, int]:
    """The fields of `CostModel`, from medians over the cases."""
    blocks = [c.nanoseconds for c in costs if c.structure.startswith("block")]
    bytes_per_nanosecond = COPIED_BYTES / statistics.median(c.nanoseconds["copy"] for c in costs)
    kernel = statistics.median(places[place] for places in blocks for place in ("load", "store"))
    separate = statistics.median(c.nanoseconds["separate"] - c.nanoseconds["copy"] for c in costs)
    return {
        "kernel_gather": round(kernel * bytes_per_nanosecond),
        "separate_gather": round(separate * bytes_per_nanosecond),
        "dispatch": 10_000 * round(call * bytes_per_nanosecond / 10_000),
    }


def _table(costs: Sequence[PlaceCosts]) -> Table:
    table = Table(
        title="nanoseconds per element, one thread, medians of differences within the quietest rounds", title_justify="left"
    )
    for column in ("layer", "tokens", "kernel", *PLACES):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for c in costs:
        places = (f"{c.nanoseconds[place]:.2f}" for place in PLACES)
        layer = f"{c.structure} {c.in_features} → {c.out_features}"
        table.add_row(layer, str(c.tokens), f"{c.kernel_milliseconds:.2f} ms", *places)
    return table


def main() -> None:
    """Measure, print, record."""
    given = suite.arguments(__doc__, "permute-costs.json", quick="few repetitions, nothing written")
    quick = given.quick
    torch.set_num_threads(1)
    console, repetitions = Console(width=200), 5 if quick else REPETITIONS
    call = call_nanoseconds(repetitions=repetitions)
    costs = [measure(*case, repetitions=repetitions) for case in CASES]
    data = {
        "schema": _SCHEMA,
        "machine": describe_machine(),
        "call_nanoseconds": call,
        "cases": [dataclasses.asdict(c) for c in costs],
        "coefficients": coefficients(costs, call),
    }
    console.print(_table(costs), f"a call that moves nothing: {call:.0f} ns", data["coefficients"], sep="\n")
    if not quick:
        console.print(f"written to {write_json(data, given.out)}")


if __name__ == "__main__":
    main()
