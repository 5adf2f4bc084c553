"""Whole tensors behind sharded ones (FSDP2): read all of it, write back what is ours."""

from __future__ import annotations

import torch


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full, plain tensor; gathers a sharded one, on all ranks together."""
    detached = tensor.detach()
    full: torch.Tensor = detached.full_tensor() if is_sharded(tensor) else detached  # type: ignore[attr-defined]  # DTensor
    return full


def write(tensor: torch.Tensor, content: torch.Tensor) -> None:
    """Put `content`, the same on all ranks, into `tensor` in place; of a sharded one each rank writes its shard."""
    with torch.no_grad():
        tensor.copy_(shard_like(content.to(tensor.dtype), tensor))


def shard_like(content: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """`content`, the same on all ranks, sharded as `tensor` is."""
    if not is_sharded(tensor):
        return content
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(content, tensor.device_mesh, tensor.placements)  # type: ignore[attr-defined]  # DTensor


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether this is a DTensor; asks nothing of torch.distributed where that is not loaded."""
    return hasattr(tensor, "full_tensor") and hasattr(tensor, "placements")
