"""Entries of a list that hold for the length of a `with` block, in the thread that runs it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias, TypeVar

T = TypeVar("T")
Entries: TypeAlias = list[tuple[threading.Thread, T]]


@contextmanager
def added(entries: Entries[T], item: T) -> Iterator[None]:
    """Within this, `present(entries)` ends with `item` in this thread."""
    entry = (threading.current_thread(), item)
    entries.append(entry)
    try:
        yield
    finally:
        entries.remove(entry)


def present(entries: Entries[T]) -> list[T]:
    """Those of this thread, the newest last.

    Threads that Python did not start, as autograd's for backward passes on a GPU, work for one that waits for them: they see
    all entries.
    """
    here = threading.current_thread()
    return [item for owner, item in [*entries] if owner is here or isinstance(here, threading._DummyThread)]
