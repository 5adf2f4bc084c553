"""Norms of a layer's units: of its weights, and of gradients that come in parts."""

from __future__ import annotations

import torch

from padst_compile.structures import Shape, Structure
from padst_compile.training.config import UnitScore
from padst_compile.training.reducer import SumOfGradients


class UnitScores(SumOfGradients):
    """Adds up the norms of a layer's units: `total`, float32 `[pools, units]`.

    Args:
        structure: of the layer.
        score: of its units.
        shape: of the layer.
    """

    def __init__(self, structure: Structure, score: UnitScore, shape: Shape) -> None:
        super().__init__()
        self.structure, self.score, self.shape = structure, score, shape

    def add(self, part: torch.Tensor, begin: int) -> None:
        """See `Reducer.add`; takes magnitudes."""
        powers = part if self.score == "l1" else part.square()
        rows = torch.arange(begin, begin + len(part), device=part.device)
        totals = self.structure.unit_totals_of_rows(powers, rows, self.shape.out_features)
        self.pending.gather(self.structure.grid_of_rows(totals, rows, self.shape))

    def end(self) -> None:
        """See `Reducer.end`."""
        if self.pending.total is not None:
            self.pending.total = _norm(self.pending.total, self.score)
        super().end()

    def estimate(self) -> torch.Tensor:
        """`total`, or what it would be: -inf where nothing is known of a unit, or there is none."""
        assert self.total is not None  # the runtime leaves updates out where nothing came
        return self.total


class FineScores(UnitScores):
    """The same where a unit is one weight: `total` is of magnitudes as they are, float32 `[out_features, in_features]`.

    Nothing else is there while gradients arrive: such scores take a dense gradient's memory in themselves.
    """

    def add(self, part: torch.Tensor, begin: int) -> None:
        """See `Reducer.add`; takes magnitudes."""
        if self.total is None:
            self.total = part.new_zeros(self.shape.out_features, self.shape.in_features)
        self.total[begin : begin + len(part)] += part

    def estimate(self) -> torch.Tensor:
        """See `UnitScores.estimate`; once, for `total` is given up for it."""
        magnitudes, self.total = super().estimate(), None
        return self.structure.unit_totals(magnitudes)


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
        super().__init__(structure, score, shape)
        self.rows = rows

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
        ones = _ones(len(self.rows), columns, totals.device)
        counts = self.structure.unit_totals_of_rows(ones, self.rows, self.shape.out_features)
        seen = self.structure.grid_of_rows(counts, self.rows, self.shape)
        unknown = ~(seen > 0)
        scale = _norm(unit_sizes(self.structure, self.shape, totals.device) / seen, self.score)
        del counts, seen
        return scale.mul_(self.structure.grid_of_rows(totals, self.rows, self.shape)).masked_fill_(unknown, -torch.inf)


def unit_sizes(structure: Structure, shape: Shape, device: torch.device) -> torch.Tensor:
    """How many weights each unit has, float32 `[pools, units]`; -inf where there is no unit."""
    return structure.unit_totals(_ones(shape.out_features, shape.in_features, device))


def _ones(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """A matrix that takes no memory."""
    return torch.ones((), device=device).expand(rows, columns)


def unit_scores(structure: Structure, magnitudes: torch.Tensor, score: UnitScore) -> torch.Tensor:
    """The norm of every unit of `magnitudes` `[out, in]`, which are overwritten: `[pools, units]`, -inf where there is none."""
    return _norm(structure.unit_totals(magnitudes if score == "l1" else magnitudes.square_()), score)


def _norm(totals: torch.Tensor, score: UnitScore) -> torch.Tensor:
    """From totals of magnitudes, or of their squares."""
    return totals if score == "l1" else torch.where(totals >= 0, totals.sqrt(), totals)
