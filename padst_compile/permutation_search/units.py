"""What a place of the permuted side offers a feature: the units of S at it, and which of them are active.

S has lines across the permuted side: rows if that is the input side, columns if it is the output side. Lines that share their
choice of active weights are one group, and so are places that are active for the same groups of lines.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch

from padst_compile.errors import StructureMismatchError
from padst_compile.structures import NM, Block, Shape, Structure, Topology, Unstructured


@dataclasses.dataclass(frozen=True)
class PlaceUnits:
    """Which units are active at each place.

    Attributes:
        active: bool `[line groups, place groups]`.
        group: int64 `[n]`, the place group of each place; places of one group are interchangeable.
        lines: lines in a group of lines; the last group may have fewer.
        side: the permuted side.
    """

    active: torch.Tensor
    group: torch.Tensor
    lines: int
    side: Literal["input", "output"]

    def to(self, device: torch.device) -> PlaceUnits:
        """The same on another device."""
        return dataclasses.replace(self, active=self.active.to(device), group=self.group.to(device))

    def scores(self, dense: torch.Tensor) -> torch.Tensor:
        """Sums of `dense` `[out, in]` (non-negative) over each group of lines, `[line groups, n]`."""
        totals = dense.new_zeros(self.active.shape[0], self.group.numel())
        self.add_scores(totals, dense, 0)
        return totals

    def add_scores(self, totals: torch.Tensor, rows: torch.Tensor, begin: int) -> None:
        """Add to `scores` those of some rows of the dense matrix, `[rows, in]`, from row `begin` on."""
        if self.side == "input":
            group = torch.arange(begin, begin + len(rows), device=rows.device) // self.lines
            totals.index_add_(0, group, rows)
        else:
            group = torch.arange(rows.shape[1], device=rows.device) // self.lines
            totals[:, begin : begin + len(rows)].index_add_(0, group, rows.T)

    def held(self) -> torch.Tensor:
        """Which units are active at each place, bool `[line groups, n]`."""
        return self.active[:, self.group]


def place_units(
    structure: Structure,
    topology: Topology,
    shape: Shape,
    side: Literal["input", "output"],
    owner: str = "layer",
    kept: torch.Tensor | None = None,
) -> PlaceUnits:
    """The units of a layer, as seen from its permuted side.

    Blocks have a unit for each group of places. At an N:M layer's input every place has units of its own, one for each group of
    rows. Of diagonals every weight counts as one: the mask says which places of which line are active, and whole diagonals stay
    whole because features move, not weights.

    Args:
        structure: of the layer.
        topology: its index tensors.
        shape: of its weight.
        side: the permuted side.
        owner: the layer, for the message.
        kept: 0 where stored values are pruned, shaped like them; None where none are.

    Raises:
        StructureMismatchError: an unstructured layer, whose units are no better in one place than in another.
    """
    if isinstance(structure, Unstructured):
        raise StructureMismatchError(
            owner,
            "'regroup' moves features to where a structure has active units; an unstructured layer can activate any weight",
            "use permutation='none' for it",
        )
    rows = structure.rows if isinstance(structure, Block) else structure.vector if isinstance(structure, NM) else 1
    columns = structure.columns if isinstance(structure, Block) else 1
    if kept is None:
        ones = torch.ones(shape.out_features, shape.in_features, dtype=torch.uint8, device=topology[0].device)
        kept = structure.pack(ones, topology)
    mask = structure.unpack(kept, topology, shape).bool()
    active = mask[::rows, ::columns]
    size, lines, places = (shape.in_features, rows, columns) if side == "input" else (shape.out_features, columns, rows)
    group = torch.arange(size, device=mask.device) // places
    return PlaceUnits(active if side == "input" else active.T.contiguous(), group, lines, side)
