"""What two programs returned, entry by entry."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree

from padst_compile.equivalence.field import from_floats
from padst_compile.equivalence.residues import Residues


@dataclasses.dataclass(frozen=True)
class Difference:
    """The first output in which two programs differ.

    Attributes:
        output: path to it, as in `['logits']`.
        reason: how it differs.
        entries: how many entries differ, if the shapes agree.
    """

    output: str
    reason: str
    entries: int = 0

    def __str__(self) -> str:
        return f"output{self.output}: {self.reason}"


def leaves(value: Any) -> dict[str, Any]:
    """The parts of an output by path. Containers are opened, and so are objects without a form of their own (caches)."""
    return dict(_walk("", value, ()))


def first_difference(before: dict[str, Any], after: dict[str, Any]) -> Difference | None:
    """The first part that differs, or None."""
    for path in [*before, *(path for path in after if path not in before)]:
        if path not in after or path not in before:
            return Difference(path, f"only {'before' if path in before else 'after'} has it")
        difference = _compare(path, before[path], after[path])
        if difference is not None:
            return difference
    return None


def _walk(path: str, value: Any, around: tuple[int, ...]) -> Iterator[tuple[str, Any]]:
    for keys, leaf in pytree.tree_leaves_with_path(value):
        place = path + pytree.keystr(keys)
        if _is_opaque(leaf) and id(leaf) not in around:
            yield from _walk(f"{place}<{type(leaf).__name__}>", dict(vars(leaf)), (*around, id(leaf)))
        else:
            yield place, leaf


def _is_opaque(leaf: Any) -> bool:
    return hasattr(leaf, "__dict__") and not isinstance(leaf, (torch.Tensor, type)) and not callable(leaf)


def _compare(path: str, before: Any, after: Any) -> Difference | None:
    if not (isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor)):
        same = type(before) is type(after) and (before is after or bool(before == after) or _is_opaque(before))
        return None if same else Difference(path, f"{before!r} became {after!r}")
    if before.shape != after.shape:
        return Difference(path, f"shape {list(before.shape)} became {list(after.shape)}")
    if before.dtype != after.dtype:
        return Difference(path, f"dtype {before.dtype} became {after.dtype}")
    wrong = _content(before) != _content(after).to(before.device)
    count = int(wrong.count_nonzero())
    if not count:
        return None
    first = wrong.nonzero()[0].tolist()
    return Difference(path, f"{count} of {wrong.numel()} entries differ, the first at {first}", count)


def _content(tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, Residues):
        return tensor.content
    return from_floats(tensor) if tensor.is_floating_point() else tensor
