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
        magnitudes: who gets `|gradient|`.
        signed: who gets the gradient itself.
        sampled: who gets `|gradient|` of some output rows. Where nobody else wants any, only those are computed.
        passes: knows which backward passes were in vain; None where none are.

    Attributes:
        poisoned: gradients with NaN or infinite entries, which were not handed on.
    """

    def __init__(
        self,
        magnitudes: Sequence[Reducer],
        signed: Sequence[Reducer] = (),
        sampled: SampledScores | None = None,
        passes: Passes | None = None,
    ) -> None:
        self.magnitudes, self.signed, self.sampled, self._passes = tuple(magnitudes), tuple(signed), sampled, passes
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
            if self.sampled is None or self.magnitudes or self.signed:
                self._hand_on(gradient_tap.product(grad, x, rows, columns))
            else:
                wanted = self.sampled.rows if rows is None else rows[self.sampled.rows]
                self._hand_rows_on(self.sampled, gradient_tap.product(grad, x, wanted, columns))

    def weight(self, gradient: torch.Tensor) -> None:
        """See `GradientListener.weight`."""
        if not self._wanted():
            return
        with torch.no_grad():
            if self.sampled is None or self.magnitudes or self.signed:
                self._hand_on(gradient.to(torch.float32, copy=True))
            else:
                self._hand_rows_on(self.sampled, gradient[self.sampled.rows].float())

    def clear(self) -> None:
        """See `Restartable.clear`."""
        self.poisoned = 0
        for reducer in self._reducers():
            reducer.clear()

    def to(self, device: torch.device) -> None:
        """See `GradientListener.to`."""
        for reducer in self._reducers():
            reducer.to(device)

    def _reducers(self) -> tuple[Reducer, ...]:
        return (*self.magnitudes, *self.signed, *(() if self.sampled is None else (self.sampled,)))

    def _wanted(self) -> bool:
        """Whether anybody wants the gradient of the backward pass that runs now."""
        if self._passes is not None:
            self._passes.enter()
        return bool(self._reducers())

    def _hand_on(self, gradient: torch.Tensor) -> None:
        """`gradient` `[out, in]` is ours to overwrite."""
        if not self._is_finite(gradient):
            return
        for reducer in self.signed:
            reducer.add(gradient)
        gradient.abs_()
        for reducer in self.magnitudes:
            reducer.add(gradient)
        if self.sampled is not None:
            self.sampled.add(gradient)

    def _hand_rows_on(self, sampled: SampledScores, part: torch.Tensor) -> None:
        """`part` `[rows, in]` is ours to overwrite."""
        if self._is_finite(part):
            sampled.add_rows(part.abs_())

    def _is_finite(self, gradient: torch.Tensor) -> bool:
        finite = bool(gradient.sum().isfinite())
        self.poisoned += not finite
        return finite


class UnitScores(Sum):
    """Adds up the norms of a layer's units: `total`, float32 `[pools, units]`, or what `estimate` makes that of."""

    def __init__(self, structure: Structure, score: UnitScore) -> None:
        super().__init__()
        self.structure, self.score = structure, score

    def add(self, gradient: torch.Tensor) -> None:
        """See `Reducer.add`; takes magnitudes."""
        self.gather(unit_scores(self.structure, gradient, self.score))

    def estimate(self) -> torch.Tensor:
        """`total`, or what it would be: -inf where nothing is known of a unit, or there is none."""
        assert self.total is not None  # the runtime leaves updates out where nothing came
        return self.total


class SampledScores(UnitScores):
    """The same from a sample of the output rows, which estimates it (Grass, Muhamed et al. 2024).

    What is added up is of units with any of these rows alone, or of all where a unit is large (`Structure.grid_of_rows`).

    Args:
        structure: of the layer.
        score: of its units.
        shape: of the layer.
        rows: int64, the sample.
    """

    def __init__(self, structure: Structure, score: UnitScore, shape: Shape, rows: torch.Tensor) -> None:
        super().__init__(structure, score)
        self.shape, self.rows = shape, rows

    def add(self, gradient: torch.Tensor) -> None:
        """See `Reducer.add`; takes magnitudes of all rows."""
        self.add_rows(gradient[self.rows])

    def add_rows(self, part: torch.Tensor) -> None:
        """Take in magnitudes of the sample, float32 `[rows, in_features]`."""
        powers = part if self.score == "l1" else part.square()
        self.gather(_norm(self.structure.unit_totals_of_rows(powers, self.rows, self.shape.out_features), self.score))

    def to(self, device: torch.device) -> None:
        """See `Reducer.to`."""
        super().to(device)
        self.rows = self.rows.to(device)

    def estimate(self) -> torch.Tensor:
        """See `UnitScores.estimate`: as if the weights of a unit were all like those in the sample."""
        totals, columns = super().estimate(), self.shape.in_features
        sizes = self.structure.unit_totals(torch.ones(self.shape.out_features, columns, device=totals.device))
        ones = torch.ones(len(self.rows), columns, device=totals.device)
        counts = self.structure.unit_totals_of_rows(ones, self.rows, self.shape.out_features)
        total, seen = (self.structure.grid_of_rows(each, self.rows, self.shape) for each in (totals, counts))
        return torch.where(seen > 0, total * _norm(sizes / seen, self.score), -torch.inf)


def unit_scores(structure: Structure, magnitudes: torch.Tensor, score: UnitScore) -> torch.Tensor:
    """The norm of every unit of `magnitudes` `[out, in]`: `[pools, units]`, -inf where there is no unit."""
    return _norm(structure.unit_totals(magnitudes if score == "l1" else magnitudes.square()), score)


def _norm(totals: torch.Tensor, score: UnitScore) -> torch.Tensor:
    """From totals of magnitudes, or of their squares."""
    return totals if score == "l1" else torch.where(totals >= 0, totals.sqrt(), totals)
