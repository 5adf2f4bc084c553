"""Tiles of launches that no choice between kernels has measured: those of layouts that are settled after it."""

from __future__ import annotations

import logging

import torch

from padst_compile.autotune.effort import Effort, measures
from padst_compile.autotune.finding import capturing
from padst_compile.autotune.search import Run, best_tile, launches_of

logger = logging.getLogger(__name__)


def tune_launches(run: Run, effort: Effort) -> None:
    """Measure the tiles of all launches of `run` that are not known; while a CUDA graph is captured, nothing is measured."""
    if not measures(effort) or capturing():
        return
    try:
        for launch in launches_of(run):
            best_tile(launch, run, effort)
    except torch.OutOfMemoryError:
        logger.warning("a product with activations in another layout is not tuned: the device is out of memory")
