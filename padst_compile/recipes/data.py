"""What a training loop asks of data: batches that depend on the seed and the step alone, and a fixed validation set."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Protocol

import torch

from padst_compile.recipes.seeding import generator


@dataclasses.dataclass(frozen=True)
class Batch:
    """Examples for one forward pass.

    Args:
        inputs: what the model is called with: images float32 `[batch, 3, height, width]`, or tokens int64 `[batch, length]`.
        targets: int64: classes `[batch]`, or the next tokens `[batch, length]`.
        count: the first so many are examples; what follows repeats some, so that all batches have one size.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    count: int

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        return dataclasses.replace(self, inputs=self.inputs.to(device), targets=self.targets.to(device))


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How examples are drawn.

    Args:
        batch: examples of a batch, in training and validation.
        seed: of what is drawn at random in training.
        limit: at most so many validation examples, evenly spread; None for all.
    """

    batch: int
    seed: int = 0
    limit: int | None = None


class Data(Protocol):
    """A training set and a validation set."""

    @property
    def classes(self) -> int:
        """Values that a target can have."""

    def training_batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0; the same whenever it is asked for."""

    def validation_batches(self) -> Iterator[Batch]:
        """The validation examples, always the same in the same order."""

    def describe(self) -> dict[str, Any]:
        """What a user of the trained model needs to know about its inputs and outputs, as JSON."""


class Epochs:
    """Which examples make up the batch of a step: each example once per epoch, in an order of the epoch's own.

    Args:
        examples: how many there are.
        batch: examples of a batch; batches run on from one epoch into the next.
        seed: of the orders.
    """

    def __init__(self, examples: int, batch: int, seed: int) -> None:
        self.examples, self.batch, self.seed = examples, batch, seed
        self._orders: dict[int, torch.Tensor] = {}

    def indices(self, step: int) -> torch.Tensor:
        """The examples of a step, int64 `[batch]`."""
        position, end, parts = step * self.batch, (step + 1) * self.batch, []
        while position < end:
            epoch, start = divmod(position, self.examples)
            taken = min(self.examples - start, end - position)
            parts.append(self._order(epoch)[start : start + taken])
            position += taken
        return torch.cat(parts)

    def _order(self, epoch: int) -> torch.Tensor:
        if epoch not in self._orders:
            order = torch.randperm(self.examples, generator=generator(self.seed, "epoch", epoch))
            self._orders = {epoch: order}  # the others are over, or can be drawn again
        return self._orders[epoch]


def evenly(total: int, wanted: int | None) -> torch.Tensor:
    """At most `wanted` of `total` positions, evenly spread, int64 `[count]`; all of them for None."""
    count = total if wanted is None else min(total, wanted)
    return torch.arange(count) * total // max(1, count)


def in_batches(positions: torch.Tensor, batch: int) -> Iterator[tuple[torch.Tensor, int]]:
    """Positions in pieces of exactly `batch`, the last filled up with repetitions, and how many of each piece count."""
    for piece in positions.split(batch):
        filled = piece.repeat(-(-batch // len(piece)))[:batch]
        yield filled, len(piece)
