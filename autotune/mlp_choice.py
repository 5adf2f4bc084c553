"""Whether two layers run in one kernel, and why: measured once against the two kernels, and kept like any result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from padst_compile.autotune.effort import Effort
from padst_compile.autotune.finding import find
from padst_compile.autotune.problem import MlpProblem
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
    """

    fused: bool
    reason: str
    tile: Tile | None = None


def choose_mlp(problem: MlpProblem, runs: Callable[[], Mapping[Candidate, Run]], effort: Effort) -> MlpChoice:
    """One kernel where it was measured to be faster than two; two where nothing is known.

    Args:
        problem: the two layers.
        runs: makes `APART`, which is first, and others; called for measuring alone.
        effort: see `Effort`.
    """
    found = find(problem, lambda: measured(runs(), problem.device, effort), effort)
    if found is None:
        return MlpChoice(False, "one kernel for both layers was not measured")
    seconds = {timing.candidate: timing.seconds for timing in found.entry.timings}
    winner = found.entry.winner.candidate
    fused = min(time for candidate, time in seconds.items() if candidate != APART)
    where = f"at {found.tokens} tokens ({found.source})"
    if winner == APART:
        return MlpChoice(False, f"one kernel takes {fused / seconds[APART]:.2f} of the time of two {where}")
    ratio = seconds[APART] / seconds[winner]
    return MlpChoice(True, f"in one kernel with the next layer, {ratio:.2f}x faster than two {where}", winner.tile)
