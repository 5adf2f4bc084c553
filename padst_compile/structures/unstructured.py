"""No structure at all: the accuracy baseline, stored as a dense weight and a mask."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from padst_compile.structures.base import Shape, Structure, Topology, active_units, largest


@dataclasses.dataclass(frozen=True)
class Unstructured(Structure):
    """Any set of weights. Stored as values `[out, in]` and `mask` bool `[out, in]`, so it saves neither memory nor time."""

    kind: ClassVar[str] = "unstructured"
    index_names: ClassVar[tuple[str, ...]] = ("mask",)

    def check(self, shape: Shape, sparsity: float, module: str) -> None:
        """See `Structure.check`."""
        active_units(shape.numel, sparsity, module, "weight")

    def choose(self, scores: torch.Tensor, sparsity: float) -> Topology:
        """The weights with the largest scores."""
        mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
        mask[largest(scores.flatten(), active_units(scores.numel(), sparsity, "", "weight"))] = True
        return (mask.reshape(scores.shape),)

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
