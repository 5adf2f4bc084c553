"""Dense blocks at chosen places of a grid: the structure of DSB, Pixelated Butterfly and block RigL."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from padst_compile.errors import SpecError
from padst_compile.structures.base import (
    Shape,
    Structure,
    Topology,
    check_padding,
    count_active,
    not_indices,
    padded,
    require_positive,
)


@dataclasses.dataclass(frozen=True)
class Block(Structure):
    """Blocks of `rows` outputs by `columns` inputs; `Block(64)` is square, `Block((32, 64))` is not.

    Stored as block compressed rows: `row_pointers` int32 `[row_count + 1]`, `columns` int32 `[blocks]` (ascending within a
    row), values `[blocks, columns, rows]`: each block transposed, as a batch-reduce GEMM reads it. Edge blocks of a size
    that does not divide are padded with zeros that are never used.

    Args:
        size: side of a square block, or (rows, columns).
    """

    size: int | tuple[int, int]

    kind: ClassVar[str] = "block"
    index_names: ClassVar[tuple[str, ...]] = ("row_pointers", "columns")

    def __post_init__(self) -> None:
        sides = (self.size, self.size) if isinstance(self.size, int) else self.size
        if not isinstance(sides, (tuple, list)) or len(sides) != 2:
            raise SpecError(f"Block takes a size or (rows, columns), got {self.size!r}")
        object.__setattr__(self, "size", tuple(require_positive(side, "the size of a block") for side in sides))

    @property
    def rows(self) -> int:
        """Outputs per block."""
        return self.size[0] if isinstance(self.size, tuple) else self.size

    @property
    def columns(self) -> int:
        """Inputs per block."""
        return self.size[1] if isinstance(self.size, tuple) else self.size

    def grid(self, shape: Shape) -> tuple[int, int]:
        """Blocks along the outputs and along the inputs."""
        return -(-shape.out_features // self.rows), -(-shape.in_features // self.columns)

    def check(self, shape: Shape, sparsity: float, module: str) -> None:
        """See `Structure.check`: at least one block must stay."""
        row_count, column_count = self.grid(shape)
        check_padding(shape, row_count * self.rows, column_count * self.columns, module, f"a {self.rows}x{self.columns} block")
        count_active(row_count * column_count, sparsity, module, f"{self.rows}x{self.columns} block")

    def units_per_pool(self, shape: Shape, sparsity: float) -> int:
        """See `Structure.units_per_pool`: all blocks are one pool."""
        row_count, column_count = self.grid(shape)
        return count_active(row_count * column_count, sparsity, "", "block")

    def unit_totals(self, scores: torch.Tensor) -> torch.Tensor:
        """See `Structure.unit_totals`: the L1 score of structured DynSparse (Dietrich et al. 2021) for magnitudes."""
        return self._tiles(scores).sum((1, 3)).reshape(1, -1)

    def unit_totals_of_rows(self, scores: torch.Tensor, rows: torch.Tensor, out_features: int) -> torch.Tensor:
        """See `Structure.unit_totals_of_rows`; takes no dense memory."""
        row_count, column_count = self.grid(Shape(out_features, scores.shape[1]))
        whole = padded(scores, scores.shape[0], column_count * self.columns)
        across = whole.reshape(-1, column_count, self.columns).sum(2)
        return across.new_zeros(row_count, column_count).index_add_(0, rows // self.rows, across).reshape(1, -1)

    def active_units(self, topology: Topology, shape: Shape) -> torch.Tensor:
        """See `Structure.active_units`."""
        row_count, column_count = self.grid(shape)
        active = torch.zeros(1, row_count * column_count, dtype=torch.bool, device=topology[1].device)
        active[0, self.block_rows(topology) * column_count + topology[1].long()] = True
        return active

    def topology_of(self, active: torch.Tensor, shape: Shape) -> Topology:
        """See `Structure.topology_of`."""
        row_count, column_count = self.grid(shape)
        grid = active.reshape(row_count, column_count)
        row_pointers = torch.zeros(row_count + 1, dtype=torch.int32, device=active.device)
        row_pointers[1:] = grid.sum(1).cumsum(0)
        return row_pointers, grid.nonzero()[:, 1].int()

    def pack(self, weight: torch.Tensor, topology: Topology) -> torch.Tensor:
        """See `Structure.pack`."""
        _, columns = topology
        return self._tiles(weight)[self.block_rows(topology), :, columns.long()].transpose(1, 2).contiguous()

    def unpack(self, values: torch.Tensor, topology: Topology, shape: Shape) -> torch.Tensor:
        """See `Structure.unpack`."""
        row_count, column_count = self.grid(shape)
        tiles = values.new_zeros(row_count, self.rows, column_count, self.columns)
        tiles[self.block_rows(topology), :, topology[1].long()] = values.transpose(1, 2)
        unpacked = tiles.reshape(row_count * self.rows, column_count * self.columns)
        return unpacked[: shape.out_features, : shape.in_features].contiguous()

    def check_topology(self, topology: Topology, shape: Shape) -> str | None:
        """See `Structure.check_topology`."""
        row_pointers, columns = topology
        row_count, column_count = self.grid(shape)
        wrong = not_indices(row_pointers=row_pointers, columns=columns)
        if wrong is not None:
            return wrong
        if row_pointers.numel() != row_count + 1 or int(row_pointers[0]) != 0 or int(row_pointers[-1]) != columns.numel():
            return f"row_pointers must run from 0 to the {columns.numel()} blocks over {row_count} block rows"
        if bool((row_pointers.diff() < 0).any()):
            return "row_pointers must not decrease"
        if bool(((columns < 0) | (columns >= column_count)).any()):
            return f"columns must lie in [0, {column_count})"
        cells = self.block_rows(topology) * column_count + columns.long()
        return "the columns of a block row must ascend, each at most once" if bool((cells.diff() <= 0).any()) else None

    def block_rows(self, topology: Topology) -> torch.Tensor:
        """The block row of every block, int64 `[blocks]`."""
        row_pointers, columns = topology
        rows = torch.arange(row_pointers.numel() - 1, device=columns.device)
        return torch.repeat_interleave(rows, row_pointers.diff().long(), output_size=columns.numel())

    @classmethod
    def from_sizes(cls, sizes: Sequence[int]) -> Block:
        """See `Structure.from_sizes`: one number, or rows and columns."""
        rows, columns = sizes if len(sizes) != 1 else (sizes[0], sizes[0])
        return cls((rows, columns))

    def to_string(self) -> str:
        """`block:ROWSxCOLUMNS`."""
        return f"block:{self.rows}x{self.columns}"

    def to_dict(self) -> dict[str, Any]:
        """JSON form; the size is always a pair."""
        return {"kind": self.kind, "size": [self.rows, self.columns]}

    def _tiles(self, weight: torch.Tensor) -> torch.Tensor:
        """A view of the zero-padded weight as `[block rows, rows, block columns, columns]`."""
        row_count, column_count = self.grid(Shape(*weight.shape))
        whole = padded(weight, row_count * self.rows, column_count * self.columns)
        return whole.reshape(row_count, self.rows, column_count, self.columns)
