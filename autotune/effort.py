"""How much time tuning may take."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal, TypeAlias

Effort: TypeAlias = Literal["off", "cached", "quick", "full"]
"""
    off     nothing is measured or looked up: default tiles, and the cost model decides between sparse and dense
    cached  what was measured before, here or in the shipped configurations, else the cost model
    quick   the same, but what is not known is measured at first use: the default, and the few that the cost model ranks best
    full    the whole search space is measured, unless it was before
"""


@dataclasses.dataclass(frozen=True)
class Budget:
    """What one search may spend.

    Args:
        tiles: how many tiles of a kernel are measured besides its default; None measures all.
        repetitions: timed runs of each candidate.
        seconds: no further round of runs starts after this time.
    """

    tiles: int | None
    repetitions: int
    seconds: float


BUDGETS: Mapping[str, Budget] = {"quick": Budget(2, 9, 1.0), "full": Budget(None, 21, 20.0)}
"""The efforts that measure."""

_THOROUGHNESS = {"quick": 1, "full": 2}


def measures(effort: Effort) -> bool:
    """Whether an effort measures what is not known."""
    return effort in BUDGETS


def satisfies(measured_with: str, effort: Effort) -> bool:
    """Whether a result that was measured with one effort is good enough for another."""
    return _THOROUGHNESS[measured_with] >= _THOROUGHNESS.get(effort, 0)
