"""Files that are either the old ones or the new ones, never half of one."""

from __future__ import annotations

import tempfile
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Write `text` to `path`, replacing the file atomically; nothing is left behind where that fails."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        draft = Path(folder) / path.name
        draft.write_text(text)
        draft.replace(path)
