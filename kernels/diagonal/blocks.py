"""Diagonals in whole residue classes are dense blocks under a stride permutation.

`Diagonal(group=g)` keeps whole classes of offsets mod `stride = length / g`, and `stride` divides both sides. So whether
`W[i, j]` is active depends on the residues of `i` and `j` mod `stride` alone. Read class by class,

    i = a + stride * u,  a < stride,        j = c + stride * v,  c < stride,

the weight is a grid of `stride` by `stride` blocks, each of them `out / stride` by `in / stride`, dense or empty, and every
row of the grid holds as many as there are classes kept. The stride permutations join the tables of the layer, the packed
values are reordered, and what is left is a block product.
"""

from __future__ import annotations

import dataclasses

import torch

from padst_compile.permutation import INDEX_DTYPE
from padst_compile.structures import Block, Diagonal, Shape, Topology, parse


@dataclasses.dataclass(frozen=True)
class BlockTables:
    """How diagonals lie in blocks; all that follows from their offsets.

    Args:
        structure: blocks of `out / stride` by `in / stride`.
        topology: `row_pointers` and `columns`, int32; every block row holds equally many.
        entries: int32 `[values]`, which of the diagonals' values each of the blocks' values is.
        input_permutation: int32 `[in_features]`, before the block product.
        output_permutation: int32 `[out_features]`, after it.
    """

    structure: Block
    topology: Topology
    entries: torch.Tensor
    input_permutation: torch.Tensor
    output_permutation: torch.Tensor

    def blocks(self, values: torch.Tensor) -> torch.Tensor:
        """The blocks `[blocks, columns, rows]` that hold the values `[diagonals, length]` of the diagonals."""
        sizes = (-1, self.structure.columns, self.structure.rows)
        return values.flatten().index_select(0, self.entries).reshape(sizes)

    def diagonals(self, blocks: torch.Tensor) -> torch.Tensor:
        """The values of the diagonals, one after the other, that `blocks` made these blocks of."""
        return blocks.new_empty(blocks.numel()).scatter(0, self.entries.long(), blocks.flatten())


def block_size(structure: Diagonal, shape: Shape) -> Block:
    """The blocks that the diagonals of a layer fold into, if they were chosen in classes (`group > 1`)."""
    stride = structure.classes(shape)
    return Block((shape.out_features // stride, shape.in_features // stride))


def block_tables(structure: Diagonal, topology: Topology, shape: Shape) -> BlockTables:
    """The tables of diagonals in residue classes; nothing waits for the device that the offsets are on.

    Args:
        structure: with `group > 1`.
        topology: the offsets, int32 `[diagonals]`, whole classes as `Diagonal.check_topology` demands.
        shape: of the layer; `Diagonal.check` accepted it.
    """
    stride, (offsets,) = structure.classes(shape), topology
    columns, entries = _entries(structure, offsets, shape)
    pointers = torch.arange(stride + 1, dtype=INDEX_DTYPE, device=offsets.device) * columns.shape[1]
    return BlockTables(
        block_size(structure, shape),
        (pointers, columns.flatten()),
        entries,
        _read_by_class(shape.in_features, stride, offsets.device),
        _write_by_class(shape.out_features, stride, offsets.device),
    )


@torch.library.custom_op("padst::diagonal_blocks", mutates_args=())
def diagonal_blocks(offsets: torch.Tensor, out_features: int, in_features: int, structure: str) -> list[torch.Tensor]:
    """`block_tables` for graphs: row pointers, columns, entries, input permutation and output permutation."""
    parsed = parse(structure)
    assert isinstance(parsed, Diagonal)
    tables = block_tables(parsed, (offsets,), Shape(out_features, in_features))
    return [*tables.topology, tables.entries, tables.input_permutation, tables.output_permutation]


@diagonal_blocks.register_fake
def _diagonal_blocks_fake(offsets: torch.Tensor, out_features: int, in_features: int, structure: str) -> list[torch.Tensor]:
    parsed, shape = parse(structure), Shape(out_features, in_features)
    assert isinstance(parsed, Diagonal)
    stride = parsed.classes(shape)
    kept = offsets.shape[0] // (max(out_features, in_features) // stride)
    sizes = (stride + 1, stride * kept, offsets.shape[0] * min(out_features, in_features), in_features, out_features)
    return [offsets.new_empty(size, dtype=INDEX_DTYPE) for size in sizes]


def _read_by_class(features: int, stride: int, device: torch.device) -> torch.Tensor:
    """Entry `c * (features / stride) + v` is `c + stride * v`."""
    return torch.arange(features, dtype=INDEX_DTYPE, device=device).reshape(-1, stride).T.flatten()


def _write_by_class(features: int, stride: int, device: torch.device) -> torch.Tensor:
    """Entry `a + stride * u` is `a * (features / stride) + u`: the inverse of `_read_by_class`."""
    return torch.arange(features, dtype=INDEX_DTYPE, device=device).reshape(stride, -1).T.flatten()


def _entries(structure: Diagonal, offsets: torch.Tensor, shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """Column of every block `[stride, classes kept]`, and which value each entry of each block is `[values]`; int32.

    Call the side with fewer features the short one: a value lies at the position of its short index, on the diagonal
    `long - short`. For residues `l` and `s` and steps `p` and `q` along the two sides that is
    `(l - s) mod stride + stride * ((p - q - [l < s]) mod turns)`, because the period is `turns * stride`.
    """
    wide = shape.in_features >= shape.out_features
    stride = structure.classes(shape)
    length, turns = min(shape.out_features, shape.in_features), max(shape.out_features, shape.in_features) // stride
    kept = offsets[: offsets.numel() // turns]  # offsets ascend, so the residues themselves come first
    rows = torch.arange(stride, dtype=INDEX_DTYPE, device=offsets.device)[:, None]
    columns = ((rows + kept if wide else rows - kept) % stride).sort(dim=1).values
    long, short = (columns, rows) if wide else (rows, columns)
    rank = torch.searchsorted(kept, (long - short) % stride, out_int32=True)
    first = rank * length + short

    p = torch.arange(turns, dtype=INDEX_DTYPE, device=offsets.device)[:, None]
    q = torch.arange(structure.group, dtype=INDEX_DTYPE, device=offsets.device)
    borrowed = torch.stack([((p - q - borrow) % turns) * kept.numel() * length + stride * q for borrow in (0, 1)])
    steps = (borrowed if wide else borrowed.transpose(1, 2)).flatten(1)
    entries = steps.index_select(0, (long < short).flatten().int()) + first.flatten()[:, None]
    return columns, entries.flatten()
