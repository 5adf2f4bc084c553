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

from padst_compile.permutation import INDEX_DTYPE, compose
from padst_compile.structures import Block, Diagonal, Shape, Topology


@dataclasses.dataclass(frozen=True)
class BlockForm:
    """A block product that equals a diagonal one: `permute(permute(x, input_permutation) @ S.T, output_permutation)`.

    Args:
        structure: blocks of `out / stride` by `in / stride`.
        values: `[blocks, columns, rows]`, as `Block` packs them.
        topology: `row_pointers` and `columns`, int32; every block row holds equally many.
        input_permutation: int32 `[in_features]`.
        output_permutation: int32 `[out_features]`.
    """

    structure: Block
    values: torch.Tensor
    topology: Topology
    input_permutation: torch.Tensor
    output_permutation: torch.Tensor


def folds(structure: Diagonal, smallest: int) -> bool:
    """Whether a structure's blocks have at least `smallest` rows and columns; free diagonals have none."""
    return structure.group >= max(smallest, 2)


def block_form(
    structure: Diagonal,
    values: torch.Tensor,
    topology: Topology,
    shape: Shape,
    input_permutation: torch.Tensor | None = None,
    output_permutation: torch.Tensor | None = None,
) -> BlockForm:
    """The block product that `structure` with these tables is.

    Nothing waits for the device: all that depends on the offsets is computed where they are.

    Args:
        structure: diagonals in residue classes, `group > 1`.
        values: `[diagonals, length]`.
        topology: the offsets, whole classes as `Diagonal.check_topology` demands.
        shape: of the layer; `Diagonal.check` accepted it.
        input_permutation: int32 `[in_features]`, applied before the product, or None.
        output_permutation: int32 `[out_features]`, applied after it, or None.
    """
    stride = structure.classes(shape)
    into, out = _read_by_class(shape.in_features, stride, values), _write_by_class(shape.out_features, stride, values)
    columns, index = _blocks(structure, topology[0], shape)
    pointers = torch.arange(stride + 1, dtype=INDEX_DTYPE, device=values.device) * columns.shape[1]
    return BlockForm(
        Block((shape.out_features // stride, shape.in_features // stride)),
        values.reshape(-1)[index].contiguous(),
        (pointers, columns.flatten().to(INDEX_DTYPE)),
        into if input_permutation is None else compose(input_permutation, into),
        out if output_permutation is None else compose(out, output_permutation),
    )


def diagonal_values(structure: Diagonal, blocks: torch.Tensor, topology: Topology, shape: Shape) -> torch.Tensor:
    """The values `[diagonals, length]` that `block_form` turns into `blocks` `[blocks, columns, rows]`."""
    _, index = _blocks(structure, topology[0], shape)
    values = blocks.new_empty(blocks.numel()).scatter(0, index.flatten(), blocks.flatten())
    return values.reshape(topology[0].numel(), -1)


def _read_by_class(features: int, stride: int, like: torch.Tensor) -> torch.Tensor:
    """Entry `c * (features / stride) + v` is `c + stride * v`."""
    return torch.arange(features, dtype=INDEX_DTYPE, device=like.device).reshape(-1, stride).T.flatten()


def _write_by_class(features: int, stride: int, like: torch.Tensor) -> torch.Tensor:
    """Entry `a + stride * u` is `a * (features / stride) + u`: the inverse of `_read_by_class`."""
    return torch.arange(features, dtype=INDEX_DTYPE, device=like.device).reshape(stride, -1).T.flatten()


def _blocks(structure: Diagonal, offsets: torch.Tensor, shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """Column of every block `[stride, classes kept]`, and which value each entry is `[blocks, columns, rows]`; int64.

    Call the side with fewer features the short one: a value lies at the position of its short index, on the diagonal
    `long - short`. For residues `l` and `s` and steps `p` and `q` along the two sides that is
    `(l - s) mod stride + stride * ((p - q - [l < s]) mod turns)`, because the period is `turns * stride`.
    """
    wide = shape.in_features >= shape.out_features
    stride = structure.classes(shape)
    length, turns = min(shape.out_features, shape.in_features), max(shape.out_features, shape.in_features) // stride
    kept = offsets.long()[: offsets.numel() // turns]  # offsets ascend, so the residues themselves come first
    rows = torch.arange(stride, device=offsets.device)[:, None]
    columns = ((rows + kept if wide else rows - kept) % stride).sort(dim=1).values
    long, short = (columns, rows) if wide else (rows, columns)
    rank = torch.searchsorted(kept, (long - short) % stride)
    first = rank * length + short

    p, q = torch.arange(turns, device=offsets.device)[:, None], torch.arange(structure.group, device=offsets.device)
    borrowed = torch.stack([((p - q - borrow) % turns) * kept.numel() * length + stride * q for borrow in (0, 1)])
    steps = borrowed if wide else borrowed.transpose(1, 2)
    return columns, (steps[(long < short).long()] + first[..., None, None]).flatten(0, 1)
