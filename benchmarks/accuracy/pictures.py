"""The pictures of the study: where each method ends, and how its runs got there."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from statistics_of_seeds import estimate
from values import Row, Values

_PANELS = (
    ("validated", "value", "step"),
    ("validated", "value", "seconds"),
    ("logged", "loss", "step"),
    ("logged", "loss", "seconds"),
    ("logged", "exploration", "step"),
    ("logged", "penalty", "step"),
    ("logged", "hardened", "step"),
)
_NAMES = {"loss": "training loss", "exploration": "weights ever active", "penalty": "penalty", "hardened": "hard permutations"}
_REFERENCES = ("dense", "rigl", "set")
_COLUMNS = 4


def picture_of_ends(values: Values, metric: str) -> str:
    """Every method's mean, interval and single runs, as HTML."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(8, 0.35 * len(values) + 1))
    for place, (method, found) in enumerate(values.items()):
        middle = estimate(list(found.values()))
        axis.errorbar(middle.mean, place, xerr=0 if middle.count < 2 else middle.half_width, fmt="o", color="C0")
        axis.plot(list(found.values()), [place] * len(found), ".", color="grey", alpha=0.6)
        axis.text(-0.01, place, method, ha="right", va="center", transform=axis.get_yaxis_transform())
    axis.set_yticks([])
    axis.invert_yaxis()
    axis.set_xlabel(f"validation {metric}")
    return _image(figure, "validation of each method")


def pictures_of_curves(rows: Sequence[Row], metric: str) -> Iterator[str]:
    """For each structure, loss by step and by time, exploration, penalty and hardening of its methods, as HTML."""
    drawn = [row for row in rows if "curves" in row]
    structures = dict.fromkeys(row["method"].partition(" ")[0] for row in drawn if " " in row["method"])
    for structure in structures:
        members = [row for row in drawn if row["method"].partition(" ")[0] in (*_REFERENCES, structure)]
        yield f"<h3>{structure}</h3>{_curves(members, metric)}"


def _curves(rows: Sequence[Row], metric: str) -> str:
    plt = _pyplot()
    methods = list(dict.fromkeys(row["method"] for row in rows))
    panels = [panel for panel in _PANELS if any(panel[1] in row["curves"][panel[0]] for row in rows)]
    lines = -(-len(panels) // _COLUMNS)
    figure, axes = plt.subplots(lines, _COLUMNS, figsize=(4 * _COLUMNS, 3 * lines), layout="constrained", squeeze=False)
    for axis, (part, name, by) in zip(axes.flat, panels, strict=False):
        for number, method in enumerate(methods):
            runs = [row["curves"][part] for row in rows if row["method"] == method and name in row["curves"][part]]
            if runs and runs[0][name]:
                axis.plot(*_mean(runs, by, name), color=f"C{number % 10}", linestyle="-" if number < 10 else "--", label=method)
        axis.set_title(_NAMES.get(name, f"validation {metric}"))
        axis.set_xlabel(by)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside right upper")
    return _image(figure, "curves of the runs")


def _mean(runs: Sequence[dict[str, list[float]]], by: str, name: str) -> tuple[Any, Any]:
    """The mean over the seeds, point by point, as far as all of them went."""
    points = min(len(run[name]) for run in runs)
    return tuple(np.mean([run[column][:points] for run in runs], axis=0) for column in (by, name))


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def _image(figure: Any, description: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90, bbox_inches="tight")
    _pyplot().close(figure)
    return f"<img alt='{description}' src='data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}'>"
