"""Which residues stand for which floating tensor of two programs.

A claim about a rewrite is one about all weights, so what both sides share is random: tensors with the same memory, and
tensors with the same name and the same content (those of a deep copy). So a norm whose weights are all ones still tells a
permutation from none. What one side has alone (packed values, a folded bias) is mapped by value.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from padst_compile.equivalence import oracles
from padst_compile.equivalence.field import from_floats
from padst_compile.equivalence.residues import Residues


class Assignment:
    """Residues for tensors, by the memory they lie in: views of one tensor get views of the same residues.

    Args:
        before: named tensors of one side.
        after: named tensors of the other side.
        inputs: tensors that both sides receive.
        by_value: map even what is shared by value, except inputs.
    """

    def __init__(
        self,
        before: dict[str, torch.Tensor],
        after: dict[str, torch.Tensor],
        inputs: Iterable[torch.Tensor],
        *,
        by_value: bool = False,
    ) -> None:
        self._keys: dict[tuple[object, ...], str] = {}
        for number, tensor in enumerate(filter(torch.is_floating_point, inputs)):
            self._keys.setdefault(_memory(tensor), f"input {number}")
        if not by_value:
            for name, tensor, twin in _shared(before, after):
                key = self._keys.setdefault(_memory(tensor), name)
                self._keys.setdefault(_memory(twin), key)

    def residues(self, tensor: torch.Tensor, seed: int) -> torch.Tensor:
        """What stands for a tensor: residues for a floating one, else a copy that may be written to."""
        if not tensor.is_floating_point():
            return tensor.detach().clone()
        key = self._keys.get(_memory(tensor))
        if key is None:
            return Residues(from_floats(tensor.detach()), tensor.dtype)
        size = int(tensor.storage_offset()) + _extent(tensor)
        flat = oracles.random_residues(size, seed, key).to(tensor.device)
        return Residues(flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()), tensor.dtype)


def _shared(
    before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Name and tensors of what both sides have."""
    by_memory = {_memory(tensor): tensor for tensor in after.values()}
    for name, tensor in before.items():
        twin = by_memory.get(_memory(tensor), after.get(name))
        if twin is not None and tensor.is_floating_point() and (_memory(twin) == _memory(tensor) or _alike(tensor, twin)):
            yield name, tensor, twin


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    same_form = (one.dtype, one.shape, one.stride(), one.storage_offset()) == (
        other.dtype, other.shape, other.stride(), other.storage_offset(),
    )  # fmt: skip
    return same_form and one.device == other.device and torch.equal(one, other)


def _memory(tensor: torch.Tensor) -> tuple[object, ...]:
    """What two views of the same memory have in common."""
    if isinstance(tensor, torch._subclasses.FakeTensor) or tensor.untyped_storage().data_ptr() == 0:
        return (id(tensor),)
    return tensor.device, tensor.dtype, tensor.untyped_storage().data_ptr()


def _extent(tensor: torch.Tensor) -> int:
    """Entries from a tensor's first to its last in memory."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
