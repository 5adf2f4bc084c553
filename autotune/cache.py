"""Measurements kept between processes: one readable JSON file, replaced atomically, shared under a lock."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import filelock
import platformdirs

_VERSION = 1
_LOCK_SECONDS = 10.0


def cache_folder() -> Path:
    """Where this package keeps what it can make again: `PADST_CACHE_DIR`, else the user's cache folder."""
    return Path(os.environ.get("PADST_CACHE_DIR") or platformdirs.user_cache_dir("padst_compile"))


class JsonCache:
    """A dictionary of JSON values in a file. An unusable file costs a warning and a rebuild, never an error."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries: dict[str, Any] | None = None
        self._warned = False

    def get(self, key: str) -> Any | None:
        """The value stored under `key`, or None."""
        return self._current().get(key)

    def put(self, key: str, value: Any) -> None:
        """Store a value; what other processes stored in the meantime is kept."""
        self._current()[key] = value
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with filelock.FileLock(f"{self.path}.lock", timeout=_LOCK_SECONDS):
                entries = {**self._read(), key: value}
                self._write(entries)
        except (OSError, filelock.Timeout) as error:
            warnings.warn(f"measurements are not kept for the next run: {error}", stacklevel=2)

    def _current(self) -> dict[str, Any]:
        if self._entries is None:
            self._entries = self._read()
        return self._entries

    def _read(self) -> dict[str, Any]:
        try:
            data = json.loads(self.path.read_text())
            return _entries(data)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError, KeyError, TypeError) as error:
            if not self._warned:
                warnings.warn(f"{self.path} is unusable and will be rebuilt: {error!r}", stacklevel=2)
            self._warned = True
            return {}

    def _write(self, entries: dict[str, Any]) -> None:
        text = json.dumps({"version": _VERSION, "entries": entries}, indent=1, sort_keys=True)
        with tempfile.NamedTemporaryFile("w", dir=self.path.parent, suffix=".tmp", delete=False) as file:
            try:
                file.write(text)
                file.flush()
                Path(file.name).replace(self.path)
            except BaseException:
                Path(file.name).unlink()
                raise


def _entries(data: Any) -> dict[str, Any]:
    if data["version"] != _VERSION or not isinstance(data["entries"], dict):
        raise ValueError(f"version {data['version']!r}")
    return dict(data["entries"])
