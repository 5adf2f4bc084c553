"""A structure of one's own in one file: every few outputs share the inputs that they read.

Import this file before a specification names the structure: `padst.SparsitySpec("columns:16", sparsity=0.9)`.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

import padst_compile as padst
from padst_compile.errors import StructureMismatchError
from padst_compile.kernels.formats import Format
from padst_compile.structures import Shape, Structure, Topology
from padst_compile.structures.base import count_active, is_integer, require_positive


@padst.register_structure
@dataclasses.dataclass(frozen=True)
class Columns(Structure):
    """Each group of `rows` consecutive outputs reads as many inputs, of its own choice.

    Stored as `columns` int32 `[groups, kept]`, ascending in each group, and values `[groups, kept, rows]`:
    `W[g * rows + r, columns[g, k]] = values[g, k, r]`. A unit is an input of one group, a pool is a group.
    """

    rows: int

    kind: ClassVar[str] = "columns"
    index_names: ClassVar[tuple[str, ...]] = ("columns",)

    def __post_init__(self) -> None:
        require_positive(self.rows, "rows of Columns")

    def check(self, shape: Shape, sparsity: float, module: str) -> None:
        """Groups must be whole, and not empty."""
        if shape.out_features % self.rows:
            reason = f"its {shape.out_features} outputs are no groups of {self.rows}"
            raise StructureMismatchError(module, reason, "choose another size")
        count_active(shape.in_features, sparsity, module, "column")

    # What training chooses among.

    def units_per_pool(self, shape: Shape, sparsity: float) -> int:
        """Inputs that a group keeps."""
        return count_active(shape.in_features, sparsity, "", "column")

    def unit_totals(self, scores: torch.Tensor) -> torch.Tensor:
        """Sums over the rows of each group, `[groups, in]`."""
        return self._grouped(scores).sum(1)

    def active_units(self, topology: Topology, shape: Shape) -> torch.Tensor:
        """Bool `[groups, in]`."""
        columns = topology[0].long()
        active = torch.zeros(len(columns), shape.in_features, dtype=torch.bool, device=columns.device)
        return active.scatter_(1, columns, value=True)

    def topology_of(self, active: torch.Tensor, shape: Shape) -> Topology:
        """The reverse of `active_units`."""
        return (active.nonzero()[:, 1].reshape(len(active), -1).int(),)

    # How active weights are stored.

    def pack(self, weight: torch.Tensor, topology: Topology) -> torch.Tensor:
        """`[out, in]` to `[groups, kept, rows]`."""
        grouped = self._grouped(weight)
        index = topology[0].long()[:, None].expand(-1, self.rows, -1)
        return grouped.gather(2, index).transpose(1, 2).contiguous()

    def unpack(self, values: torch.Tensor, topology: Topology, shape: Shape) -> torch.Tensor:
        """`[groups, kept, rows]` to `[out, in]`."""
        index = topology[0].long()[:, None].expand(-1, self.rows, -1)
        grouped = values.new_zeros(shape.out_features // self.rows, self.rows, shape.in_features)
        return grouped.scatter_(2, index, values.transpose(1, 2)).reshape(shape.out_features, shape.in_features)

    def check_topology(self, topology: Topology, shape: Shape) -> str | None:
        """What would be read or written out of bounds."""
        (columns,) = topology
        if not is_integer(columns) or columns.ndim != 2 or len(columns) != shape.out_features // self.rows:
            return f"columns must be integers [{shape.out_features // self.rows}, kept]"
        if bool(((columns < 0) | (columns >= shape.in_features)).any()):
            return f"columns must lie in [0, {shape.in_features})"
        return "the columns of a group must ascend" if bool((columns.long().diff(dim=1) <= 0).any()) else None

    def _grouped(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.reshape(-1, self.rows, weight.shape[1])


class ColumnsKernel(Format[Columns]):
    """A product that does not touch the zeros: gather the inputs of each group, then a batched product."""

    def forward(
        self, structure: Columns, x: torch.Tensor, values: torch.Tensor, topology: Topology, out_features: int
    ) -> torch.Tensor:
        """`x` [tokens, in] -> `x @ S.T` [tokens, out]."""
        return torch.bmm(_gathered(x, topology), values).transpose(0, 1).reshape(len(x), out_features)

    def input_gradient(
        self, structure: Columns, grad: torch.Tensor, values: torch.Tensor, topology: Topology, in_features: int
    ) -> torch.Tensor:
        """`grad` [tokens, out] -> `grad @ S` [tokens, in]."""
        grouped = grad.reshape(len(grad), len(values), structure.rows).transpose(0, 1)
        read = torch.bmm(grouped, values.transpose(1, 2)).transpose(0, 1).flatten(1)
        return grad.new_zeros(len(grad), in_features).index_add_(1, topology[0].flatten(), read)

    def value_gradient(
        self, structure: Columns, grad: torch.Tensor, x: torch.Tensor, values: torch.Tensor, topology: Topology
    ) -> torch.Tensor:
        """The gradient of the values, in their shape and dtype."""
        grouped = grad.reshape(len(grad), len(values), structure.rows).transpose(0, 1)
        return torch.bmm(_gathered(x, topology).transpose(1, 2), grouped).to(values.dtype)


def _gathered(x: torch.Tensor, topology: Topology) -> torch.Tensor:
    """The inputs that each group reads, `[groups, tokens, kept]`."""
    return x[:, topology[0]].transpose(0, 1)


padst.register_kernel("columns", ColumnsKernel())
