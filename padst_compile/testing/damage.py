"""Hypothesis strategies for what nobody should write: any JSON, and files in which a few places are wrong."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

NUMBERS = st.integers() | st.sampled_from([0, -1, 2**31 - 1, 2**31, 2**63, 10**30, 10**400])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def mutated(draw: st.DrawFn, base: Any) -> Any:
    """A JSON value with one to three places replaced, removed or added."""
    value = copy.deepcopy(base)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(value))
        if not places:
            return draw(JSON)
        inner, key = draw(st.sampled_from(places))
        action = draw(st.sampled_from(["replace", "remove", "add"]))
        if action == "replace":
            inner[key] = draw(JSON)
        elif action == "remove":
            del inner[key]
        elif isinstance(inner, dict):
            inner[draw(st.text(max_size=8))] = draw(JSON)
        else:
            inner.insert(key, draw(JSON))
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from _places(inner)


@st.composite
def mutated_bytes(draw: st.DrawFn, base: bytes) -> bytes:
    """Other bytes: one to three places of `base` overwritten, removed or with something put in, or cut short."""
    content = base
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        new = draw(st.binary(min_size=1, max_size=4))
        action = draw(st.sampled_from(["overwrite", "insert", "remove", "cut"]))
        kept = {"overwrite": at + len(new), "insert": at, "remove": at + len(new)}.get(action, len(content))
        content = content[:at] + (new if action in ("overwrite", "insert") else b"") + content[kept:]
    return content
