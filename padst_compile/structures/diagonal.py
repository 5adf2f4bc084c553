"""Wrapped diagonals (DynaDiag, Tyagi et al. 2025), free or in whole residue classes that fold into dense blocks."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from padst_compile.errors import StructureMismatchError
from padst_compile.structures.base import Shape, Structure, Topology, count_active, not_indices, require_positive

_DIAGONALS_AT_ONCE = _ROWS_AT_ONCE = 32  # positions take four times the memory of the weights


@dataclasses.dataclass(frozen=True)
class Diagonal(Structure):
    """Whole wrapped diagonals are active; their number follows from the sparsity.

    With `length = min(out, in)` and `period = max(out, in)`, diagonal `o` in `[0, period)` holds the weights
    `W[k, (k + o) % in]` where inputs are at least as many as outputs, else `W[(k + o) % out, k]`, for `k < length`
    (DynaDiag section 3: max(M, N) candidates of length min(M, N)). Stored as `offsets` int32 `[diagonals]`, ascending, and
    values `[diagonals, length]`.

    Args:
        group: 1 chooses diagonals freely. `g > 1` chooses whole residue classes of offsets mod `length / g`, each of which
            is, after a stride permutation, a set of dense blocks g wide.
    """

    group: int = 1

    kind: ClassVar[str] = "diagonal"
    index_names: ClassVar[tuple[str, ...]] = ("offsets",)

    def __post_init__(self) -> None:
        require_positive(self.group, "the group of Diagonal")

    def classes(self, shape: Shape) -> int:
        """How many residue classes of offsets there are to choose from; each diagonal is its own for `group=1`."""
        length, period = _sizes(shape)
        return period if self.group == 1 else length // self.group

    def check(self, shape: Shape, sparsity: float, module: str) -> None:
        """See `Structure.check`: residue classes need a stride that divides both sides."""
        length, period = _sizes(shape)
        if self.group > 1 and (length % self.group or period % (length // self.group)):
            usable = [g for g in range(2, length // 2 + 1) if length % g == 0 and period % (length // g) == 0]
            nearest = min(usable, key=lambda g: abs(g - self.group), default=1)
            raise StructureMismatchError(
                module,
                f"Diagonal(group={self.group}) needs a stride of {length}/{self.group} that divides {length} and {period}",
                f"the nearest group that does is {nearest}",
            )
        count_active(self.classes(shape), sparsity, module, "diagonal" if self.group == 1 else "class of diagonals")

    def units_per_pool(self, shape: Shape, sparsity: float) -> int:
        """See `Structure.units_per_pool`: all diagonals, or residue classes of them, are one pool."""
        return count_active(self.classes(shape), sparsity, "", "diagonal")

    def unit_totals(self, scores: torch.Tensor) -> torch.Tensor:
        """See `Structure.unit_totals`."""
        shape = Shape(*scores.shape)
        offsets = torch.arange(_sizes(shape)[1], device=scores.device)
        totals = torch.cat([scores[self.positions((own,), shape)].sum(1) for own in offsets.split(_DIAGONALS_AT_ONCE)])
        return totals.reshape(-1, self.classes(shape)).sum(0, keepdim=True)

    def unit_totals_of_rows(self, scores: torch.Tensor, rows: torch.Tensor, out_features: int) -> torch.Tensor:
        """See `Structure.unit_totals_of_rows`: all of them, which are few."""
        shape = Shape(out_features, scores.shape[1])
        classes = self.classes(shape)
        columns = torch.arange(shape.in_features, dtype=torch.int32, device=scores.device)
        totals = scores.new_zeros(classes)
        for part, own in zip(scores.split(_ROWS_AT_ONCE), rows.int().split(_ROWS_AT_ONCE), strict=True):
            ahead = columns - own[:, None] if shape.in_features >= out_features else own[:, None] - columns
            totals.index_add_(0, ahead.remainder_(classes).flatten(), part.flatten())  # classes divide the period
        return totals[None]

    def active_units(self, topology: Topology, shape: Shape) -> torch.Tensor:
        """See `Structure.active_units`."""
        classes = self.classes(shape)
        active = torch.zeros(1, classes, dtype=torch.bool, device=topology[0].device)
        active[0, topology[0].long() % classes] = True
        return active

    def topology_of(self, active: torch.Tensor, shape: Shape) -> Topology:
        """See `Structure.topology_of`."""
        kept = active[0].nonzero()[:, 0]
        offsets = torch.arange(0, _sizes(shape)[1], self.classes(shape), device=active.device)[:, None] + kept
        return (offsets.flatten().int(),)

    def pack(self, weight: torch.Tensor, topology: Topology) -> torch.Tensor:
        """See `Structure.pack`."""
        shape = Shape(*weight.shape)
        return torch.cat([weight[self.positions((own,), shape)] for own in topology[0].split(_DIAGONALS_AT_ONCE)])

    def unpack(self, values: torch.Tensor, topology: Topology, shape: Shape) -> torch.Tensor:
        """See `Structure.unpack`."""
        weight = values.new_zeros(shape.out_features, shape.in_features)
        for own, part in zip(topology[0].split(_DIAGONALS_AT_ONCE), values.split(_DIAGONALS_AT_ONCE), strict=True):
            weight[self.positions((own,), shape)] = part
        return weight

    def check_topology(self, topology: Topology, shape: Shape) -> str | None:
        """See `Structure.check_topology`."""
        (offsets,) = topology
        _, period = _sizes(shape)
        wrong = not_indices(offsets=offsets)
        if wrong is not None:
            return wrong
        if bool(((offsets < 0) | (offsets >= period)).any()):
            return f"offsets must lie in [0, {period})"
        if bool((offsets.diff() <= 0).any()):
            return "the offsets must ascend"
        classes = self.classes(shape)
        members = torch.bincount(offsets.long() % classes, minlength=classes)
        whole = bool(((members == 0) | (members == period // classes)).all())
        return None if whole else f"the offsets must be whole residue classes mod {classes}"

    def positions(self, topology: Topology, shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
        """Row and column of every value, int64 `[diagonals, length]` each."""
        offsets = topology[0].long()[:, None]
        length, period = _sizes(shape)
        steps = torch.arange(length, device=offsets.device)
        shifted, plain = (steps + offsets) % period, steps.expand(offsets.shape[0], -1)
        return (plain, shifted) if shape.in_features >= shape.out_features else (shifted, plain)

    def to_string(self) -> str:
        """`diagonal` or `diagonal:GROUP`."""
        return "diagonal" if self.group == 1 else f"diagonal:{self.group}"


def _sizes(shape: Shape) -> tuple[int, int]:
    """Length of a diagonal and period of its offsets."""
    return min(shape.out_features, shape.in_features), max(shape.out_features, shape.in_features)
