"""The identity of code that others registered, which caches must tell apart: they know structures and ops by name alone."""

from __future__ import annotations

import hashlib
import inspect
import secrets
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_OURS = __name__.partition(".")[0]
_WITHOUT_SOURCE = secrets.token_hex(8)  # code that cannot be read is the same in this process alone

_versions: dict[tuple[str, str], str] = {}


def record(what: str, name: str, owner: type) -> None:
    """Keep that `name`, a structure, pass or kernel, is the code of `owner` from now on."""
    _versions[what, name] = code_version(owner)


def version_of(name: str) -> str:
    """A hash over all code registered under a name; empty where there is none."""
    return _digest((*key, version) for key, version in sorted(_versions.items()) if key[1] == name)


def fingerprint() -> str:
    """A hash over all registered code; empty where there is none."""
    return _digest((*key, version) for key, version in sorted(_versions.items()))


def is_ours(owner: type) -> bool:
    """Whether a class belongs to this package."""
    return owner.__module__.partition(".")[0] == _OURS


def code_version(owner: type) -> str:
    """A hash over the files that a class and its bases come from, this package's aside.

    A module of a package stands for all of the package's files. What has no source, such as a class typed into an interpreter,
    is another one in each process.
    """
    digest = hashlib.sha256()
    for module in dict.fromkeys(base.__module__ for base in owner.__mro__):
        if module.partition(".")[0] not in (_OURS, "builtins", "abc", "typing"):
            digest.update(f"{owner.__qualname__}/{module}\0".encode() + _sources(owner, module))
    return digest.hexdigest()


def same_origin(a: type, b: type) -> bool:
    """Whether two classes are one definition that ran twice, as a cell of a notebook does."""
    return (a.__module__, a.__qualname__) == (b.__module__, b.__qualname__)


def _sources(owner: type, module: str) -> bytes:
    package = sys.modules.get(module.partition(".")[0])
    file = getattr(package, "__file__", None)
    if file is not None and Path(file).name == "__init__.py":
        return b"\0".join(path.read_bytes() for path in sorted(Path(file).parent.rglob("*.py")))
    return (_source_of(sys.modules.get(module)) or _source_of(owner) or _WITHOUT_SOURCE).encode()


def _source_of(what: Any) -> str | None:
    try:
        return inspect.getsource(what)
    except (OSError, TypeError):
        return None


def _digest(parts: Iterable[tuple[str, ...]]) -> str:
    listed = list(parts)
    return hashlib.sha256(repr(listed).encode()).hexdigest() if listed else ""
