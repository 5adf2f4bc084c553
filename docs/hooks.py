"""What mkdocs asks for while it builds: sources that it can read, and parts of README."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority

_ROOT = Path(__file__).resolve().parents[1]
_SCRIPT = "<!-- script of README -->"

_sources = tempfile.TemporaryDirectory(prefix="padst-docs-")


@event_priority(100)  # before mkdocstrings looks where the sources are
def on_config(config: Any) -> Any:
    """Give mkdocstrings a copy of the package without links, and with the `__init__.py` that `kernels/` must not have."""
    package = Path(_sources.name) / "padst_compile"
    shutil.copytree(_ROOT / "padst_compile", package, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    (package / "kernels" / "__init__.py").touch()
    config.plugins["mkdocstrings"].config["handlers"]["python"]["paths"] = [_sources.name]
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put README's program where a page asks for it."""
    return markdown.replace(_SCRIPT, _section("script")) if _SCRIPT in markdown else markdown


def _section(name: str) -> str:
    """What README has between two comments."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    found = (_ROOT / "README.md").read_text().partition(begin)[2].partition(end)[0]
    if not found.strip():
        raise ValueError(f"README.md has nothing between {begin} and {end}")
    return found
