"""How long one launch takes with its best tile: measured, or known, to compare layouts that it may have."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from padst_compile.autotune.effort import Effort, measures
from padst_compile.autotune.finding import capturing
from padst_compile.autotune.search import Run, best_tile
from padst_compile.autotune.tiles import find, launch_key
from padst_compile.kernels.launch import Problem

logger = logging.getLogger(__name__)


def launch_seconds(launch: Problem, make_run: Callable[[], Run], effort: Effort) -> float | None:
    """The time of a launch with the tile that it will get, or None where nothing is known of it.

    Args:
        launch: the problem.
        make_run: makes what does this launch alone; called for measuring, which nothing does while a CUDA graph is captured.
        effort: see `Effort`.
    """
    if effort == "off":
        return None
    if measures(effort) and not capturing():
        try:
            best_tile(launch, make_run(), effort)
        except torch.OutOfMemoryError:
            logger.warning("%s %s is not tuned: the device is out of memory", launch.structure, launch.layout)
    found = find(launch_key(launch))
    return None if found is None else found.entry.winner.seconds
