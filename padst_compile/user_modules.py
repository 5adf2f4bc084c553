"""Modules of a user that the `padst` command imports, so that one can name what they register: structures, kernels, models."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from padst_compile.errors import ModuleImportError


def import_modules(names: Iterable[str]) -> None:
    """Import modules by their dotted names: installed ones, or files of the current folder.

    Raises:
        ModuleImportError: no such module, or importing it fails; the message says which and why.
    """
    for name in names:
        _import(name)


def _import(name: str) -> None:
    if not re.fullmatch(r"\w+(\.\w+)*", name) or name.endswith(".py"):
        raise ModuleImportError(
            name, f"a module goes by its name: run padst in the folder of the file, with --import {Path(name).stem}"
        )
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # last: no file of the folder may hide a package
    importlib.invalidate_caches()
    try:
        importlib.import_module(name)
    except (Exception, SystemExit) as error:  # its code raises what it likes
        missing = isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}.")
        reason = f"no module of this name is installed or in {here}"
        if not missing:
            reason = f"it raises {type(error).__name__}: {error}; `python -c 'import {name}'` shows where"
        raise ModuleImportError(name, reason) from error
