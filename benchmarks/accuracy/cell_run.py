"""One cell of the study: trained, or found to diverge, and the row that is kept of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from curves import read_curves
from grid import Cell
from torch import nn

from padst_compile.conversion import sparse_layers
from padst_compile.errors import TrainingDivergedError
from padst_compile.recipes import TrainConfig, run
from padst_compile.recipes.run_folder import RunFolder
from padst_compile.recipes.trained import load_trained

Row = dict[str, Any]


def train_cell(cell: Cell, config: TrainConfig, path: Path) -> Row:
    """Train a cell in its folder, or go on with it.

    Returns:
        Its row; one whose loss ceases to be finite has no value, and "diverged". Seconds are of processor time where one
        thread trains, for that is hardly longer when others use the machine, too.
    """
    folder = RunFolder(path)
    clock = "processor_seconds" if config.threads == 1 and config.device == "cpu" else "seconds"
    torch.compiler.reset()  # or Dynamo, after as many models of one class as it allows, would no longer compile them
    try:
        result = run(config, path, prepare=_prepare(cell, path))
    except TrainingDivergedError:
        found: Row = {"value": None, "diverged": True}
    else:
        found = {
            "value": getattr(result.eager, cell.task.metric),
            "compiled_agrees": result.passed,
            "density": result.density,
            "seconds": folder.timing.read()[-1][clock],
        }
    return {
        "cell": cell.name,
        "task": cell.task.name,
        "metric": cell.task.metric,
        "method": cell.method.name,
        "sparsity": cell.sparsity,
        "seed": cell.seed,
        **found,
        "threads": config.threads,
        "curves": read_curves(folder, cell.task.metric, clock),
    }


def _prepare(cell: Cell, path: Path) -> Callable[[nn.Module], None] | None:
    """What gives a model the permutations that another cell learned; None for a cell that replays none."""
    if cell.source is None:
        return None
    runs = path.parents[cell.name.count("/")]
    learned = {name: layer.permutation for name, layer in sparse_layers(load_trained(runs / cell.source))}

    def keep(model: nn.Module) -> None:
        for name, layer in sparse_layers(model):
            layer.set_permutation(learned[name])

    return keep
