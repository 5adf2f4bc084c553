"""What runs a layer, and why: looked up, measured, or reckoned, whichever the effort asks for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import cast

from padst_compile.autotune.cost_model import layer_seconds
from padst_compile.autotune.effort import Effort
from padst_compile.autotune.entry import MARGIN, Timing, first_of_the_fastest
from padst_compile.autotune.finding import find
from padst_compile.autotune.lookup import Found, Source
from padst_compile.autotune.machine import machine
from padst_compile.autotune.problem import Kernel, LayerProblem
from padst_compile.autotune.scoped import Entries, added, present
from padst_compile.autotune.search import Run, tune_layer
from padst_compile.kernels.launch import Tile


@dataclasses.dataclass(frozen=True)
class KernelChoice:
    """What runs a layer, and why.

    Args:
        kernel: "native" (C++), "triton", "registered" (somebody else's), "aten", "cusparselt" or "dense".
        reason: a sentence for the user.
        sparse_seconds: median time of the best sparse kernel, where it was measured.
        dense_seconds: median time of the dense product, where it was measured.
        default_seconds: median time of the sparse kernel without tuning, where it was measured.
        tile: what the kernel is launched with; None for its default.
        source: where the answer comes from.
    """

    kernel: Kernel
    reason: str
    sparse_seconds: float | None = None
    dense_seconds: float | None = None
    default_seconds: float | None = None
    tile: Tile | None = None
    source: Source = "asked for"


Observer = Callable[[LayerProblem, KernelChoice], None]

_observers: Entries[Observer] = []


def choose_kernel(problem: LayerProblem, runs: Callable[[], Mapping[Kernel, Run]], effort: Effort = "quick") -> KernelChoice:
    """The fastest of a layer's kernels, as far as the effort allows to know.

    Args:
        problem: the layer.
        runs: makes the product, and its gradients while training, for each of `problem.kernels`; called for measuring alone.
        effort: see `Effort`. While a CUDA graph is captured, nothing is measured.
    """
    choice = compare_kernels(problem, runs, effort)
    for observer in present(_observers):
        observer(problem, choice)
    return choice


def compare_kernels(problem: LayerProblem, runs: Callable[[], Mapping[Kernel, Run]], effort: Effort) -> KernelChoice:
    """`choose_kernel` for a layer that a program may not have in the end: no observer is told."""
    found = find(problem, lambda: tune_layer(problem, runs(), effort), effort)
    return _by_cost_model(problem) if found is None else _by_measurement(problem, found)


def observed(observer: Observer) -> AbstractContextManager[None]:
    """Within this, `observer` is told of every choice that this thread makes, as it is made."""
    return added(_observers, observer)


def _by_measurement(problem: LayerProblem, found: Found) -> KernelChoice:
    winner, entry = found.entry.winner, found.entry
    kernel = cast("Kernel", winner.candidate.kernel)
    sparse = tuple(timing for timing in entry.timings if timing.candidate.kernel != "dense")
    best = first_of_the_fastest(sparse) if kernel == "dense" else winner
    seconds = {timing.candidate.kernel: timing.seconds for timing in _best_of_each(entry.timings)}
    seconds[best.candidate.kernel] = best.seconds
    left_out = "".join(f"; {name} is left out: {reason}" for name, reason in entry.left_out)
    return KernelChoice(
        kernel=kernel,
        reason=f"{_comparison(seconds, kernel)} at {found.tokens} tokens ({found.source}){left_out}",
        sparse_seconds=best.seconds,
        dense_seconds=seconds["dense"],
        default_seconds=entry.default.seconds,
        tile=winner.candidate.tile,
        source=found.source,
    )


def _best_of_each(timings: tuple[Timing, ...]) -> list[Timing]:
    """The first of the fastest timings of each kernel, in the order of the kernels."""
    kernels = dict.fromkeys(timing.candidate.kernel for timing in timings)
    return [first_of_the_fastest(tuple(t for t in timings if t.candidate.kernel == kernel)) for kernel in kernels]


def _by_cost_model(problem: LayerProblem) -> KernelChoice:
    on = machine(problem.device)
    seconds: dict[str, float] = {kernel: layer_seconds(problem, kernel, on) for kernel in problem.kernels}
    kernel = min(problem.kernels, key=seconds.__getitem__)  # the first of equals: the default
    return KernelChoice(kernel, f"{_comparison(seconds, kernel)} at {problem.tokens} tokens (cost model)", source="cost model")


def _comparison(seconds: Mapping[str, float], winner: str) -> str:
    """The winner beside dense and all others, or, where dense wins, all others beside it."""
    others = [name for name in seconds if name not in ("dense", winner)]
    if winner != "dense":
        return " and ".join(_gain(seconds, winner, name) for name in ("dense", *others))
    (first, loss), *rest = [(name, f"{seconds[name] / seconds['dense']:.1f}x") for name in others]
    more = "".join(f", {name} {factor}" for name, factor in rest)
    return f"{first if rest else 'sparse'} would be {loss} slower than dense{more}"


def _gain(seconds: Mapping[str, float], winner: str, other: str) -> str:
    if seconds[winner] > seconds[other] / (1 + MARGIN):
        return f"as fast as {other}"
    return f"{seconds[other] / seconds[winner]:.1f}x faster than {other}"
