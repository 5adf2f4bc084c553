"""Structures by name: the short strings of the command line and of graph nodes, and the JSON form."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from padst_compile.errors import SpecError, UnknownFieldError
from padst_compile.structures.base import Structure
from padst_compile.structures.block import Block
from padst_compile.structures.diagonal import Diagonal
from padst_compile.structures.nm import NM
from padst_compile.structures.unstructured import Unstructured

STRUCTURES: dict[str, type[Structure]] = {cls.kind: cls for cls in (Block, NM, Diagonal, Unstructured)}


@functools.cache
def parse(text: str) -> Structure:
    """Read `block:64`, `block:32x64`, `nm:2:4`, `nm:1:10:8`, `diagonal`, `diagonal:16` or `unstructured`.

    Raises:
        SpecError: unknown kind or wrong numbers.
    """
    kind, _, numbers = text.strip().lower().partition(":")
    try:
        return _build(kind, [int(number) for number in numbers.replace("x", ":").split(":")] if numbers else [])
    except (TypeError, ValueError) as error:
        if isinstance(error, SpecError):
            raise
        raise SpecError(
            f"cannot read structure {text!r}; "
            "write block:64, block:32x64, nm:2:4, nm:1:10:8, diagonal, diagonal:16 or unstructured"
        ) from error


def _build(kind: str, sizes: list[int]) -> Structure:
    if kind == Block.kind and len(sizes) in (1, 2):
        return Block(sizes[0] if len(sizes) == 1 else (sizes[0], sizes[1]))
    if kind == NM.kind:
        return NM(*sizes)
    if kind == Diagonal.kind:
        return Diagonal(*sizes)
    if kind == Unstructured.kind:
        return Unstructured(*sizes)
    if kind not in STRUCTURES:
        raise UnknownFieldError("structure", kind, STRUCTURES)
    raise ValueError(sizes)


def structure_from_dict(data: Mapping[str, Any]) -> Structure:
    """Read the JSON form back.

    Raises:
        SpecError: no or unknown kind, or unknown fields.
    """
    fields = dict(data)
    kind = fields.pop("kind", None)
    if not isinstance(kind, str) or kind not in STRUCTURES:
        raise UnknownFieldError("structure", str(kind), STRUCTURES)
    cls = STRUCTURES[kind]
    known = [field.name for field in dataclasses.fields(cls)]
    for name in fields:
        if name not in known:
            raise UnknownFieldError(f"field of structure {kind!r}", name, known)
    if isinstance(fields.get("size"), list):
        fields["size"] = tuple(fields["size"])
    try:
        return cls(**fields)
    except TypeError as error:
        raise SpecError(f"structure {kind!r} needs the fields {', '.join(known)}") from error
