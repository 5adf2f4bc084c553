"""Where an answer comes from: this user's measurements, those that the package ships, or a like problem's."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypeAlias

from padst_compile.autotune.cache import Cache, read_shipped, results_folder
from padst_compile.autotune.entry import Entry
from padst_compile.autotune.keys import Key, anywhere, relatives

Source: TypeAlias = Literal["tuned now", "cached", "shipped", "nearest bucket", "cost model", "asked for"]

SHIPPED = Path(__file__).parent / "configs"
"""Results of real runs, by device; whoever adds one names the device in the file's name."""

_FARTHEST = 3  # buckets, which are powers of two: beyond, another number of tokens says little


@dataclasses.dataclass(frozen=True)
class Found:
    """A result, where it comes from, and the number of tokens that it was measured with."""

    entry: Entry
    source: Source
    tokens: int


class Library:
    """All results that are known without measuring.

    Args:
        cache: this user's.
        shipped: folder of the package's.
    """

    def __init__(self, cache: Cache, shipped: Path) -> None:
        self.cache = cache
        self._shipped_folder = shipped

    def exact(self, key: Key, *, refresh: bool = False) -> Found | None:
        """The result for the very problem: measured here, else shipped for a device of this name.

        Args:
            key: the problem.
            refresh: whether to look for what another process stored since.
        """
        own = self.cache.refresh(key) if refresh else self.cache.read(key)
        if own is not None:
            return Found(own, "cached", key.problem.tokens)
        wanted = anywhere(key.to_dict())
        shipped = next((entry for stored, entry in self._shipped if anywhere(stored) == wanted), None)
        return None if shipped is None else Found(shipped, "shipped", key.problem.tokens)

    def near(self, key: Key) -> Found | None:
        """The result of the same layer at the nearest number of tokens; among equals, with the same epilogue."""
        family = relatives(anywhere(key.to_dict()))
        shipped = [(stored, entry) for stored, entry in self._shipped if relatives(anywhere(stored)) == family]
        known = [*self.cache.relatives(key), *shipped]
        return _nearest(key, known)

    @functools.cached_property
    def _shipped(self) -> tuple[tuple[dict[str, Any], Entry], ...]:
        return tuple(read_shipped(self._shipped_folder))


def library() -> Library:
    """The results in the present cache folder, and those in the package."""
    return _library(str(results_folder()), str(SHIPPED))


@functools.cache
def _library(folder: str, shipped: str) -> Library:
    return Library(Cache(Path(folder)), Path(shipped))


def _nearest(key: Key, known: Iterable[tuple[dict[str, Any], Entry]]) -> Found | None:
    def distance(stored: dict[str, Any]) -> tuple[float, bool]:
        problem = stored["problem"]
        buckets = abs(math.log2(max(problem["tokens"], 1) / max(key.problem.tokens, 1)))
        return buckets, problem["epilogue"] != key.problem.epilogue

    best = min(known, key=lambda item: distance(item[0]), default=None)
    if best is None or distance(best[0])[0] > _FARTHEST:
        return None
    return Found(best[1], "nearest bucket", best[0]["problem"]["tokens"])
