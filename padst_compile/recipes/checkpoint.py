"""The state of an unfinished run in one file, which is the old one or the new one at any moment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from padst_compile.errors import RunFolderError
from padst_compile.files import replace_file
from padst_compile.recipes.writing import writing
from padst_compile.training.state_file import read_state

_VERSION = 1


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Replace the checkpoint at `path` by `state`: tensors, numbers, strings, and lists and dictionaries of them.

    Raises:
        RunFolderError: it cannot be written; the one before is still there.
    """
    with writing(path):
        replace_file(path, lambda draft: torch.save({"version": _VERSION, **state}, draft))


def load_checkpoint(path: Path, device: torch.device) -> dict[str, Any] | None:
    """The state in `path` with its tensors on `device`; None if there is no such file.

    Nothing in the file is executed: it is read with `weights_only=True`.

    Raises:
        RunFolderError: a file that is no checkpoint of ours, or not as it was written.
    """
    if not path.exists():
        return None
    try:
        state = read_state(path, device)
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path} cannot be read ({error}); delete it to start this run again") from error
    if not isinstance(state, dict) or state.pop("version", None) != _VERSION:
        raise RunFolderError(f"{path} is no checkpoint of version {_VERSION}; delete it to start this run again")
    return state
