"""What a search found, as it is kept: every candidate with its time, and the rule by which one of them wins."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from padst_compile.autotune.effort import BUDGETS
from padst_compile.autotune.space import Candidate
from padst_compile.kernels.launch import Tile

MARGIN = 0.05
"""By what fraction a candidate must be faster than those before it; less is noise."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """One candidate and its median time in seconds."""

    candidate: Candidate
    seconds: float


@dataclasses.dataclass(frozen=True)
class Entry:
    """The result of one search.

    Args:
        effort: that it was made with.
        timings: of all that was measured, the default first.
        left_out: kernels that could not be measured, and why.
    """

    effort: Literal["quick", "full"]
    timings: tuple[Timing, ...]
    left_out: tuple[tuple[str, str], ...] = ()

    @property
    def default(self) -> Timing:
        """What would run without tuning."""
        return self.timings[0]

    @property
    def winner(self) -> Timing:
        """The first that is as fast as the fastest, by `MARGIN`: noise moves nobody away from the default."""
        return first_of_the_fastest(self.timings)

    def to_dict(self) -> dict[str, Any]:
        """JSON form, without the key."""
        candidates = [
            {
                "kernel": timing.candidate.kernel,
                "tile": None if timing.candidate.tile is None else dataclasses.asdict(timing.candidate.tile),
                "seconds": timing.seconds,
            }
            for timing in self.timings
        ]
        return {"effort": self.effort, "candidates": candidates, "left_out": dict(self.left_out)}

    @classmethod
    def from_dict(cls, data: Any) -> Entry:
        """Read the JSON form.

        Raises:
            ValueError, TypeError, KeyError: data that no search writes.
        """
        if data["effort"] not in BUDGETS or not data["candidates"]:
            raise ValueError("no effort that measures, or nothing measured")
        timings = tuple(_timing(candidate) for candidate in data["candidates"])
        return cls(data["effort"], timings, _reasons(data.get("left_out", {})))


def first_of_the_fastest(timings: tuple[Timing, ...]) -> Timing:
    """The first of some timings that is as fast as their fastest, by `MARGIN`."""
    fastest = min(timing.seconds for timing in timings)
    return next(timing for timing in timings if timing.seconds <= fastest * (1 + MARGIN))


def _timing(data: Any) -> Timing:
    seconds, kernel = data["seconds"], data["kernel"]
    if not isinstance(seconds, float) or not math.isfinite(seconds) or seconds <= 0:
        raise ValueError(f"{seconds!r} is no time")
    if not isinstance(kernel, str):
        raise TypeError(f"{kernel!r} is no kernel")
    return Timing(Candidate(kernel, None if data["tile"] is None else _tile(data["tile"])), seconds)


def _reasons(data: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(data, dict) or not all(isinstance(reason, str) for reason in data.values()):
        raise TypeError(f"{data!r} are no reasons")
    return tuple(data.items())


def _tile(data: Any) -> Tile:
    types = {"int": int, "str": str}  # annotations are strings here
    for field in dataclasses.fields(Tile):
        if type(data[field.name]) is not types[str(field.type)]:
            raise TypeError(f"{field.name} of a tile is {data[field.name]!r}")
    return Tile(**data)
