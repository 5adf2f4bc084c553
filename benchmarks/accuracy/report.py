"""The study as one HTML page: tables of means with intervals, paired differences, equal steps and equal time."""

from __future__ import annotations

import base64
import html
import io
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from statistics_of_seeds import Estimate, estimate, paired, separates

from padst_compile.files import replace_text

_STYLE = (
    "body{font-family:sans-serif;max-width:70em;margin:2em auto}"
    "td,th{padding:.2em .8em;text-align:right}td:first-child{text-align:left}"
)
_NOTE = (
    "Means with 95 % intervals over the seeds, at equal steps. The control of a learned permutation is the random one, that of "
    "a random one is none; differences are paired by seed, and a star marks those whose interval excludes zero. Time includes "
    "all phases of learning permutations."
)

Row = dict[str, Any]


def write_report(rows: Sequence[Row], path: Path) -> Path:
    """Write the page; the file is replaced atomically."""
    head = f"<!doctype html><meta charset=utf-8><title>Accuracy study</title><style>{_STYLE}</style><h1>Accuracy study</h1>"
    replace_text(path, "\n".join([head, *sections(rows)]) + "\n")
    return path


def sections(rows: Sequence[Row]) -> list[str]:
    """HTML of each task and sparsity."""
    groups: dict[tuple[str, float], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["task"], row["sparsity"]].append(row)
    found = []
    for (task, sparsity), members in sorted(groups.items()):
        dense = [row for row in rows if row["task"] == task and row["method"] == "dense"]
        others = [row for row in members if row["method"] != "dense"]
        found.append(_section(task, sparsity, dense + others))
    return found


def _section(task: str, sparsity: float, rows: Sequence[Row]) -> str:
    metric = rows[0]["metric"]
    by_method: dict[str, dict[int, Row]] = defaultdict(dict)
    for row in rows:
        by_method[row["method"]][row["seed"]] = row
    values = {method: {seed: row["value"] for seed, row in found.items()} for method, found in by_method.items()}
    lines = []
    for method, found in by_method.items():
        control = control_of(method, values)
        difference = None if control is None else paired(values[method], values[control])
        seconds = estimate([row["seconds"] for row in found.values()])
        density = estimate([row["density"] for row in found.values()])
        agree = all(row["compiled_agrees"] for row in found.values())
        cells = [
            method,
            in_words(estimate(list(values[method].values()))),
            "" if difference is None else in_words(difference, signed=True),
            f"{density.mean:.3f}",
            f"{seconds.mean:.0f} s",
            "yes" if agree else "NO",
        ]
        lines.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    head = "".join(
        f"<th>{name}</th>" for name in ("method", metric, "against its control", "density", "time", "compiled model agrees")
    )
    return (
        f"<h2>{html.escape(task)}, {sparsity:.0%}</h2><p>{_verdict(values)}</p>{_picture(values, metric)}"
        f"<table><tr>{head}</tr>{''.join(lines)}</table><p>{_NOTE}</p>"
    )


def control_of(method: str, values: dict[str, dict[int, float]]) -> str | None:
    """The method that this one should beat: the same structure with a random permutation, or with none."""
    structure, _, permutation = method.partition(" ")
    wanted = {"static": None, "none": "static", "random": "none"}.get(permutation, "random") if permutation else None
    control = f"{structure} {wanted}"
    return control if wanted is not None and control in values else None


def _verdict(values: dict[str, dict[int, float]]) -> str:
    fixed = next((method for method in values if method.endswith(" static")), None)
    if "dense" not in values or fixed is None or min(len(values["dense"]), len(values[fixed])) < 2:
        return "Too few runs to say whether this task tells methods apart."
    if separates(list(values["dense"].values()), list(values[fixed].values())):
        return f"The task tells: dense and {html.escape(fixed)} differ by more than two intervals."
    return f"The task does not tell: dense and {html.escape(fixed)} differ by less than two intervals."


def in_words(found: Estimate, *, signed: bool = False) -> str:
    """A mean with its interval; a star where that excludes zero."""
    number = f"{found.mean:+.4f}" if signed else f"{found.mean:.4f}"
    if found.count < 2:
        return f"{number} (1 seed)"
    return f"{number} ± {found.half_width:.4f}" + (" *" if signed and found.excludes_zero else "")


def _picture(values: dict[str, dict[int, float]], metric: str) -> str:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 0.35 * len(values) + 1))
    for place, (method, found) in enumerate(values.items()):
        middle = estimate(list(found.values()))
        axis.errorbar(middle.mean, place, xerr=0 if middle.count < 2 else middle.half_width, fmt="o", color="C0")
        axis.plot(list(found.values()), [place] * len(found), ".", color="grey", alpha=0.6)
        axis.text(-0.01, place, method, ha="right", va="center", transform=axis.get_yaxis_transform())
    axis.set_yticks([])
    axis.invert_yaxis()
    axis.set_xlabel(f"validation {metric}")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90, bbox_inches="tight")
    plt.close(figure)
    return f"<img src='data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}'>"
