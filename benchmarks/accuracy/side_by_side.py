"""Cells side by side in processes of their own, each with its share of the processor."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path

from cell_run import Row, train_cell
from grid import Cell

from padst_compile.recipes import TrainConfig

Job = tuple[Cell, TrainConfig, Path]


def train_side_by_side(jobs: Iterable[Job], workers: int, may_begin: Callable[[Cell], bool]) -> Iterator[Row]:
    """Train cells, as many at once as there are workers, and yield their rows as they end.

    Args:
        jobs: cells, with configurations and folders.
        workers: processes.
        may_begin: asked before each cell; after the first False none begins, and those that train are waited for.
    """
    allowed = itertools.takewhile(lambda job: may_begin(job[0]), jobs)
    running: set[Future[Row]] = set()
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent) as pool:
        while True:
            begun = itertools.islice(allowed, workers - len(running))
            running |= {pool.submit(train_cell, *job) for job in begun}
            if not running:
                return
            ended, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in ended)


def _end_with_parent() -> None:
    """A worker whose parent was killed would train on, in a folder that the next call wants."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
