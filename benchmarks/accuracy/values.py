"""The rows of one task at one sparsity, by method and seed, and which method each one should beat."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from curves import at_time, ends_at
from statistics_of_seeds import Estimate, estimate, paired, separates

Row = dict[str, Any]
Values = dict[str, dict[int, float]]  # by method and seed


def groups(rows: Sequence[Row]) -> Iterator[tuple[str, float, list[Row]]]:
    """Task, sparsity and rows of each; the dense rows of a task belong to all its sparsities, and stand first."""
    for task, sparsity in sorted({(row["task"], row["sparsity"]) for row in rows}):
        members = [row for row in rows if row["task"] == task]
        dense = [row for row in members if row["method"] == "dense"]
        yield task, sparsity, dense + [row for row in members if row["method"] != "dense" and row["sparsity"] == sparsity]


def values_of(rows: Sequence[Row], read: Callable[[Row], float | None] = lambda row: row["value"]) -> Values:
    """A number of each row that has it; diverged ones have none."""
    found: Values = defaultdict(dict)
    for row in rows:
        value = read(row)
        if value is not None:
            found[row["method"]][row["seed"]] = value
    return dict(found)


def equal_time(rows: Sequence[Row]) -> tuple[float, Values] | None:
    """When the fastest method had ended, in seconds, and what every run was worth then; None if no row has curves."""
    ends = values_of(rows, lambda row: ends_at(row["curves"]) if "curves" in row else None)
    if not ends:
        return None
    seconds = min(estimate(list(found.values())).mean for found in ends.values())
    return seconds, values_of(rows, lambda row: at_time(row["curves"], seconds) if "curves" in row else None)


def control_of(method: str, values: Mapping[str, Any]) -> str | None:
    """The method that this one should beat: the same structure with a random permutation, with none, or fixed."""
    structure, _, permutation = method.partition(" ")
    wanted = {"static": None, "none": "static", "random": "none"}.get(permutation, "random") if permutation else None
    control = f"{structure} {wanted}"
    return control if wanted is not None and control in values else None


def against_control(method: str, values: Values) -> Estimate | None:
    """The difference of a method to its control, paired by seed."""
    control = control_of(method, values)
    return None if control is None else paired(values[method], values[control])


def verdicts(values: Values, metric: str) -> Iterator[tuple[str, bool | None]]:
    """Each fixed structure, and whether dense beats it by so much that the task tells methods apart; None: too few runs."""
    dense = list(values.get("dense", {}).values())
    for method, found in values.items():
        if method.endswith(" static"):
            enough = min(len(dense), len(found)) > 1
            lower = metric == "loss"
            yield method, separates(dense, list(found.values()), lower_is_better=lower) if enough else None


def in_words(found: Estimate, *, signed: bool = False) -> str:
    """A mean with its interval; a star where that excludes zero."""
    number = f"{found.mean:+.4f}" if signed else f"{found.mean:.4f}"
    if found.count < 2:
        return f"{number} (1 seed)"
    return f"{number} ± {found.half_width:.4f}" + (" *" if signed and found.excludes_zero else "")
