"""The curves of a run, short enough to be kept with its result, and what they say at a given time."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from padst_compile.recipes.run_folder import RunFolder

LOGGED = ("loss", "exploration", "penalty", "hardened")
_POINTS = 80
_DIGITS = 5

Curves = dict[str, dict[str, list[float]]]


def read_curves(folder: RunFolder, metric: str, clock: str = "seconds") -> Curves:
    """What a run wrote while it trained, finished or not.

    Args:
        folder: of the run.
        metric: of validation: "loss" or "accuracy".
        clock: which of a run's times count as seconds: "seconds" by the wall, or "processor_seconds".

    Returns:
        "logged" with lists of "step", "seconds" and those of `LOGGED` that were ever other than zero, at most some eighty
        points; "validated" with "step", "seconds" and "value".
    """
    seconds = {row["step"]: row[clock] for row in folder.timing.read()}
    rows = [{**row, "seconds": seconds[row["step"]]} for row in folder.metrics.read() if row["step"] in seconds]
    logged = [row for row in rows if "loss" in row]
    thinned = [row for place, row in enumerate(reversed(logged)) if place % (len(logged) // _POINTS + 1) == 0][::-1]
    kept = [name for name in LOGGED if any(row.get(name) for row in logged)]
    value = f"validation_{metric}"
    validated = [{**row, "value": row[value]} for row in rows if value in row]
    return {
        "logged": _columns(thinned, ("step", "seconds", *kept)),
        "validated": _columns(validated, ("step", "seconds", "value")),
    }


def _columns(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, list[float]]:
    return {name: [float(f"{row[name]:.{_DIGITS}g}") for row in rows] for name in names}


def ends_at(curves: Curves) -> float | None:
    """Seconds of training until the last validation; None if there was none."""
    seconds = curves["validated"]["seconds"]
    return seconds[-1] if seconds else None


def at_time(curves: Curves, seconds: float) -> float | None:
    """The validation metric after so many seconds, on the line between the validations around; None before the first."""
    points = list(zip(curves["validated"]["seconds"], curves["validated"]["value"], strict=True))
    if not points or seconds < points[0][0]:
        return None
    for (before, low), (after, high) in itertools.pairwise(points):
        if seconds < after:
            return low + (high - low) * (seconds - before) / (after - before)
    return points[-1][1]
