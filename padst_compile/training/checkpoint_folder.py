"""A folder that holds one complete checkpoint at any moment, whenever the processes that write it are killed.

<folder>/current        the name of the complete one, replaced atomically
<folder>/data-<token>/  one checkpoint; any but the current one is a draft, or about to be deleted
<folder>/data-<token>/digests.json  sha256 of its files; in older ones, of those alone that say what the rest is
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path

from padst_compile.errors import CheckpointError
from padst_compile.files import remove_drafts, replace_file, sha256_of, sync

_PREFIX = "data-"
_NAME = re.compile(f"{_PREFIX}[0-9a-f]{{16}}")
_DIGESTS = "digests.json"
_REMEDY = "bring back a copy of the folder, or delete it and begin anew"


class CheckpointFolder:
    """See the module.

    Args:
        path: of the folder; need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pointer = path / "current"

    def current(self) -> Path:
        """The complete checkpoint.

        Raises:
            CheckpointError: there is none.
        """
        try:
            name = self._pointer.read_text()
        except OSError as error:
            raise CheckpointError(f"there is no checkpoint in {self.path} ({error.strerror}); save one first") from error
        except ValueError as error:
            raise CheckpointError(f"the checkpoint in {self.path} is damaged: {self._pointer.name} is no text") from error
        data = self.path / name
        if not _NAME.fullmatch(name) or not data.is_dir():
            raise CheckpointError(f"the checkpoint in {self.path} is damaged: it names {name!r}, which is not there")
        return data

    def checked(self, rank: int = 0, size: int = 1) -> Path:
        """The complete checkpoint, once its files are found to be as they were written; `size` ranks share them out.

        Raises:
            CheckpointError: there is none, or one of this rank's files is not.
        """
        data = self.current()
        try:
            digests = json.loads((data / _DIGESTS).read_text())
            own = sorted(digests.items())[rank::size]
            changed = [name for name, digest in own if sha256_of(data / name) != digest]
        except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
            raise CheckpointError(f"the checkpoint in {self.path} is damaged: {error}; {_REMEDY}") from error
        if changed:
            raise CheckpointError(f"the checkpoint in {self.path} is damaged: {changed[0]} is not as it was written; {_REMEDY}")
        return data

    def digests(self, name: str, pattern: str) -> dict[str, str]:
        """Of those files of a new checkpoint that match, for `seal`."""
        return {file.name: sha256_of(file) for file in sorted((self.path / name).glob(pattern))}

    def seal(self, name: str, digests: Mapping[str, str]) -> None:
        """Note the digests of the files of a new checkpoint, for `checked`."""
        (self.path / name / _DIGESTS).write_text(json.dumps(digests))
        sync(self.path / name / _DIGESTS)

    def begin(self) -> str:
        """Clear away what is not complete and make room for a new checkpoint: the name of its folder."""
        self.path.mkdir(parents=True, exist_ok=True)
        remove_drafts(self._pointer)
        self.clear()
        name = f"{_PREFIX}{secrets.token_hex(8)}"
        (self.path / name).mkdir()
        return name

    def publish(self, name: str) -> None:
        """Make the new checkpoint, whose files are on the disk, the current one, and delete the one before."""
        sync(self.path / name)
        replace_file(self._pointer, lambda draft: draft.write_text(name))
        self.clear()

    def clear(self) -> None:
        """Delete all checkpoints but the current one."""
        keep = None
        with contextlib.suppress(CheckpointError):
            keep = self.current()
        for data in self.path.glob(f"{_PREFIX}*"):
            if data != keep:
                shutil.rmtree(data)
