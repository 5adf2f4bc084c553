"""Timing of alternatives side by side, so that a busy machine slows all of them alike."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from padst_compile.autotune.effort import Budget
from padst_compile.autotune.machine import cpu_cache_bytes

_DISTURBED = 1.5  # times slower than the fastest run is a median on a busy machine alone
_FLUSH = 2  # times the size of the cache
_LAUNCH_CYCLES = 400_000  # about 0.2 ms: longer than it takes to launch a product


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


def raced_medians(candidates: Mapping[Any, Callable[[], Any]], device: str, budget: Budget) -> dict[Any, float]:
    """Median seconds of every candidate with a cold cache, see `raced_samples`."""
    return {name: statistics.median(times) for name, times in raced_samples(candidates, device, budget).items()}


def raced_seconds(candidates: Mapping[Any, Callable[[], Any]], device: str, budget: Budget) -> dict[Any, float]:
    """The same for a decision: medians, or, where other processes disturb the race, the fastest runs.

    A disturbance only makes a run slower. On a busy machine it can hit more than half of the runs of one candidate, and so its
    median; hardly ever all of them.
    """
    samples = raced_samples(candidates, device, budget)
    medians = {name: statistics.median(times) for name, times in samples.items()}
    fastest = {name: min(times) for name, times in samples.items()}
    disturbed = any(medians[name] > _DISTURBED * fastest[name] for name in samples)
    return fastest if disturbed else medians


def raced_samples(candidates: Mapping[Any, Callable[[], Any]], device: str, budget: Budget) -> dict[Any, list[float]]:
    """Seconds of every run of every candidate with a cold cache, as a layer finds it after all others have run.

    Candidates take turns, and no round starts when the budget's time is over: large problems are measured once or twice, small
    ones as often as the budget allows.

    Args:
        candidates: what to run, by anything that tells them apart.
        device: type of the device that they run on.
        budget: how often, and for how long.
    """
    for run in candidates.values():
        run()  # allocations, compilation, threads
    samples: dict[Any, list[float]] = {name: [] for name in candidates}
    timer = _time_on_gpu if device == "cuda" else _time_once
    deadline = time.perf_counter() + budget.seconds
    for _ in range(budget.repetitions):
        for name, run in candidates.items():
            flush_cache(device)
            samples[name].append(timer(run))
        if time.perf_counter() > deadline:
            break
    return samples


def flush_cache(device: str) -> None:
    """Leave something else in the second-level caches than what a candidate reads."""
    _flush_buffer(device, torch.get_num_threads()).add_(1)


@functools.cache
def _flush_buffer(device: str, threads: int) -> torch.Tensor:
    gpu = device == "cuda"
    size = torch.cuda.get_device_properties().L2_cache_size if gpu else threads * cpu_cache_bytes()
    return torch.zeros(_FLUSH * size, dtype=torch.int8, device=device)


def _time_once(run: Callable[[], Any]) -> float:
    _synchronize()
    start = time.perf_counter()
    run()
    _synchronize()
    return time.perf_counter() - start


def _time_on_gpu(run: Callable[[], Any]) -> float:
    """Seconds on the GPU, which is kept busy until the CPU has launched everything: what a CUDA graph would take."""
    torch.cuda._sleep(_LAUNCH_CYCLES)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) * 1e-3


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
