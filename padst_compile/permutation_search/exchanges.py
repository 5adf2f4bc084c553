"""Which features of a layer may exchange places: what a restriction leaves to those who learn its permutation."""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True, eq=False)
class Exchanges:
    """Sets of places that may exchange their features freely. Layers that must keep one permutation hold the same object.

    Copies and pickles of a model keep that: they hold one object where the original does.

    Args:
        sets: int64 `[copies, width]` on the CPU; the places of a row may exchange features, in all rows of a set alike. No
            place is in two rows.
        holders: number of layers that hold this.
    """

    sets: tuple[torch.Tensor, ...]
    holders: int = 1

    def independent(self, size: int) -> torch.Tensor:
        """For each of `size` places the number of its set, int64 `[size]`; -1 where it must stay, or move as others do."""
        numbers = torch.full((size,), -1)
        for number, places in enumerate(self.sets):
            if places.shape[0] == 1:
                numbers[places[0]] = number
        return numbers
