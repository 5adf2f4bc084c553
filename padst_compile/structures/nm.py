"""N of every M consecutive inputs, chosen per output row or shared by a group of rows (vector N:M, V:N:M)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from padst_compile.errors import SpecError, StructureMismatchError
from padst_compile.structures.base import Shape, Structure, Topology, check_padding, is_integer, padded, require_positive

_LARGEST_GROUP = 256  # an offset inside a group is stored in one byte


@dataclasses.dataclass(frozen=True)
class NM(Structure):
    """`n` of every `m` consecutive inputs are active; `vector` consecutive outputs share the choice.

    Stored as `offsets` uint8 `[row_groups, slots]`, the position inside the group of M (ascending), with
    `slots = n * ceil(in_features / m)`, and values `[row_groups, slots, vector]`:
    `W[g * vector + v, (s // n) * m + offsets[g, s]] = values[g, s, v]`.
    A last group of fewer than `m` inputs keeps `n` of those it has.

    Args:
        n: active inputs per group.
        m: size of a group, at most 256.
        vector: output rows that share one choice.
    """

    n: int
    m: int
    vector: int = 1

    kind: ClassVar[str] = "nm"
    index_names: ClassVar[tuple[str, ...]] = ("offsets",)

    def __post_init__(self) -> None:
        for name in ("n", "m", "vector"):
            require_positive(getattr(self, name), f"{name} of N:M")
        if self.n > self.m:
            raise SpecError(f"N:M keeps n of m inputs, so n <= m; got {self.n}:{self.m}")
        if self.m > _LARGEST_GROUP:
            raise SpecError(f"N:M supports groups of at most {_LARGEST_GROUP} inputs, got m={self.m}")

    def natural_sparsity(self) -> float:
        """`1 - n/m`: an N:M layer has no other."""
        return 1.0 - self.n / self.m

    def groups(self, shape: Shape) -> tuple[int, int]:
        """Groups of rows and groups of inputs."""
        return -(-shape.out_features // self.vector), -(-shape.in_features // self.m)

    def check(self, shape: Shape, sparsity: float, module: str) -> None:
        """See `Structure.check`: the last, shorter group must still hold `n` inputs, and one group must be whole."""
        row_groups, input_groups = self.groups(shape)
        check_padding(shape, row_groups * self.vector, input_groups * self.m, module, f"a vector of {self.vector}")
        tail = shape.in_features % self.m
        if shape.in_features < self.m or 0 < tail < self.n:
            nearest = _nearest_divisor(shape.in_features, self.m, self.n)
            raise StructureMismatchError(
                module,
                f"its {shape.in_features} inputs do not divide into groups of {self.m}: the last one has {tail}, fewer than "
                + (f"the {self.n} that {self.n}:{self.m} keeps" if tail < self.n else "one whole group"),
                "no m divides them; choose a smaller n or add the layer to ignore"
                if nearest is None
                else f"the nearest m that divides is {nearest}, as in NM({self.n}, {nearest})",
            )

    def units_per_pool(self, shape: Shape, sparsity: float) -> int:
        """See `Structure.units_per_pool`: every group of M inputs, for every group of rows, is a pool."""
        return self.n

    def unit_totals(self, scores: torch.Tensor) -> torch.Tensor:
        """See `Structure.unit_totals`: scores summed over the rows that share the choice."""
        groups = self._groups(scores)  # of one row they are its sums, and no copy: a dense weight is large
        return self._inside(groups.sum(1) if self.vector > 1 else groups.flatten(0, 1), scores.shape[1])

    def unit_totals_of_rows(self, scores: torch.Tensor, rows: torch.Tensor, out_features: int) -> torch.Tensor:
        """See `Structure.unit_totals_of_rows`: of the row groups that have any of the rows, `[groups, m]` in their order."""
        input_groups = self.groups(Shape(out_features, scores.shape[1]))[1]
        groups, owners = (rows // self.vector).unique(return_inverse=True)
        known = padded(scores, scores.shape[0], input_groups * self.m).reshape(-1, input_groups, self.m)
        totals = scores.new_zeros(len(groups), input_groups, self.m).index_add_(0, owners, known)
        return self._inside(totals, scores.shape[1])

    def grid_of_rows(self, totals: torch.Tensor, rows: torch.Tensor, shape: Shape) -> torch.Tensor:
        """See `Structure.grid_of_rows`."""
        row_groups, input_groups = self.groups(shape)
        whole = totals.new_zeros(row_groups, input_groups, self.m)
        whole[(rows // self.vector).unique()] = totals.reshape(-1, input_groups, self.m)
        return self._inside(whole, shape.in_features)

    def _inside(self, totals: torch.Tensor, in_features: int) -> torch.Tensor:
        """Totals `[row groups, input groups, m]` as a grid of units, -inf behind the last input feature; changes them."""
        tail = in_features % self.m
        if tail:
            totals[:, -1, tail:] = -torch.inf
        return totals.flatten(0, 1)

    def active_units(self, topology: Topology, shape: Shape) -> torch.Tensor:
        """See `Structure.active_units`."""
        row_groups, input_groups = self.groups(shape)
        kept = topology[0].long().reshape(row_groups * input_groups, self.n)
        active = torch.zeros(row_groups * input_groups, self.m, dtype=torch.bool, device=kept.device)
        return active.scatter_(1, kept, value=True)

    def topology_of(self, active: torch.Tensor, shape: Shape) -> Topology:
        """See `Structure.topology_of`."""
        row_groups, _ = self.groups(shape)
        return (active.nonzero()[:, 1].reshape(row_groups, -1).to(torch.uint8),)

    def pack(self, weight: torch.Tensor, topology: Topology) -> torch.Tensor:
        """See `Structure.pack`."""
        grouped = self._groups(weight)
        index = topology[0].long().reshape(grouped.shape[0], 1, grouped.shape[2], self.n).expand(-1, self.vector, -1, -1)
        return grouped.gather(-1, index).flatten(2).transpose(1, 2).contiguous()

    def unpack(self, values: torch.Tensor, topology: Topology, shape: Shape) -> torch.Tensor:
        """See `Structure.unpack`."""
        row_groups, input_groups = self.groups(shape)
        index = topology[0].long().reshape(row_groups, 1, input_groups, self.n).expand(-1, self.vector, -1, -1)
        grouped = values.new_zeros(row_groups, self.vector, input_groups, self.m)
        grouped.scatter_(-1, index, values.transpose(1, 2).reshape(row_groups, self.vector, input_groups, self.n))
        unpacked = grouped.reshape(row_groups * self.vector, input_groups * self.m)
        return unpacked[: shape.out_features, : shape.in_features].contiguous()

    def check_topology(self, topology: Topology, shape: Shape) -> str | None:
        """See `Structure.check_topology`."""
        row_groups, input_groups = self.groups(shape)
        (offsets,) = topology
        if offsets.shape != (row_groups, input_groups * self.n):
            return f"offsets must be [{row_groups}, {input_groups * self.n}], got {list(offsets.shape)}"
        if not is_integer(offsets):
            return f"offsets must hold integers, not {offsets.dtype}"
        grouped = offsets.long().reshape(row_groups, input_groups, self.n)
        widths = torch.full((input_groups, 1), self.m, device=offsets.device)
        widths[-1] = shape.in_features - (input_groups - 1) * self.m
        if bool(((grouped < 0) | (grouped >= widths)).any()):
            return f"offsets must stay inside their group of {self.m} inputs"
        return "the offsets of a group must ascend" if bool((grouped.diff(dim=-1) <= 0).any()) else None

    def input_columns(self, topology: Topology) -> torch.Tensor:
        """The input that every slot reads, int64 `[row_groups, slots]`."""
        (offsets,) = topology
        slots = torch.arange(offsets.shape[1], device=offsets.device)
        return offsets.long() + slots // self.n * self.m

    def to_string(self) -> str:
        """`nm:N:M` or `nm:N:M:VECTOR`."""
        return f"nm:{self.n}:{self.m}" + (f":{self.vector}" if self.vector != 1 else "")

    def _groups(self, weight: torch.Tensor) -> torch.Tensor:
        """A view of the zero-padded weight as `[row groups, vector, input groups, m]`."""
        row_groups, input_groups = self.groups(Shape(*weight.shape))
        whole = padded(weight, row_groups * self.vector, input_groups * self.m)
        return whole.reshape(row_groups, self.vector, input_groups, self.m)


def _nearest_divisor(size: int, wanted: int, above: int) -> int | None:
    """The divisor of `size` above `above` (that many of it would be dense) closest to `wanted`; the smaller of two as close."""
    divisors = [d for d in range(above + 1, min(size, _LARGEST_GROUP) + 1) if size % d == 0]
    return min(divisors, key=lambda d: (abs(d - wanted), d), default=None)
