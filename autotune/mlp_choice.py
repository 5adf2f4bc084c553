"""Whether two layers run in one kernel, and why: measured once against the two kernels, and kept like any result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

from padst_compile.autotune.effort import Effort
from padst_compile.autotune.entry import first_of_the_fastest
from padst_compile.autotune.finding import find
from padst_compile.autotune.lookup import Found, Source
from padst_compile.autotune.problem import MlpProblem
from padst_compile.autotune.scoped import Entries, added, present
from padst_compile.autotune.search import Run, measured
from padst_compile.autotune.space import Candidate
from padst_compile.kernels.launch import Tile

APART = Candidate("apart")
"""Two kernels, which stand first: only what is faster by the margin replaces them."""


@dataclasses.dataclass(frozen=True)
class MlpChoice:
    """What runs two layers, and why.

    Args:
        fused: whether one kernel does.
        reason: a sentence for the user.
        tile: what that kernel is launched with; None for its default.
        apart_seconds: median time of two kernels, where it was measured.
        fused_seconds: median time of the best kernel for both, where it was measured.
        source: where the answer comes from.
    """

    fused: bool
    reason: str
    tile: Tile | None = None
    apart_seconds: float | None = None
    fused_seconds: float | None = None
    source: Source = "asked for"


Observer = Callable[[MlpProblem, MlpChoice], None]

_observers: Entries[Observer] = []


def choose_mlp(problem: MlpProblem, runs: Callable[[], Mapping[Candidate, Run]], effort: Effort) -> MlpChoice:
    """One kernel where it was measured to be faster than two; two where nothing is known.

    Args:
        problem: the two layers.
        runs: makes `APART`, which is first, and others; called for measuring alone.
        effort: see `Effort`.
    """
    found = find(problem, lambda: measured(runs(), problem.device, effort), effort)
    choice = MlpChoice(False, "one kernel for both layers was not measured") if found is None else _by_measurement(found)
    for observer in present(_observers):
        observer(problem, choice)
    return choice


def observed(observer: Observer) -> AbstractContextManager[None]:
    """Within this, `observer` is told of every choice that this thread makes, as it is made."""
    return added(_observers, observer)


def _by_measurement(found: Found) -> MlpChoice:
    entry, where = found.entry, f"at {found.tokens} tokens ({found.source})"
    (apart,) = (timing for timing in entry.timings if timing.candidate == APART)
    best = first_of_the_fastest(tuple(timing for timing in entry.timings if timing.candidate != APART))
    times = apart.seconds, best.seconds, found.source
    if entry.winner == apart:
        return MlpChoice(False, f"one kernel takes {best.seconds / apart.seconds:.2f} of the time of two {where}", None, *times)
    faster = f"{apart.seconds / best.seconds:.2f}x faster than two {where}"
    return MlpChoice(True, f"in one kernel with the next layer, {faster}", best.candidate.tile, *times)
