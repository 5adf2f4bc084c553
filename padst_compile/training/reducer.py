"""What is kept of a dense gradient, which comes in parts."""

from __future__ import annotations

from typing import Protocol

import torch


class Reducer(Protocol):
    """Keeps of a dense gradient what its owner needs; the gradient comes in parts."""

    def add(self, part: torch.Tensor, begin: int) -> None:
        """Take in a part of a gradient, or its magnitudes.

        Args:
            part: float32 `[rows, in_features]`, not to be changed or kept.
            begin: its first output row; parts come in order, and each row once.
        """

    def end(self) -> None:
        """That was all of the gradient."""

    def clear(self) -> None:
        """Forget all of it, and what came of a gradient that has not ended: those gradients do not count."""

    def to(self, device: torch.device) -> None:
        """Move to the device that gradients come from now."""


class Sum:
    """Adds up tensors of one shape.

    Attributes:
        total: of them; None before the first.
    """

    def __init__(self) -> None:
        self.total: torch.Tensor | None = None

    def gather(self, part: torch.Tensor) -> None:
        """Add one, which may be a view of what is changed later."""
        self.total = part.clone() if self.total is None else self.total.add_(part)

    def end(self) -> None:
        """See `Reducer.end`."""

    def clear(self) -> None:
        """See `Reducer.clear`."""
        self.total = None

    def to(self, device: torch.device) -> None:
        """See `Reducer.to`."""
        self.total = None if self.total is None else self.total.to(device)


class SumOfGradients(Sum):
    """Adds up what comes of whole gradients, each of which is the sum of its parts: the same as if it had come at once.

    Attributes:
        pending: of the gradient that comes in parts now.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pending = Sum()

    def end(self) -> None:
        """See `Reducer.end`."""
        if self.pending.total is not None:
            self.total = self.pending.total if self.total is None else self.total.add_(self.pending.total)
            self.pending.clear()

    def clear(self) -> None:
        """See `Reducer.clear`."""
        super().clear()
        self.pending.clear()
