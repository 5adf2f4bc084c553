"""Files that are either the old ones or the new ones, never half of one."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def make_private(folder: Path) -> None:
    """Create a folder, and those above it that are missing, for its owner alone, whatever the umask is.

    Raises:
        OSError: there is no place for it.
    """
    for missing in [above for above in reversed(folder.parents) if not above.exists()]:
        missing.mkdir(mode=0o700, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)


def replace_text(path: Path, text: str, *, private: bool = False) -> None:
    """Write `text` to `path`, replacing the file atomically; nothing is left behind where that fails.

    Args:
        path: the file.
        text: all of its content.
        private: whether its owner alone may read and write it; otherwise the umask decides.
    """
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=_prefix(path.name)) as folder:
        draft = Path(folder) / path.name
        draft.touch(mode=0o600 if private else 0o666)
        draft.write_text(text)
        draft.replace(path)


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Replace the file `path` atomically by what `write` puts at the path it is given, and keep it through a power failure.

    The content is on the disk before the name points to it, and the name before this returns. A process that is killed leaves
    the old file and perhaps a draft beside it, see `remove_drafts`.
    """
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=_prefix(path.name)) as folder:
        draft = Path(folder) / path.name
        write(draft)
        sync(draft)
        draft.replace(path)
    sync(path.parent)


def remove_drafts(path: Path) -> None:
    """Remove what killed processes left behind while they replaced the file `path`. Nobody may be writing it."""
    for folder in path.parent.glob(f"{_prefix(path.name)}*"):
        shutil.rmtree(folder, ignore_errors=True)


def sha256_of(path: Path) -> str:
    """The digest of a file's content, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _prefix(name: str) -> str:
    return f".{name}."


def sync(path: Path) -> None:
    """Return when the content of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
