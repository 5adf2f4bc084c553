"""Curves of a run: loss, density, penalty and exploration over the steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from padst_compile.files import replace_file
from padst_compile.recipes.packages import require
from padst_compile.recipes.writing import writing

_PANELS = (
    ("loss", ("loss", "validation_loss")),
    ("accuracy", ("validation_accuracy",)),
    ("density", ("density",)),
    ("penalty of soft permutations", ("penalty",)),
    ("exploration", ("exploration",)),
    ("learning rate", ("lr",)),
)
_COLUMNS = 3
_PANEL_INCHES = (4.2, 3.0)


def draw_curves(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw what rows of metrics hold, one panel each for those of `_PANELS` that occur, as PNG.

    Raises:
        MissingPackageError: matplotlib is missing.
        RunFolderError: they cannot be written.
    """
    figure = require("matplotlib.figure", "drawing curves")
    present = {name for row in rows for name in row}
    panels = [(title, names) for title, names in _PANELS if present & set(names)]
    if not panels:
        return
    lines = -(-len(panels) // _COLUMNS)
    canvas = figure.Figure(figsize=(_PANEL_INCHES[0] * _COLUMNS, _PANEL_INCHES[1] * lines), layout="constrained")
    for place, (title, names) in enumerate(panels, 1):
        axes = canvas.add_subplot(lines, _COLUMNS, place, title=title, xlabel="step")
        for name in names:
            points = [(row["step"], row[name]) for row in rows if name in row]
            axes.plot(*zip(*points, strict=True), label=name.replace("_", " "), marker="." if len(points) == 1 else "")
        if len(names) > 1:
            axes.legend()
    with writing(path):
        replace_file(path, lambda draft: canvas.savefig(draft, format="png", dpi=110))
