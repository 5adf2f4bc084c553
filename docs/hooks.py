"""What mkdocs asks for while it builds: sources that it can read, and README's measurements."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority

_ROOT = Path(__file__).resolve().parents[1]
_HERE, _STUDY = "<!-- figures of README -->", "<!-- accuracy study of README -->"
_BEGIN, _END = "<!-- figures -->", "<!-- /figures -->"

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
    """Put README's section of figures, which is generated from recorded results, or a part of it, where a page asks for it."""
    if _HERE not in markdown and _STUDY not in markdown:
        return markdown
    figures = (_ROOT / "README.md").read_text().partition(_BEGIN)[2].partition(_END)[0]
    if not figures.strip():
        raise ValueError(f"README.md has nothing between {_BEGIN} and {_END}")
    _, accuracy, study = figures.partition("**Accuracy, ")
    return markdown.replace(_HERE, figures).replace(_STUDY, accuracy + study)
