"""Whole tensors behind sharded ones (FSDP2): read all of it, write back what is ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from padst_compile.layers import PermutedSparseLinear


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full, plain tensor; gathers a sharded one, on all ranks together."""
    detached = tensor.detach()
    full: torch.Tensor = detached.full_tensor() if is_sharded(tensor) else detached  # type: ignore[attr-defined]  # DTensor
    return full


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of the tensor; asks no other rank."""
    detached = tensor.detach()
    own: torch.Tensor = detached.to_local() if is_sharded(tensor) else detached  # type: ignore[attr-defined]  # DTensor
    return own


def write(tensor: torch.Tensor, content: torch.Tensor) -> None:
    """Put `content`, the same on all ranks, into `tensor` in place; of a sharded one each rank writes its shard."""
    with torch.no_grad():
        tensor.copy_(shard_like(content.to(tensor.dtype), tensor))


def shard_like(content: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """`content`, the same on all ranks, sharded as `tensor` is; nothing is sent."""
    if not is_sharded(tensor):
        return content
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(content, tensor.device_mesh, tensor.placements, src_data_rank=None)  # type: ignore[attr-defined]  # DTensor


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether this is a DTensor; asks nothing of torch.distributed where that is not loaded."""
    return hasattr(tensor, "full_tensor") and hasattr(tensor, "placements")


def resharder(model: nn.Module) -> Callable[[], None]:
    """A function that makes every parameter of the model a sharded one again where FSDP2 has gathered it.

    A forward pass leaves the outermost module's parameters gathered, until the backward pass: as copies that no optimizer
    holds, under the names of the sharded ones. Where nothing is gathered, or nothing sharded, the function does nothing.
    """
    groups = _fsdp_modules(model)

    def reshard() -> None:
        for module in groups:
            module.reshard()

    return reshard


def not_of_fsdp(model: nn.Module, layers: Sequence[PermutedSparseLinear]) -> list[PermutedSparseLinear]:
    """Those of the layers, all with sharded values, that FSDP2 does not shard, or not alone; all ranks ask together.

    A mesh and its placements look alike whoever sharded. But what FSDP2 alone has sharded is a plain tensor while its module
    has gathered it, and anything else stays a DTensor. Modules are gathered one after the other, the innermost first.
    """
    rest = list(layers)
    for module in reversed(_fsdp_modules(model)):
        inside = [layer for layer in module.modules() if any(layer is other for other in rest)]
        if inside:
            module.unshard()
            gathered = [layer for layer in inside if not is_sharded(layer.values)]
            module.reshard()
            rest = [layer for layer in rest if not any(layer is other for other in gathered)]
    return rest


def _fsdp_modules(model: nn.Module) -> list[Any]:
    """The modules that `fully_shard` was called on, outer ones first."""
    return [module for module in model.modules() if hasattr(module, "reshard") and hasattr(module, "unshard")]
