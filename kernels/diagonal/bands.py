"""Diagonals whose offsets are runs, or arithmetic progressions, are bands of blocks when features are read along the step.

Let `period` be the longer side, `step` the difference of the progressions, and

    classes = gcd(step, period),        length = period / classes.

Adding `step` again and again to a residue `c < classes` leads through every index of its class: `c + step * v mod period`
comes at place `v < length`. Read in this order, class by class, the diagonals `o, o + step, ..., o + (w - 1) * step` tie place
`u` of a class of the shorter side to the places `u + m, ..., u + m + w - 1` of a class of the longer one: a band, `w` wide. Cut
into blocks, it fills the more of them the wider it is, and all of them where the progression is a whole class: then it is what
`Diagonal(group=g)` folds into (`blocks.py`). Along a step of 1 features keep their order.

The shorter side of a layer that is not square has fewer indices than the period. It is read in the same way where `step`
divides both sides.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from padst_compile.permutation import INDEX_DTYPE, inverse, is_identity
from padst_compile.structures import Block, Diagonal, Shape, Topology


@dataclasses.dataclass(frozen=True)
class Bands:
    """How to read a layer so that its diagonals lie in few blocks.

    Args:
        step: the difference along which features are read; where the sides differ, it divides both.
        shift: by how many places each class of the longer side begins later, so that bands begin where blocks do.
        blocks: what the reordered weight is cut into.
    """

    step: int
    shift: int
    blocks: Block

    def input_places(self, shape: Shape) -> torch.Tensor:
        """At which place each input is read, int32 `[in_features]`."""
        return self._places(shape.in_features, shape, self.shift if shape.in_features >= shape.out_features else 0)

    def output_places(self, shape: Shape) -> torch.Tensor:
        """At which place each output is made, int32 `[out_features]`."""
        return self._places(shape.out_features, shape, self.shift if shape.out_features > shape.in_features else 0)

    def moves_inputs(self, shape: Shape) -> bool:
        """Whether inputs are read in another order than theirs."""
        return not is_identity(self.input_places(shape))

    def moves_outputs(self, shape: Shape) -> bool:
        """Whether outputs are made in another order than theirs."""
        return not is_identity(self.output_places(shape))

    def _places(self, features: int, shape: Shape, shift: int) -> torch.Tensor:
        period = max(shape.out_features, shape.in_features)
        classes = math.gcd(self.step, period)
        undone = pow(self.step // classes, -1, period // classes)
        places: torch.Tensor = place(torch.arange(features), classes, features // classes, undone, shift)
        return places.to(INDEX_DTYPE)


def place(index: Any, classes: Any, length: Any, undone: Any, shift: Any) -> Any:
    """The place of an index that is read along a step, for integers, tensors of them, and the symbols that a proof is about.

    Args:
        index: of a feature.
        classes: gcd of the step and the period.
        length: indices of a class.
        undone: what `step / classes` must be multiplied by to give 1 modulo `length`.
        shift: by how many places the class begins later.
    """
    return index % classes * length + (index // classes * undone - shift) % length


@dataclasses.dataclass(frozen=True)
class BandTables:
    """The blocks of one set of diagonals.

    Args:
        topology: `row_pointers` and `columns`, int32.
        entries: int32 `[blocks * columns * rows]`, which of the diagonals' values each of the blocks' values is; one past the
            last where a block holds a zero.
        input_permutation: int32 `[in_features]`, before the block product.
        output_permutation: int32 `[out_features]`, after it.
    """

    topology: Topology
    entries: torch.Tensor
    input_permutation: torch.Tensor
    output_permutation: torch.Tensor

    def blocks(self, values: torch.Tensor, structure: Block) -> torch.Tensor:
        """The blocks `[blocks, columns, rows]` that hold the values `[diagonals, length]` of the diagonals, and zeros."""
        padded = torch.nn.functional.pad(values.flatten(), (0, 1))
        return padded.index_select(0, self.entries).reshape(-1, structure.columns, structure.rows)


def band_tables(bands: Bands, offsets: torch.Tensor, shape: Shape) -> BandTables:
    """Where diagonals lie in blocks.

    Args:
        bands: how to read them.
        offsets: int32 `[diagonals]`, see `Diagonal`.
        shape: of the layer.
    """
    device, (height, width) = offsets.device, (bands.blocks.rows, bands.blocks.columns)
    at_input, at_output = bands.input_places(shape).to(device), bands.output_places(shape).to(device)
    rows, columns = Diagonal().positions((offsets,), shape)
    row, column = at_output[rows].flatten(), at_input[columns].flatten()
    block_rows, block_columns = bands.blocks.grid(shape)
    occupied, block = (row // height * block_columns + column // width).unique(return_inverse=True)
    entries = torch.full((occupied.numel() * height * width,), row.numel(), dtype=INDEX_DTYPE, device=device)
    entries[(block * width + column % width) * height + row % height] = torch.arange(
        row.numel(), dtype=INDEX_DTYPE, device=device
    )
    starts = torch.arange(block_rows + 1, dtype=INDEX_DTYPE, device=device) * block_columns
    topology = torch.searchsorted(occupied, starts, out_int32=True), occupied % block_columns
    return BandTables(topology, entries, inverse(at_input), at_output)


@torch.library.custom_op("padst::diagonal_bands", mutates_args=())
def diagonal_bands(
    offsets: torch.Tensor, out_features: int, in_features: int, step: int, shift: int, rows: int, columns: int, blocks: int
) -> list[torch.Tensor]:
    """`band_tables` for graphs: row pointers, columns, entries, input permutation and output permutation.

    Args:
        offsets: int32 `[diagonals]`.
        out_features: outputs of the layer.
        in_features: inputs of the layer.
        step: see `Bands`, as are the next three.
        shift: of the longer side.
        rows: outputs of a block.
        columns: inputs of a block.
        blocks: how many blocks these offsets take.
    """
    tables = band_tables(Bands(step, shift, Block((rows, columns))), offsets, Shape(out_features, in_features))
    assert tables.topology[1].numel() == blocks
    return [*tables.topology, tables.entries, tables.input_permutation, tables.output_permutation]


@diagonal_bands.register_fake
def _diagonal_bands_fake(
    offsets: torch.Tensor, out_features: int, in_features: int, step: int, shift: int, rows: int, columns: int, blocks: int
) -> list[torch.Tensor]:
    sizes = (-(-out_features // rows) + 1, blocks, blocks * rows * columns, in_features, out_features)
    return [offsets.new_empty(size, dtype=INDEX_DTYPE) for size in sizes]
