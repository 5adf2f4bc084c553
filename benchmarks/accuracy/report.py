"""The study as one HTML page: means with intervals and paired differences, at equal steps and at equal time, and curves."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from pictures import picture_of_ends, pictures_of_curves
from statistics_of_seeds import estimate
from values import Row, Values, against_control, equal_time, groups, in_words, values_of, verdicts

from padst_compile.files import replace_text

_STYLE = (
    "body{font-family:sans-serif;max-width:80em;margin:2em auto}img{max-width:100%}"
    "td,th{padding:.2em .8em;text-align:right}td:first-child{text-align:left}"
)
_NOTE = (
    "Means with 95 % intervals over the seeds. The control of a learned permutation is the random one, that of a random one is "
    "none, that of none a fixed topology; differences are paired by seed, and a star marks those whose interval excludes zero. "
    "Time includes all phases of learning permutations, and validation."
)
_EQUAL_TIME = (
    "The columns on the right show where every run was when the fastest method ended, on the line between two validations; "
    "a slower one was in the middle of its schedule then."
)


def write_report(rows: Sequence[Row], path: Path) -> Path:
    """Write the page; the file is replaced atomically."""
    head = f"<!doctype html><meta charset=utf-8><title>Accuracy study</title><style>{_STYLE}</style><h1>Accuracy study</h1>"
    replace_text(path, "\n".join([head, *sections(rows)]) + "\n")
    return path


def sections(rows: Sequence[Row]) -> list[str]:
    """HTML of each task and sparsity."""
    return [_section(*group) for group in groups(rows)]


def _section(task: str, sparsity: float, rows: Sequence[Row]) -> str:
    metric, values = rows[0]["metric"], values_of(rows)
    equal = equal_time(rows)
    head = ["method", f"{metric}, equal steps", "against its control", "seeds", "density", "time", "compiled model agrees"]
    if equal is not None:
        head += [f"{metric} after {equal[0]:.0f} s", "against its control"]
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        members = [row for row in rows if row["method"] == method]
        cells = [method, *_compared(method, values), *_of_runs(members)]
        lines.append(_line("td", cells if equal is None else [*cells, *_compared(method, equal[1])]))
    return "".join(
        [
            f"<h2>{html.escape(task)}, {sparsity:.0%}</h2><p>{_verdict(values, metric)}</p>",
            picture_of_ends(values, metric) if values else "",
            f"<table>{_line('th', head)}{''.join(lines)}</table><p>{_NOTE}{'' if equal is None else ' ' + _EQUAL_TIME}</p>",
            *pictures_of_curves(rows, metric),
        ]
    )


def _compared(method: str, values: Values) -> list[str]:
    """The value of a method, and its difference to the control."""
    if method not in values:
        return ["", ""]
    difference = against_control(method, values)
    return [
        in_words(estimate(list(values[method].values()))),
        "" if difference is None else in_words(difference, signed=True),
    ]


def _of_runs(rows: Sequence[Row]) -> list[str]:
    """Seeds, density, time and agreement of one method's runs."""
    ended = [row for row in rows if row["value"] is not None]
    diverged = len(rows) - len(ended)
    seeds = f"{len(rows)}" + (f", {diverged} diverged" if diverged else "")
    if not ended:
        return [seeds, "", "", ""]
    density, seconds = (estimate([row[name] for row in ended]).mean for name in ("density", "seconds"))
    agree = all(row["compiled_agrees"] for row in ended)
    return [seeds, f"{density:.3f}", f"{seconds:.0f} s", "yes" if agree else "NO"]


def _line(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _verdict(values: Values, metric: str) -> str:
    found = dict(verdicts(values, metric))
    parts = [
        _named("The task tells: dense is better by more than two intervals than", [m for m, tells in found.items() if tells]),
        _named("It does not tell: dense is no two intervals better than", [m for m, tells in found.items() if tells is False]),
        _named("Too few runs to say:", [m for m, tells in found.items() if tells is None]),
    ]
    return " ".join(filter(None, parts)) or "No fixed structure to say by whether this task tells methods apart."


def _named(words: str, methods: Sequence[str]) -> str:
    return f"{words} {html.escape(', '.join(methods))}." if methods else ""
