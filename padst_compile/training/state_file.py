"""Files of `torch.save` that hold data: tensors, numbers, strings, and lists and dictionaries of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def read_state(path: Path, device: torch.device | str = "cpu") -> Any:
    """What a file holds, with its tensors on `device`; nothing in it is executed.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged, or holds something else.
    """
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # the unpickler raises whatever it stumbles over in a damaged file
        raise ValueError(str(error) or repr(error)) from error
