"""Entries of a list that hold for the length of a `with` block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def added(items: list[T], item: T) -> Iterator[None]:
    """Within this, `items` ends with `item`."""
    items.append(item)
    try:
        yield
    finally:
        items.remove(item)
