"""The tile of each launch: what kernels are told when they ask, and how a search gets a word in.

This module is the chooser of `kernels/launch.py`. It looks up and never measures, so that it may run anywhere: in eager mode,
in compiled code, while a CUDA graph is captured.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from padst_compile.autotune.environment import environment
from padst_compile.autotune.keys import Key
from padst_compile.autotune.lookup import Found, library
from padst_compile.autotune.scoped import Entries, added, present
from padst_compile.autotune.space import is_algorithm
from padst_compile.kernels import launch
from padst_compile.kernels.launch import Chooser, Problem, Tile

_overrides: Entries[Chooser] = []
_known: dict[tuple[Problem, int, str | None], Tile | None] = {}


def tuned_tile(problem: Problem) -> Tile | None:
    """The best known tile of a launch, or None for the kernel's default."""
    if _overrides and (own := present(_overrides)):
        return own[-1](problem)
    # What a call pays for: the threads and the folder may change while the process runs.
    place = problem, torch.get_num_threads(), os.environ.get("PADST_CACHE_DIR")
    if place not in _known:
        _known[place] = _known_tile(problem)
    return _known[place]


def _known_tile(problem: Problem) -> Tile | None:
    found = find(launch_key(problem))
    tile = None if found is None else found.entry.winner.candidate.tile
    # An algorithm of a library was tried where it was measured, and may be wrong elsewhere.
    untried = found is not None and found.source == "nearest bucket"
    return None if untried and tile is not None and is_algorithm(tile) else tile


def find(key: Key) -> Found | None:
    """What is known about a problem without measuring."""
    return library().exact(key) or library().near(key)


def launch_key(problem: Problem) -> Key:
    """The key of a launch in this process."""
    return Key(problem, environment(device_of(problem)))


def device_of(problem: Problem) -> str:
    """The type of device that a launch is for."""
    return "cpu" if problem.device in ("", "cpu") else "cuda"


def forget() -> None:
    """Look everything up anew: something was measured."""
    _known.clear()


@contextmanager
def default_tiles() -> Iterator[None]:
    """Within this, every launch of this thread gets its default."""
    with added(_overrides, lambda problem: None):
        yield


@contextmanager
def given_tiles(tiles: Mapping[Problem, Tile | None]) -> Iterator[None]:
    """Within this, some launches of this thread get these tiles, all others their default; None is the default too."""
    with added(_overrides, tiles.get):
        yield


@contextmanager
def recorded() -> Iterator[list[Problem]]:
    """Within this, launches of this thread get their defaults; the list given collects their problems, each once, in order."""
    problems: dict[Problem, None] = {}
    found: list[Problem] = []

    def record(problem: Problem) -> None:
        if problem not in problems:
            problems[problem] = None
            found.append(problem)

    with added(_overrides, record):
        yield found


launch.set_chooser(tuned_tile)
