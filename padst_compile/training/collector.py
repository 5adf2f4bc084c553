"""Turns the dense gradient of a layer into sums, one layer at a time, on the steps that need them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from padst_compile.kernels import gradient_tap
from padst_compile.structures import Shape, Structure
from padst_compile.training.config import UnitScore
from padst_compile.training.passes import Passes


class Reducer(Protocol):
    """Keeps of a dense gradient what its owner needs."""

    def add(self, gradient: torch.Tensor) -> None:
        """Take in a gradient, or its magnitudes: float32 `[out_features, in_features]`, not to be changed or kept."""

    def clear(self) -> None:
        """Forget all of it: those gradients have been dropped."""

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
        self.total = part.clone() if self.total is None else self.total + part

    def clear(self) -> None:
        """See `Reducer.clear`."""
        self.total = None

    def to(self, device: torch.device) -> None:
        """See `Reducer.to`."""
        self.total = None if self.total is None else self.total.to(device)


class DenseGradient:
    """Listens to one layer between two optimizer steps (`gradient_tap`) and hands its dense gradient on.

    The dense gradient of each backward pass exists while it is being reduced and no longer. Over several backward passes
    (gradient accumulation, ranks) magnitudes are added, not gradients: a signed sum would be a dense gradient per layer.

    Args:
        shape: of the layer.
        magnitudes: who gets `|gradient|`.
        signed: who gets the gradient itself.
        rows: output rows to take gradients from, int64; None for all (Grass, Muhamed et al. 2024: a sample estimates scores).
        passes: knows which backward passes were in vain; None where none are.

    Attributes:
        poisoned: gradients with NaN or infinite entries, which were not handed on.
    """

    def __init__(
        self,
        shape: Shape,
        magnitudes: Sequence[Reducer],
        signed: Sequence[Reducer] = (),
        rows: torch.Tensor | None = None,
        passes: Passes | None = None,
    ) -> None:
        self.shape, self.magnitudes, self.signed, self.rows, self._passes = (
            shape,
            tuple(magnitudes),
            tuple(signed),
            rows,
            passes,
        )
        self.poisoned = 0
        if passes is not None:
            passes.watch(self)

    def products(
        self, grad: torch.Tensor, x: torch.Tensor, rows: torch.Tensor | None = None, columns: torch.Tensor | None = None
    ) -> None:
        """See `GradientListener.products`."""
        if not self._wanted():
            return
        with torch.no_grad():
            if self.rows is None:
                self._hand_on(gradient_tap.product(grad, x, rows, columns))
                return
            gradient = torch.zeros(self.shape.out_features, self.shape.in_features, device=x.device)
            gradient[self.rows] = gradient_tap.product(grad, x, self.rows if rows is None else rows[self.rows], columns)
            self._hand_on(gradient)

    def weight(self, gradient: torch.Tensor) -> None:
        """See `GradientListener.weight`."""
        if self._wanted():
            with torch.no_grad():
                self._hand_on(gradient.to(torch.float32, copy=True))

    def clear(self) -> None:
        """See `Restartable.clear`."""
        self.poisoned = 0
        for reducer in (*self.magnitudes, *self.signed):
            reducer.clear()

    def to(self, device: torch.device) -> None:
        """See `GradientListener.to`."""
        self.rows = None if self.rows is None else self.rows.to(device)
        for reducer in (*self.magnitudes, *self.signed):
            reducer.to(device)

    def _wanted(self) -> bool:
        """Whether anybody wants the gradient of the backward pass that runs now."""
        if self._passes is not None:
            self._passes.enter()
        return bool(self.magnitudes or self.signed)

    def _hand_on(self, gradient: torch.Tensor) -> None:
        """`gradient` `[out, in]` is ours to overwrite."""
        if not bool(gradient.sum().isfinite()):
            self.poisoned += 1
            return
        for reducer in self.signed:
            reducer.add(gradient)
        if self.magnitudes:
            gradient.abs_()
        for reducer in self.magnitudes:
            reducer.add(gradient)


class UnitScores(Sum):
    """Adds up the norms of a layer's units: `total`, float32 `[pools, units]`."""

    def __init__(self, structure: Structure, score: UnitScore) -> None:
        super().__init__()
        self.structure, self.score = structure, score

    def add(self, gradient: torch.Tensor) -> None:
        """See `Reducer.add`; takes magnitudes."""
        self.gather(unit_scores(self.structure, gradient, self.score))


def unit_scores(structure: Structure, magnitudes: torch.Tensor, score: UnitScore) -> torch.Tensor:
    """The norm of every unit of `magnitudes` `[out, in]`: `[pools, units]`, -inf where there is no unit."""
    if score == "l1":
        return structure.unit_totals(magnitudes)
    totals = structure.unit_totals(magnitudes.square())
    return torch.where(totals >= 0, totals.sqrt(), totals)
