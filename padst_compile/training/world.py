"""What the ranks of a data-parallel training must agree on: sums of scores, and decisions bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import distributed


class World:
    """The ranks that train one model together; alone, every method returns at once.

    Every method is a collective: all ranks call the same ones in the same order. The runtime does so between the backward pass,
    whose own collectives have been issued then, and the next forward pass.

    Args:
        group: process group of the ranks; None for the default one, if there is any.
    """

    def __init__(self, group: distributed.ProcessGroup | None = None) -> None:
        self.group = group

    @property
    def size(self) -> int:
        """Number of ranks."""
        return distributed.get_world_size(self.group) if _initialized() else 1

    @property
    def rank(self) -> int:
        """Of this process, from 0."""
        return distributed.get_rank(self.group) if _initialized() else 0

    def add_up(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of `tensor` over the ranks, in place, bit for bit the same on all of them."""
        if self.size > 1:
            carried = tensor.contiguous()
            distributed.all_reduce(carried, group=self.group)
            if carried is not tensor:
                tensor.copy_(carried)
        return tensor

    def agree(self, decision: torch.Tensor) -> torch.Tensor:
        """The first rank's `decision` for all; every rank must bring one of the same shape and dtype."""
        if self.size == 1:
            return decision
        carried = decision.to(torch.uint8) if decision.dtype == torch.bool else decision.contiguous()
        distributed.broadcast(carried, group=self.group, group_src=0)
        return carried.to(decision.dtype)

    def agree_on_number(self, number: float, device: torch.device) -> float:
        """The first rank's number for all."""
        return number if self.size == 1 else float(self.agree(torch.tensor([number], dtype=torch.float64, device=device)))

    def any(self, happened: bool, device: torch.device) -> bool:
        """Whether something happened on some rank."""
        if self.size == 1:
            return happened
        return bool(self.add_up(torch.tensor([float(happened)], device=device)).item() > 0)

    def first_error(self, own: Exception | None) -> Exception | None:
        """The error of the first rank that has one, or None; so that all ranks fail, or none."""
        if self.size == 1:
            return own
        found: list[Exception | None] = [None] * self.size
        distributed.all_gather_object(found, own, group=self.group)
        return next((error for error in found if error is not None), None)

    def collect(self, action: Callable[[], dict[str, str]]) -> dict[str, str]:
        """All that `action` returns on any rank, which each runs for itself.

        Raises:
            OSError, RuntimeError: it raised one somewhere; on all ranks.
        """
        if self.size == 1:
            return action()
        own: dict[str, str] | Exception
        try:
            own = action()
        except (OSError, RuntimeError) as error:
            own = error
        found: list[dict[str, str] | Exception] = [own] * self.size
        distributed.all_gather_object(found, own, group=self.group)
        union: dict[str, str] = {}
        for part in found:
            if isinstance(part, Exception):
                raise part
            union |= part
        return union

    def on_first(self, action: Callable[[], str]) -> str:
        """What `action` returns on the first rank, which alone runs it.

        Raises:
            OSError, RuntimeError: it raised one; on all ranks.
        """
        if self.size == 1:
            return action()
        outcome: list[str | Exception | None] = [None]
        if self.rank == 0:
            try:
                outcome = [action()]
            except (OSError, RuntimeError) as error:
                outcome = [error]
        distributed.broadcast_object_list(outcome, group=self.group, group_src=0)
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        assert outcome[0] is not None  # the first rank has set it
        return outcome[0]


def _initialized() -> bool:
    return distributed.is_available() and distributed.is_initialized()
