"""The result of a search: known, measured now, or that of a like problem, whichever the effort allows."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from padst_compile.autotune.effort import Effort, measures, satisfies
from padst_compile.autotune.entry import Entry
from padst_compile.autotune.environment import environment
from padst_compile.autotune.keys import Key
from padst_compile.autotune.lookup import Found, library
from padst_compile.autotune.problem import LayerProblem, MlpProblem

logger = logging.getLogger(__name__)


def find(problem: LayerProblem | MlpProblem, measure: Callable[[], Entry], effort: Effort) -> Found | None:
    """What is known about a problem, after measuring it where that is wanted; None if nothing is.

    Args:
        problem: what is looked up.
        measure: the search; its result is kept.
        effort: see `Effort`. While a CUDA graph is captured, nothing is measured.
    """
    if effort == "off":
        return None
    key, results = Key(problem, environment(problem.device, problem.structure)), library()
    found = results.exact(key)
    if measures(effort) and not _good_enough(found, effort) and not capturing():
        try:
            found = _search(key, measure, effort)
        except torch.OutOfMemoryError:
            logger.warning("%s at %d tokens is not tuned: the device is out of memory", problem.structure, problem.tokens)
    return found or results.near(key)


def _search(key: Key, measure: Callable[[], Entry], effort: Effort) -> Found:
    """Measure, unless another process has done so while this one waited for its turn."""
    results = library()
    with results.cache.claim(key):
        found = results.exact(key, refresh=True)
        if found is not None and _good_enough(found, effort):
            return found
        entry = measure()
        results.cache.write(key, entry)
    return Found(entry, "tuned now", key.problem.tokens)


def _good_enough(found: Found | None, effort: Effort) -> bool:
    return found is not None and satisfies(found.entry.effort, effort)


def capturing() -> bool:
    """Whether a CUDA graph is being captured: a measurement would become part of it."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
