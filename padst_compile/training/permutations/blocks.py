"""Which places may exchange their features: blocks of a limited number of places, so that learning stays cheap."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from padst_compile.errors import InvalidPermutationError


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Disjoint sets of places; a permutation moves features within each. Places in none of them keep theirs.

    Attributes:
        places: int64 `[blocks, width]`; blocks that are smaller than the largest are filled up with place 0.
        valid: bool `[blocks, width]`, false for what fills up.
        orders: int64 `[blocks]`: which order a block follows, from 0; blocks with the same number move alike.
    """

    places: torch.Tensor
    valid: torch.Tensor
    orders: torch.Tensor

    def to(self, device: torch.device | str) -> Blocks:
        """The same on another device."""
        return Blocks(self.places.to(device), self.valid.to(device), self.orders.to(device))

    def valid_of_orders(self) -> torch.Tensor:
        """`valid` of the blocks that follow each order, bool `[orders, width]`."""
        valid = self.valid.new_zeros(int(self.orders.max()) + 1, self.valid.shape[1])
        return valid.index_put_((self.orders,), self.valid)

    def add_up(self, parts: torch.Tensor) -> torch.Tensor:
        """`parts` `[blocks, …]`, those that follow the same order added: `[orders, …]`."""
        return parts.new_zeros(int(self.orders.max()) + 1, *parts.shape[1:]).index_add_(0, self.orders, parts)

    def permutation(self, start: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
        """`start` `[n]` with its features reordered within each block.

        Args:
            start: integers `[n]`.
            local: int32 `[orders, width]`: place `a` of a block gets what `start` has at its place `local[a]`.
        """
        sources = self.places.gather(1, local.long()[self.orders])
        moved = start.clone()
        moved[self.places[self.valid]] = start[sources[self.valid]]
        return moved


def split(groups: Sequence[torch.Tensor], size: int, width: int, owner: str = "split") -> Blocks:
    """Divide groups of places into blocks of at most `width`, all of a group's as equal in size as can be.

    A block takes every k-th place of its group, not consecutive ones: exchanges within one block of weights change nothing that
    its weights could not do themselves. Sizes that `width` does not divide give somewhat smaller blocks (768 places by 64: 12
    blocks of 64; 100: 2 of 50; 101: 51 and 50).

    Args:
        groups: int64 lists of places, disjoint; for all of n places one group `torch.arange(n)`. Groups that a model's graph
            folds for free, such as the channels of each head, restrict learning to them. Of a group `[copies, places]` all
            copies move alike.
        size: number of features.
        width: largest size of a block.
        owner: the layer, for the message.

    Raises:
        InvalidPermutationError: a place out of range or in two groups, or no group at all.
    """
    every = torch.cat([group.flatten().long().cpu() for group in groups]) if groups else torch.empty(0, dtype=torch.int64)
    outside = bool(((every < 0) | (every >= size)).any())
    if every.numel() == 0 or outside or every.unique().numel() != every.numel():
        raise InvalidPermutationError(
            f"{owner}: groups of places that may be permuted are disjoint lists of 0 … {size - 1}, at least one of them"
        )
    blocks: list[torch.Tensor] = []
    orders: list[int] = []
    for group in groups:
        copies = torch.atleast_2d(group).long().cpu()
        count = -(-copies.shape[1] // width)
        begun = orders[-1] + 1 if orders else 0
        for first in range(count):
            blocks += list(copies[:, first::count])
            orders += [begun + first] * copies.shape[0]
    places = torch.nn.utils.rnn.pad_sequence(blocks, batch_first=True, padding_value=-1)
    return Blocks(places.clamp_min(0), places >= 0, torch.tensor(orders))
