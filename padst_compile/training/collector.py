"""Turns the dense gradient of a layer into sums, one layer at a time, on the steps that need them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from padst_compile.kernels import gradient_tap
from padst_compile.structures import Shape, Structure
from padst_compile.training.config import UnitScore


class Reducer(Protocol):
    """Keeps of a dense gradient what its owner needs."""

    def add(self, gradient: torch.Tensor) -> None:
        """Take in a gradient, or its magnitudes: float32 `[out_features, in_features]`, not to be changed or kept."""


class DenseGradient:
    """Listens to one layer between two optimizer steps (`gradient_tap`) and hands its dense gradient on.

    The dense gradient of each backward pass exists while it is being reduced and no longer. Over several backward passes
    (gradient accumulation, ranks) magnitudes are added, not gradients: a signed sum would be a dense gradient per layer.

    Args:
        shape: of the layer.
        magnitudes: who gets `|gradient|`.
        signed: who gets the gradient itself.
        rows: output rows to take gradients from, int64; None for all (Grass, Muhamed et al. 2024: a sample estimates scores).

    Attributes:
        seen: gradients handed on.
        poisoned: gradients with NaN or infinite entries, which were not.
    """

    def __init__(
        self,
        shape: Shape,
        magnitudes: Sequence[Reducer],
        signed: Sequence[Reducer] = (),
        rows: torch.Tensor | None = None,
    ) -> None:
        self.shape, self.magnitudes, self.signed, self.rows = shape, tuple(magnitudes), tuple(signed), rows
        self.seen = self.poisoned = 0

    def products(
        self, grad: torch.Tensor, x: torch.Tensor, rows: torch.Tensor | None = None, columns: torch.Tensor | None = None
    ) -> None:
        """See `GradientListener.products`."""
        with torch.no_grad():
            if self.rows is None:
                self._hand_on(gradient_tap.product(grad, x, rows, columns))
                return
            gradient = torch.zeros(self.shape.out_features, self.shape.in_features, device=x.device)
            gradient[self.rows] = gradient_tap.product(grad, x, self.rows if rows is None else rows[self.rows], columns)
            self._hand_on(gradient)

    def weight(self, gradient: torch.Tensor) -> None:
        """See `GradientListener.weight`."""
        with torch.no_grad():
            self._hand_on(gradient.to(torch.float32, copy=True))

    def _hand_on(self, gradient: torch.Tensor) -> None:
        """`gradient` `[out, in]` is ours to overwrite."""
        if not bool(gradient.sum().isfinite()):
            self.poisoned += 1
            return
        self.seen += 1
        for reducer in self.signed:
            reducer.add(gradient)
        if self.magnitudes:
            gradient.abs_()
        for reducer in self.magnitudes:
            reducer.add(gradient)


class UnitScores:
    """Adds up the norms of a layer's units: `total`, float32 `[pools, units]`, None before the first gradient."""

    def __init__(self, structure: Structure, score: UnitScore) -> None:
        self.structure, self.score = structure, score
        self.total: torch.Tensor | None = None

    def add(self, gradient: torch.Tensor) -> None:
        """See `Reducer.add`; takes magnitudes."""
        scores = unit_scores(self.structure, gradient, self.score)
        self.total = scores.clone() if self.total is None else self.total + scores


def unit_scores(structure: Structure, magnitudes: torch.Tensor, score: UnitScore) -> torch.Tensor:
    """The norm of every unit of `magnitudes` `[out, in]`: `[pools, units]`, -inf where there is no unit."""
    if score == "l1":
        return structure.unit_totals(magnitudes)
    totals = structure.unit_totals(magnitudes.square())
    return torch.where(totals >= 0, totals.sqrt(), totals)
