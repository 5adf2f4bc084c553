"""Whether a tensor has changed since it was last looked at, as far as PyTorch counts writes; nothing on the device is read."""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef


class TensorState:
    """Version counter and memory of a tensor, as they were.

    The weak reference keeps the storage's identity, though not its memory, from being given to another storage: memory that
    was freed and taken again at the same address (`model.half().float()`) is told apart.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._storage = StorageWeakRef(tensor.untyped_storage())
        self._token = _token(tensor)

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether the same tensor, given again, was not written to; always False for one made in inference mode."""
        return _token(tensor) == self._token


def _token(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Changes with every write that autograd would notice, and with the memory behind the tensor."""
    # A tensor made in inference mode counts no writes: never the same twice.
    version = object() if tensor.is_inference() else tensor._version
    return version, tensor.data_ptr(), tensor.untyped_storage()._cdata
