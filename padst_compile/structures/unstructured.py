"""No structure at all: the accuracy baseline, stored as a dense weight and a mask."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from padst_compile.structures.base import Shape, Structure, Topology, count_active


@dataclasses.dataclass(frozen=True)
class Unstructured(Structure):
    """Any set of weights. Stored as values `[out, in]` and `mask` bool `[out, in]`, so it saves neither memory nor time."""

    kind: ClassVar[str] = "unstructured"
    index_names: ClassVar[tuple[str, ...]] = ("mask",)

    def check(self, shape: Shape, sparsity: float, module: str) -> None:
        """See `Structure.check`."""
        count_active(shape.numel, sparsity, module, "weight")

    def units_per_pool(self, shape: Shape, sparsity: float) -> int:
        """See `Structure.units_per_pool`: all weights are one pool."""
        return count_active(shape.numel, sparsity, "", "weight")

    def unit_totals(self, scores: torch.Tensor) -> torch.Tensor:
        """See `Structure.unit_totals`: every weight is a unit."""
        return scores.reshape(1, -1)

    def unit_totals_of_rows(self, scores: torch.Tensor, rows: torch.Tensor, out_features: int) -> torch.Tensor:
        """See `Structure.unit_totals_of_rows`: the scores themselves."""
        return scores

    def grid_of_rows(self, totals: torch.Tensor, rows: torch.Tensor, shape: Shape) -> torch.Tensor:
        """See `Structure.grid_of_rows`."""
        whole = totals.new_zeros(shape.out_features, shape.in_features)
        whole[rows] = totals
        return whole.reshape(1, -1)

    def active_units(self, topology: Topology, shape: Shape) -> torch.Tensor:
        """See `Structure.active_units`."""
        return topology[0].reshape(1, -1).clone()  # not a view: topologies change in place

    def topology_of(self, active: torch.Tensor, shape: Shape) -> Topology:
        """See `Structure.topology_of`."""
        return (active.reshape(shape.out_features, shape.in_features),)

    def pack(self, weight: torch.Tensor, topology: Topology) -> torch.Tensor:
        """The masked weight itself."""
        return weight.where(topology[0], 0).contiguous()

    def unpack(self, values: torch.Tensor, topology: Topology, shape: Shape) -> torch.Tensor:
        """The masked values; a value outside the mask does not count."""
        return values.where(topology[0], 0).contiguous()

    def check_topology(self, topology: Topology, shape: Shape) -> str | None:
        """See `Structure.check_topology`."""
        expected, (mask,) = (shape.out_features, shape.in_features), topology
        if mask.dtype != torch.bool:
            return f"mask must be torch.bool, not {mask.dtype}"
        return None if mask.shape == expected else f"mask must be {list(expected)}, got {list(mask.shape)}"

    def to_string(self) -> str:
        """`unstructured`."""
        return self.kind
