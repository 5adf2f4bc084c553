"""Files of `torch.save` that hold data: tensors, numbers, strings, and lists and dictionaries of them."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch


def read_state(path: Path, device: torch.device | str = "cpu") -> Any:
    """What a file holds, with its tensors on `device`; nothing in it is executed.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged, be it by one bit, or holds something else.
    """
    try:
        _check_sums(path)
        return torch.load(path, map_location=device, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # both raise whatever they stumble over in a damaged file
        raise ValueError(str(error) or repr(error)) from error


def _check_sums(path: Path) -> None:
    """Compare what torch wrote with the checksums beside it, which torch does not read."""
    with zipfile.ZipFile(path) as file:
        changed = file.testzip()
    if changed is not None:
        raise ValueError(f"{changed} is not as it was written")
