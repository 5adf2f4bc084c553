"""Results of searches, kept between processes: one readable JSON file per problem in a folder.

A file is replaced atomically, so that a reader sees the old result or the new one, whoever is killed in between. Whoever
searches holds the problem's lock, which the system drops with the process. A file that cannot be read, or that belongs to
another problem, costs a warning and is replaced. What another version of this format wrote lies in another folder.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import filelock
import platformdirs

from padst_compile.autotune.entry import Entry
from padst_compile.autotune.keys import Key, relatives
from padst_compile.files import make_private, remove_drafts, replace_text

VERSION = 1
_LOCK_SECONDS = 600.0  # longer than a search takes
_MOST_TOKENS = 1 << 40  # more than anybody measures with, and few enough to reckon with


def cache_folder() -> Path:
    """Where this package keeps what it can make again: `PADST_CACHE_DIR`, else the user's cache folder."""
    return Path(os.environ.get("PADST_CACHE_DIR") or platformdirs.user_cache_dir("padst_compile"))


def results_folder() -> Path:
    """Where results of this version of the format are kept."""
    return cache_folder() / "tuning" / f"v{VERSION}"


class Cache:
    """The results in one folder. Whatever is wrong with the folder costs a warning, never an error."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[str, Entry] = {}
        self._unkept: set[str] = set()  # known in this process alone, where the folder cannot be written
        self._warned: set[str] = set()

    def read(self, key: Key) -> Entry | None:
        """The result for a key, or None."""
        name = key.name
        if name not in self._known:
            stored = self._load(self.folder / f"{name}.json")
            if stored is None:
                return None
            if stored[0] != key.to_dict():
                self._warn(name, f"{self.folder / name}.json is about another problem and will be replaced")
                return None
            self._known[name] = stored[1]
        return self._known[name]

    def refresh(self, key: Key) -> Entry | None:
        """The result for a key as it is in the folder now: another process may have stored a better one."""
        if key.name not in self._unkept:
            self._known.pop(key.name, None)
        return self.read(key)

    def write(self, key: Key, entry: Entry) -> None:
        """Store a result, in this process and, where that is possible, in the folder."""
        self._known[key.name] = entry
        text = json.dumps(stored_form(key.to_dict(), entry), indent=1)
        try:
            make_private(self.folder)
            replace_text(self.folder / f"{key.name}.json", text + "\n", private=True)
            self._unkept.discard(key.name)
        except OSError as error:
            self._unkept.add(key.name)
            self._warn("", f"measurements are not kept for the next run: {error}")

    def relatives(self, key: Key) -> Iterator[tuple[dict[str, Any], Entry]]:
        """Keys and results of the same layer at other numbers of tokens, or with another epilogue."""
        family = relatives(key.to_dict())
        for path in sorted(self.folder.glob(f"{key.family}_t*.json")):
            stored = self._load(path)
            if stored is not None and relatives(stored[0]) == family:
                yield stored

    def results_of(self, processor: str) -> Iterator[tuple[dict[str, Any], Entry]]:
        """Keys and results of everything that was measured on processors of a name."""
        for path in sorted(self.folder.glob("*.json")):
            stored = self._load(path)
            if stored is not None and stored[0]["environment"].get("processor") == processor:
                yield stored

    @contextmanager
    def claim(self, key: Key) -> Iterator[None]:
        """Hold a problem's lock, waiting for whoever holds it; without one where the folder has no place for locks.

        With the lock goes what a killed process left of a result that it wrote: nobody else is writing it.
        """
        with ExitStack() as held:
            try:
                locks = self.folder / "locks"
                make_private(locks)
                held.enter_context(filelock.FileLock(locks / f"{key.name}.lock", timeout=_LOCK_SECONDS, mode=0o600))
                remove_drafts(self.folder / f"{key.name}.json")
            except (OSError, NotImplementedError, filelock.Timeout) as error:
                self._warn("lock", f"other processes may measure the same: {error}")
            yield

    def _load(self, path: Path) -> tuple[dict[str, Any], Entry] | None:
        """Key and result in a file; None where there is none that makes sense."""
        try:
            return read_stored(json.loads(path.read_text()))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            self._warn(path.name, f"{path} is unusable and will be replaced: {error!r}")
            return None

    def _warn(self, about: str, message: str) -> None:
        """Say something once per file."""
        if about not in self._warned:
            self._warned.add(about)
            warnings.warn(message, stacklevel=2)


def stored_form(key: dict[str, Any], entry: Entry) -> dict[str, Any]:
    """JSON form of a result; `read_stored` reads it back."""
    return {"version": VERSION, "key": key, **entry.to_dict()}


def read_stored(data: Any) -> tuple[dict[str, Any], Entry]:
    """Key and result of one stored object.

    Raises:
        ValueError, TypeError, KeyError: data that this version does not write.
    """
    if data["version"] != VERSION:
        raise ValueError(f"version {data['version']!r}, not {VERSION}")
    key = data["key"]
    tokens, epilogue = key["problem"]["tokens"], key["problem"]["epilogue"]
    if type(tokens) is not int or not isinstance(epilogue, str) or not isinstance(key["environment"], dict):
        raise TypeError("no key")
    if not 0 <= tokens <= _MOST_TOKENS:
        raise ValueError(f"{tokens} tokens")
    entry = Entry.from_dict(data)
    first, names = entry.default.candidate, [timing.candidate.kernel for timing in entry.timings]
    wanted = [key["problem"]["kernel"]] if key["kind"] == "launch" else key["problem"]["kernels"]
    left_out = [name for name, _ in entry.left_out]
    if any(name not in wanted[1:-1] for name in left_out):
        raise ValueError(f"{', '.join(left_out)} cannot be left out of {', '.join(wanted)}")
    wanted = [name for name in wanted if name not in left_out]
    if first.tile is not None or list(dict.fromkeys(names)) != wanted:
        raise ValueError(f"measured {', '.join(names)}, not {', '.join(wanted)} from their defaults on")
    return key, entry


def write_shipped(path: Path, results: Iterable[tuple[dict[str, Any], Entry]]) -> int:
    """Write results as one file of the form that the package ships; returns how many there are."""
    forms = [stored_form(key, entry) for key, entry in results]
    replace_text(path, json.dumps(forms, indent=1) + "\n")
    return len(forms)


def read_shipped(folder: Path) -> Iterable[tuple[dict[str, Any], Entry]]:
    """Keys and results in the files of a folder, each a list of stored objects.

    Raises:
        ValueError, TypeError, KeyError: a file that this version does not write; the package ships none.
    """
    return [read_stored(data) for path in sorted(folder.glob("*.json")) for data in json.loads(path.read_text())]
