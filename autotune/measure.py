"""Timing of alternatives side by side, so that a busy machine slows all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


def interleaved_medians(
    candidates: Mapping[str, Callable[[], Any]], *, repetitions: int, warmup: int = 1, progress: Callable[[], Any] | None = None
) -> dict[str, float]:
    """Median seconds of every candidate; in each round every candidate runs once.

    Args:
        candidates: what to run, by name.
        repetitions: timed rounds.
        warmup: rounds before them.
        progress: called after every round.
    """
    samples = interleaved_samples(candidates, repetitions=repetitions, warmup=warmup, progress=progress)
    return {name: statistics.median(times) for name, times in samples.items()}


def interleaved_samples(
    candidates: Mapping[str, Callable[[], Any]], *, repetitions: int, warmup: int = 1, progress: Callable[[], Any] | None = None
) -> dict[str, list[float]]:
    """Seconds of every run of every candidate, see `interleaved_medians`."""
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for round_number in range(warmup + repetitions):
        for name, run in candidates.items():
            seconds = _time_once(run)
            if round_number >= warmup:
                samples[name].append(seconds)
        if progress is not None:
            progress()
    return samples


def _time_once(run: Callable[[], Any]) -> float:
    _synchronize()
    start = time.perf_counter()
    run()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
