"""What the ranks of a data-parallel training must agree on: sums of scores, and decisions bit for bit."""

from __future__ import annotations

import torch
from torch import distributed


class World:
    """The ranks that train one model together; alone, every method returns at once.

    Args:
        group: process group of the ranks; None for the default one, if there is any.
    """

    def __init__(self, group: distributed.ProcessGroup | None = None) -> None:
        self.group = group

    @property
    def size(self) -> int:
        """Number of ranks."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return 1
        return distributed.get_world_size(self.group)

    def add_up(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of `tensor` over the ranks, in place."""
        if self.size > 1:
            distributed.all_reduce(tensor, group=self.group)
        return tensor

    def agree(self, decision: torch.Tensor) -> torch.Tensor:
        """The first rank's `decision` for all; every rank must bring one of the same shape and dtype."""
        if self.size == 1:
            return decision
        carried = decision.to(torch.uint8) if decision.dtype == torch.bool else decision.contiguous()
        distributed.broadcast(carried, group=self.group, group_src=0)
        return carried.to(decision.dtype)

    def any(self, happened: bool, device: torch.device) -> bool:
        """Whether something happened on some rank."""
        if self.size == 1:
            return happened
        return bool(self.add_up(torch.tensor([float(happened)], device=device)).item() > 0)
