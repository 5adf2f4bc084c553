"""What every sparsity structure answers: which weights may be active together, and how the active ones are stored.

A structure works on a weight `[out_features, in_features]`. Its *topology* is a tuple of index tensors that says which
weights are active; its *values* are the active weights alone, packed.

What is active or not as a whole is a *unit*: a block, a position of an N:M group, a class of diagonals, a weight. Units lie in
*pools*, each of which keeps the number of its active units: one pool for the layer, or one per N:M group. So a grid
`[pools, units]` describes every structure to whoever chooses among units.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, TypeAlias

import torch

from padst_compile.errors import EmptyLayerError, NoUnitsError, SpecError, StructureMismatchError

Topology: TypeAlias = tuple[torch.Tensor, ...]


@dataclasses.dataclass(frozen=True)
class Shape:
    """The size of a linear layer: its weight is `[out_features, in_features]`."""

    out_features: int
    in_features: int

    @property
    def numel(self) -> int:
        """Weights of the dense layer."""
        return self.out_features * self.in_features


@dataclasses.dataclass(frozen=True)
class Structure(abc.ABC):
    """A family of masks, as configuration. Subclasses are frozen dataclasses with integer fields.

    A subclass defines either its units, by the four methods about them, or `choose`. Without units its topology cannot change
    while a model trains.

    Attributes:
        kind: its name in short forms and JSON.
        index_names: the names of its index tensors, at least one, in the order in which a topology lists them.
    """

    kind: ClassVar[str]
    index_names: ClassVar[tuple[str, ...]]

    @abc.abstractmethod
    def check(self, shape: Shape, sparsity: float, module: str) -> None:
        """Refuse what cannot be built.

        Raises:
            StructureMismatchError: the structure does not fit `shape`.
            EmptyLayerError: nothing would be active at `sparsity`.
        """

    def choose(self, scores: torch.Tensor, sparsity: float) -> Topology:
        """The topology that keeps the largest total of `scores` `[out, in]` (non-negative) at `sparsity`."""
        shape = Shape(*scores.shape)
        totals = self.unit_totals(scores)
        return self.topology_of(largest(totals, self.units_per_pool(shape, sparsity)), shape)

    def units_per_pool(self, shape: Shape, sparsity: float) -> int:
        """Active units in each pool at `sparsity`."""
        raise NoUnitsError(self.kind)

    def unit_totals(self, scores: torch.Tensor) -> torch.Tensor:
        """Sums of `scores` `[out, in]` over each unit, `[pools, units]`; -inf where a unit lies outside the layer."""
        raise NoUnitsError(self.kind)

    def unit_totals_of_rows(self, scores: torch.Tensor, rows: torch.Tensor, out_features: int) -> torch.Tensor:
        """`unit_totals` of scores that are known of some output rows, and zero in the others, for `grid_of_rows`.

        By default they are the grid. A structure with units of few rows leaves out those without any of `rows`, so that what
        is collected takes no more memory than its sample.

        Args:
            scores: `[rows, in]`.
            rows: int64 `[rows]`, which they are, each once.
            out_features: of the layer.
        """
        whole = scores.new_zeros(out_features, scores.shape[1])
        whole[rows] = scores
        return self.unit_totals(whole)

    def grid_of_rows(self, totals: torch.Tensor, rows: torch.Tensor, shape: Shape) -> torch.Tensor:
        """All units, `[pools, units]`, from what `unit_totals_of_rows` gave for the same rows; zero where it left them out."""
        return totals

    def active_units(self, topology: Topology, shape: Shape) -> torch.Tensor:
        """Which units are active, bool `[pools, units]`."""
        raise NoUnitsError(self.kind)

    def topology_of(self, active: torch.Tensor, shape: Shape) -> Topology:
        """The topology of a grid of units, bool `[pools, units]`; the inverse of `active_units`."""
        raise NoUnitsError(self.kind)

    @abc.abstractmethod
    def pack(self, weight: torch.Tensor, topology: Topology) -> torch.Tensor:
        """The active entries of a dense `weight` `[out, in]`, in the layout the kernels read."""

    @abc.abstractmethod
    def unpack(self, values: torch.Tensor, topology: Topology, shape: Shape) -> torch.Tensor:
        """The dense weight `[out, in]` that has `values` at the active positions and zeros elsewhere."""

    @abc.abstractmethod
    def check_topology(self, topology: Topology, shape: Shape) -> str | None:
        """What is wrong with index tensors from a file or a user, or None."""

    def natural_sparsity(self) -> float | None:
        """The sparsity that the structure itself fixes, or None where it is free."""
        return None

    @classmethod
    def has_units(cls) -> bool:
        """Whether it says what is active or not as a whole."""
        return not any(getattr(cls, name) is getattr(Structure, name) for name in UNIT_METHODS)

    @classmethod
    def from_sizes(cls, sizes: Sequence[int]) -> Structure:
        """The structure of a short form's numbers, the reverse of `to_string`.

        Raises:
            TypeError, ValueError: not these numbers.
        """
        return cls(*sizes)

    def to_string(self) -> str:
        """The short form, as on the command line (`block:64x64`): by default `kind:FIELD:FIELD`; `from_sizes` reads it back."""
        return ":".join(map(str, (self.kind, *dataclasses.astuple(self))))

    def to_dict(self) -> dict[str, Any]:
        """JSON form: `kind` and the fields."""
        return {"kind": self.kind, **dataclasses.asdict(self)}


_MOST_PADDING = 64  # times the weight
_SMALL_LAYER = 1 << 12  # weights, below which padding is cheap
UNIT_METHODS = ("units_per_pool", "unit_totals", "active_units", "topology_of")


def count_active(total: int, sparsity: float, module: str, unit: str) -> int:
    """How many of `total` units stay active.

    Raises:
        EmptyLayerError: none would.
    """
    count = round((1.0 - sparsity) * total)
    if count == 0:
        highest = 1.0 - 1.0 / total if total > 1 else 0.0
        digits = max(4, len(str(total)))  # fewer could round up to a sparsity that leaves nothing
        raise EmptyLayerError(
            module,
            f"sparsity {sparsity:g} leaves none of its {total} {unit}{'s' if total != 1 else ''} active",
            f"use a sparsity of at most {highest:.{digits}g}, a finer structure, or add the layer to ignore",
        )
    return count


def check_padding(shape: Shape, rows: int, columns: int, module: str, unit: str) -> None:
    """Refuse units so much larger than a layer that it would be mostly padding, which takes memory.

    Args:
        shape: of the layer.
        rows: outputs with padding.
        columns: inputs with padding.
        module: the layer's name.
        unit: what is that large, for the message.

    Raises:
        StructureMismatchError: they are.
    """
    if rows * columns > _MOST_PADDING * max(shape.numel, _SMALL_LAYER):
        raise StructureMismatchError(
            module,
            f"{unit} would pad its {shape.out_features}x{shape.in_features} weight to {rows}x{columns}",
            "use a smaller size, or add the layer to ignore",
        )


def require_positive(value: object, what: str) -> int:
    """`value` if it is a positive int.

    Raises:
        SpecError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SpecError(f"{what} must be a positive integer, got {value!r}")
    return value


def not_indices(**tensors: torch.Tensor) -> str | None:
    """What keeps tensors from being lists of indices (integers, one dimension), or None."""
    for name, tensor in tensors.items():
        if not is_integer(tensor):
            return f"{name} must hold integers, not {tensor.dtype}"
        if tensor.ndim != 1:
            return f"{name} must have one dimension, got {list(tensor.shape)}"
    return None


def is_integer(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds integers; truth values are none."""
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def largest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Where the `count` largest entries of each row lie, bool in the shape of `scores`; ties go to the lower position."""
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order[..., :count], value=True)


def padded(weight: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """`weight` `[out, in]` with zeros below and to the right up to `[rows, columns]`; itself where it has that size."""
    bottom, right = rows - weight.shape[0], columns - weight.shape[1]
    if bottom == right == 0:  # torch would copy, and a dense weight is large
        return weight
    return torch.nn.functional.pad(weight, (0, right, 0, bottom))
