"""One search: tiles of each launch first, then the kernels of the layer, with those tiles, against each other."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

import torch

from padst_compile.autotune.cost_model import ranked
from padst_compile.autotune.effort import BUDGETS, Budget, Effort, satisfies
from padst_compile.autotune.entry import Entry, Timing
from padst_compile.autotune.facts import compiled_facts
from padst_compile.autotune.lookup import library
from padst_compile.autotune.machine import Machine, machine
from padst_compile.autotune.measure import raced_seconds
from padst_compile.autotune.problem import Kernel, LayerProblem
from padst_compile.autotune.space import Candidate, FactsOf, is_algorithm, no_facts, tiles_of, why_not, without_waste
from padst_compile.autotune.tiles import default_tiles, device_of, forget, given_tiles, launch_key, recorded
from padst_compile.errors import first_line
from padst_compile.kernels.launch import Problem, Tile

logger = logging.getLogger(__name__)

Run: TypeAlias = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Checked:
    """A run of what others wrote.

    Args:
        run: what is timed.
        trial: what is run once before, and raises where the results are wrong.
    """

    run: Run
    trial: Run

    def __call__(self) -> None:
        """The run."""
        self.run()


def tune_layer(problem: LayerProblem, runs: Mapping[Kernel, Run], effort: Effort) -> Entry:
    """Measure all ways to run a layer.

    Args:
        problem: the layer.
        runs: the product, and its gradients while training, by kernel: each of `problem.kernels`.
        effort: "quick" or "full".

    Returns:
        The times: of each sparse kernel with its default tiles, then with the best ones where these are others; last, dense.
        Sparse kernels besides the default may fail, and are left out then.
    """
    candidates: dict[Candidate, Run] = {}
    left_out: list[tuple[str, str]] = []
    for kernel in problem.kernels:
        reason = None if kernel in (problem.kernels[0], "dense") else _failure(_within(default_tiles, runs[kernel]))
        if reason is not None:
            left_out.append((kernel, reason))
            continue
        launches = [] if kernel == "dense" else launches_of(runs[kernel])
        best = {launch: best_tile(launch, runs[kernel], effort) for launch in launches}
        candidates[Candidate(kernel)] = _within(default_tiles, runs[kernel])
        if any(best.values()):
            first, tile = next(iter(best.items()))
            candidates[Candidate(kernel, tile or tiles_of(first)[0])] = _with_tiles(best, runs[kernel])
    return dataclasses.replace(measured(candidates, problem.device, effort), left_out=tuple(left_out))


def launches_of(run: Run) -> list[Problem]:
    """The tunable launches of one run, in order."""
    with recorded() as problems:
        run()
    return problems


def worth_measuring(
    problem: Problem, tiles: tuple[Tile, ...], budget: Budget, on: Machine, facts: FactsOf = no_facts
) -> list[Tile]:
    """The tiles to measure: the default, then those that the cost model likes best and that compile well.

    Algorithms of a library, of which the model knows nothing, are all measured: none of them has to be compiled.
    """
    default, *others = tiles
    chosen: list[Tile] = []
    order = ranked(problem, without_waste(problem, others), on)
    if budget.tiles is None:
        facts = _asked_at_once(problem, order, facts)
    for tile in order:
        few = budget.tiles is not None and not is_algorithm(tile)
        if few and (len(chosen) == budget.tiles or _size(tile) in map(_size, chosen)):
            continue  # where few are measured, they should differ in more than the model can tell
        known = facts(problem, tile)
        reason = None if known is None else why_not(known, on, tile)
        if reason is None:
            chosen.append(tile)
        else:
            logger.debug("%s: %s is left out: %s", problem.kernel, tile, reason)
    # In the order of the space, whatever the model thinks: a tie between two of them is broken the same way ever after.
    return [default, *(tile for tile in others if tile in chosen)]


def _asked_at_once(problem: Problem, tiles: Sequence[Tile], facts: FactsOf) -> FactsOf:
    """The same answers, from as many threads as there are cores: compilers let go of Python's lock."""
    with ThreadPoolExecutor() as pool:
        known = dict(zip(tiles, pool.map(functools.partial(facts, problem), tiles), strict=True))
    return lambda problem, tile: known[tile]


def _size(tile: Tile) -> tuple[int, int, int]:
    return tile.tokens, tile.outputs, tile.depth


def best_tile(launch: Problem, run: Run, effort: Effort) -> Tile | None:
    """The tile to use for a launch, None for its default; measured unless it was before."""
    key, results = launch_key(launch), library()
    with results.cache.claim(key):
        found = results.exact(key, refresh=True)
        if found is not None and satisfies(found.entry.effort, effort):
            return found.entry.winner.candidate.tile
        device = device_of(launch)
        default, *others = worth_measuring(launch, tiles_of(launch), BUDGETS[effort], machine(device), compiled_facts)
        candidates = {Candidate(launch.kernel): _with_tiles({launch: default}, run)}
        for tile in others:
            candidates[Candidate(launch.kernel, tile)] = _with_tiles({launch: tile}, run)
        entry = measured(candidates, device, effort)
        results.cache.write(key, entry)
    forget()
    return entry.winner.candidate.tile


def measured(candidates: Mapping[Candidate, Run], device: str, effort: Effort) -> Entry:
    """The times of those candidates that run; what has no tile of its own must. The first is the default."""
    usable = {name: run for name, run in candidates.items() if name.tile is None or _runs(name, run)}
    seconds = raced_seconds(usable, device, BUDGETS[effort])
    assert effort in ("quick", "full")
    return Entry(effort, tuple(Timing(candidate, seconds[candidate]) for candidate in usable))


def _failure(run: Run) -> str | None:
    """The beginning of what a kernel raises on this device, or None."""
    try:
        _trial(run)()
    except torch.OutOfMemoryError:  # says nothing about the kernel
        raise
    except Exception as error:  # libraries and drivers raise what they like
        return first_line(error)
    return None


def _trial(run: Run) -> Run:
    return run.trial if isinstance(run, Checked) else run


def _runs(candidate: Candidate, run: Run) -> bool:
    """Whether a candidate can be launched: a tile may need more of the device than it has."""
    try:
        _trial(run)()
    except Exception as error:  # compilers and drivers raise what they like
        logger.debug("%s is left out: %s", candidate, error)
        return False
    return True


def _with_tiles(tiles: Mapping[Problem, Tile | None], run: Run) -> Run:
    return _within(lambda: given_tiles(tiles), run)


def _within(context: Callable[[], AbstractContextManager[None]], run: Run) -> Run:
    if isinstance(run, Checked):
        return Checked(_within(context, run.run), _within(context, run.trial))

    def once() -> None:
        with context():
            run()

    return once
