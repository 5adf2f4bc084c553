"""Copies of this package with other sources: what another version of it does beside this one."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def copy_package(folder: Path) -> Path:
    """Copy the package into a folder; returns the copy. A process whose `PYTHONPATH` is the folder imports it."""
    package = folder / _PACKAGE.name
    shutil.copytree(_PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    return package


def edit(file: Path, old: str, new: str) -> None:
    """Replace what occurs once in a file.

    Raises:
        ValueError: it does not occur exactly once.
    """
    text = file.read_text()
    if text.count(old) != 1:
        raise ValueError(f"{old!r} occurs {text.count(old)} times in {file}")
    file.write_text(text.replace(old, new))


def leave_schemas_alone(package: Path, panel_tokens: int) -> None:
    """Replace a copy's C++ kernels by the names of their operators, which compile quickly and support no dtype.

    Args:
        package: the copy.
        panel_tokens: what the operator of that name answers, and others that return a number, to tell one library from another.
    """
    kernels = package / "kernels" / "native"
    library = kernels / "library.cpp"
    schemas, _, _ = library.read_text().partition("TORCH_LIBRARY_IMPL")
    schemas = schemas.replace('#include "kernels.h"', "")
    schemas = re.sub(r'(\(\) -> int", )&padst::\w+', rf"\1[]() -> int64_t {{ return {panel_tokens}; }}", schemas)
    schemas = re.sub(r"&padst::\w+", "[](at::ScalarType) { return false; }", schemas)
    for source in [*kernels.glob("*.cpp"), *kernels.glob("*.h")]:
        source.unlink()
    library.write_text(schemas)
