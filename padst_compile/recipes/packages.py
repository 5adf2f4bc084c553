"""Optional packages, imported where they are needed."""

from __future__ import annotations

import importlib
from typing import Any

from padst_compile.errors import MissingPackageError


def require(module: str, purpose: str, package: str | None = None) -> Any:
    """The module `module`.

    Args:
        module: name to import.
        purpose: what needs it, as in "reading parquet files".
        package: its name for pip, where that is another.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = package or module.partition(".")[0]
        raise MissingPackageError(f"{purpose} needs {name}; pip install {name}, or padst_compile[train]") from error
