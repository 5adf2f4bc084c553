"""The order of features in which a structure keeps the most of a weight's magnitude, for weights that are trained already.

Alternates between choosing the active units and placing features, as channel permutation for N:M does (Pool & Yu 2021; Zhang
et al. 2024, "Plug-and-Play"). A feature's own place always looks good to it, because the units there were chosen with it
inside. So each round first takes some features out, chooses the units without them, and then gives the free places to them by
linear assignment. A round that keeps no more than the best so far is undone, so the result is never worse than the order it
began with.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch

from padst_compile.permutation_search.assignment import harden
from padst_compile.permutation_search.units import place_units
from padst_compile.structures import NM, Shape, Structure, Unstructured

Side = Literal["input", "output"]

_FREE = 0.25  # of the places, in a round; N:M takes one place of each group, for which the gain is then exact
_PATIENCE, _WORTH_IT = 8, 1e-3  # the search ends when so many rounds together gain less than this part of the total
_CHUNK = 1 << 19  # entries of an intermediate tensor, which stays in cache


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        order: int64 `[n]` on the device of the scores: place `s` of S gets feature `order[s]`.
        before: total score of the active weights in the order of the layer.
        after: the same in `order`, at least `before`.
    """

    order: torch.Tensor
    before: float
    after: float


def search_order(
    scores: torch.Tensor,
    structure: Structure,
    sparsity: float,
    side: Side,
    *,
    generator: torch.Generator,
    rounds: int = 80,
) -> SearchResult:
    """An order of a layer's features in which its structure keeps a large total score.

    Args:
        scores: of the dense weight, `[out, in]`, finite and non-negative; magnitudes, for example.
        structure: of S.
        sparsity: of S.
        side: whose features are ordered: the inputs (columns) or the outputs (rows).
        generator: of the places that are freed; on the CPU.
        rounds: at most so many; each chooses all units once and solves one assignment.

    Raises:
        PermutationScoresError: scores that are not finite.
    """
    state = _Search(scores, structure, sparsity, side)
    order = torch.arange(state.size, device=scores.device)
    before = best = state.kept(order)
    history = [best]
    if not _order_matters(structure, side):
        return SearchResult(order, before, before)
    for _ in range(rounds):
        changed = state.replaced(order, generator)
        kept = state.kept(changed)
        if kept > best:
            order, best = changed, kept
        history.append(best)
        if len(history) > _PATIENCE and best - history[-1 - _PATIENCE] < _WORTH_IT * best:
            break
    return SearchResult(order, before, best)


@dataclasses.dataclass(frozen=True)
class _Search:
    scores: torch.Tensor
    structure: Structure
    sparsity: float
    side: Side

    @property
    def shape(self) -> Shape:
        return Shape(*self.scores.shape)

    @property
    def size(self) -> int:
        return self.scores.shape[self._dimension]

    @property
    def _dimension(self) -> int:
        return 1 if self.side == "input" else 0

    def kept(self, order: torch.Tensor) -> float:
        """Total score of the active units in an order."""
        totals = self.structure.unit_totals(self._ordered(order))
        return float(totals.topk(self.structure.units_per_pool(self.shape, self.sparsity)).values.sum(dtype=torch.float64))

    def replaced(self, order: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """The order after one round."""
        free = self._free_places(generator).to(order.device)
        ordered = self._ordered(order)
        rest = ordered.index_fill(self._dimension, free, 0)
        if isinstance(self.structure, NM) and self.side == "input":
            benefits = _benefits_in_groups(ordered, rest, free, self.structure)
        else:
            benefits = self._benefits(ordered, rest, free)
        sources = harden(benefits, "search").long()
        return order.index_copy(0, free, order[free[sources]])

    def _ordered(self, order: torch.Tensor) -> torch.Tensor:
        return self.scores.index_select(self._dimension, order)

    def _free_places(self, generator: torch.Generator) -> torch.Tensor:
        if isinstance(self.structure, NM) and self.side == "input":
            starts = torch.arange(0, self.size, self.structure.m)
            widths = (self.size - starts).clamp_max(self.structure.m)
            drawn: torch.Tensor = (torch.rand(starts.shape, generator=generator) * widths).long()
            return starts + drawn
        count = min(self.size, max(2, int(_FREE * self.size)))
        return torch.randperm(self.size, generator=generator)[:count].sort().values

    def _benefits(self, ordered: torch.Tensor, rest: torch.Tensor, free: torch.Tensor) -> torch.Tensor:
        """What each feature would keep at each free place, `[places, features]`, if the units stayed those of the rest."""
        topology = self.structure.choose(rest, self.sparsity)
        units = place_units(self.structure, topology, self.shape, self.side)
        return units.active[:, units.group[free]].to(ordered.dtype).T @ units.scores(ordered)[:, free]


def _order_matters(structure: Structure, side: Side) -> bool:
    """Whether a structure keeps more in one order than in another: not where every row or weight chooses for itself."""
    return not isinstance(structure, Unstructured) and not (
        isinstance(structure, NM) and structure.vector == 1 and side == "output"
    )


def _benefits_in_groups(ordered: torch.Tensor, rest: torch.Tensor, free: torch.Tensor, structure: NM) -> torch.Tensor:
    """What each input adds to each group that misses one, `[groups, features]`: how far it exceeds the n-th largest there."""
    row_groups, groups = structure.groups(Shape(*ordered.shape))
    totals = structure.unit_totals(rest).reshape(row_groups, groups, structure.m)
    least = totals.topk(structure.n).values[..., -1].clamp_min(0)
    candidates = _row_totals(ordered[:, free], structure.vector)  # [row groups, features]
    share = max(1, _CHUNK // candidates.numel())
    return torch.cat(
        [(candidates[:, None] - part[..., None]).relu_().sum(0) for part in least.split(share, dim=1)],
    )


def _row_totals(scores: torch.Tensor, rows: int) -> torch.Tensor:
    padding = -scores.shape[0] % rows
    return torch.nn.functional.pad(scores, (0, 0, 0, padding)).reshape(-1, rows, scores.shape[1]).sum(1)
