"""Structures by name: the short strings of the command line and of graph nodes, and the JSON form."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import torch

from padst_compile import registered
from padst_compile.errors import NameTakenError, RegistrationError, SpecError, UnknownFieldError
from padst_compile.structures.base import UNIT_METHODS, Structure
from padst_compile.structures.block import Block
from padst_compile.structures.diagonal import Diagonal
from padst_compile.structures.nm import NM
from padst_compile.structures.unstructured import Unstructured

STRUCTURES: dict[str, type[Structure]] = {cls.kind: cls for cls in (Block, NM, Diagonal, Unstructured)}

S = TypeVar("S", bound=Structure)

_BUILT_IN = frozenset(STRUCTURES)
_RESERVED = ("dense", "none")
_EXAMPLES = "block:64, block:32x64, nm:2:4, nm:1:10:8, diagonal, diagonal:16, unstructured"
# What a layer has besides its index tensors, which are attributes of it, too.
_ATTRIBUTES = (
    "active", "bias", "config", "dense_weight", "density", "exchanges", "gate", "in_features", "out_features", "permutation",
    "set_permutation", "soft", "topology", "values", "weight",
)  # fmt: skip


def register_structure(cls: type[S]) -> type[S]:
    """Make a structure of your own known: by its name, in JSON, to `sparsify`, the compiler and training. A decorator.

    Args:
        cls: a frozen dataclass that implements `padst_compile.structures.Structure`.

    Returns:
        The class itself.

    Raises:
        NameTakenError: another structure has its `kind`. The same class defined again, as in a notebook, replaces itself.
        RegistrationError: it lacks part of the interface; the message says which.
    """
    _check_interface(cls)
    known = STRUCTURES.get(cls.kind)
    if cls.kind in _RESERVED or (known is not None and not registered.same_origin(known, cls)):
        owner = "this package" if cls.kind in (*_BUILT_IN, *_RESERVED) else repr(known)
        raise NameTakenError(f"structure {cls.kind!r}: the name belongs to {owner}; choose another kind")
    STRUCTURES[cls.kind] = cls
    registered.record("structure", cls.kind, cls)
    parse.cache_clear()
    return cls


def check_registered(structure: Structure) -> None:
    """Refuse a structure that graphs and files could not name.

    Raises:
        RegistrationError: its class is not registered, or its short form or JSON form does not give it back.
    """
    cls = type(structure)
    if cls.kind in _BUILT_IN and STRUCTURES[cls.kind] is cls:
        return
    if STRUCTURES.get(cls.kind) is not cls:
        raise RegistrationError(f"{cls.__name__} is not registered; put @padst.register_structure above the class")
    form = json.dumps(structure.to_dict())
    for text, back in ((structure.to_string(), parse(structure.to_string())), (form, structure_from_dict(json.loads(form)))):
        if back != structure:
            raise RegistrationError(f"{structure!r} writes itself as {text}, which reads back as {back!r}")


@functools.cache
def parse(text: str) -> Structure:
    """Read `block:64`, `block:32x64`, `nm:2:4`, `nm:1:10:8`, `diagonal`, `diagonal:16`, `unstructured` or a registered name.

    Raises:
        SpecError: unknown kind or wrong numbers.
    """
    kind, _, numbers = text.strip().lower().partition(":")
    if kind not in STRUCTURES:
        raise UnknownFieldError("structure", kind, STRUCTURES)
    try:
        return STRUCTURES[kind].from_sizes([int(number) for number in numbers.replace("x", ":").split(":")] if numbers else [])
    except (TypeError, ValueError) as error:
        if isinstance(error, SpecError):
            raise
        names = ", ".join((_EXAMPLES, *sorted(f"{name}:…" for name in STRUCTURES.keys() - _BUILT_IN)))
        raise SpecError(f"cannot read structure {text!r}; write one of {names}") from error


def _check_interface(cls: type[Structure]) -> None:
    problem = _problem(cls)
    if problem is not None:
        raise RegistrationError(f"{getattr(cls, '__name__', repr(cls))} is no structure that can be registered: {problem}")


def _problem(cls: Any) -> str | None:
    """What keeps a class from being a structure, or None."""
    if not (isinstance(cls, type) and issubclass(cls, Structure)):
        return "it must be a subclass of padst_compile.structures.Structure"
    if "__dataclass_params__" not in cls.__dict__ or not cls.__dict__["__dataclass_params__"].frozen:
        return "it must be a @dataclasses.dataclass(frozen=True), below @padst.register_structure"
    kind, names = getattr(cls, "kind", None), getattr(cls, "index_names", None)
    if not isinstance(kind, str) or not re.fullmatch("[a-z][a-z0-9_]*", kind):
        return f"kind must be a name in lower case, got {kind!r}"
    if not isinstance(names, tuple) or not names or len(set(names)) < len(names):
        return f"index_names must list its index tensors, at least one, got {names!r}"
    for name in names:
        if not isinstance(name, str) or not name.isidentifier() or name in _ATTRIBUTES or hasattr(torch.nn.Module, name):
            return f"{name!r} cannot name an index tensor, which becomes an attribute of the layer"
    return _missing(cls)


def _missing(cls: type[Structure]) -> str | None:
    """The methods that a structure does not define, or None."""
    missing = set(cls.__abstractmethods__)
    if cls.choose is Structure.choose or cls.has_units():
        missing |= {name for name in UNIT_METHODS if getattr(cls, name) is getattr(Structure, name)}
    if not missing:
        return None
    without_units = missing <= set(UNIT_METHODS)
    return f"it does not define {', '.join(sorted(missing))}" + (
        ", and no choose, which needs no units" if without_units else ""
    )


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
