"""The block product as anyone would write it down."""

from __future__ import annotations

import torch

from padst_compile.structures import Block, Shape, Topology


def block_linear(
    structure: Block, x: torch.Tensor, values: torch.Tensor, topology: Topology, out_features: int
) -> torch.Tensor:
    """`x` [tokens, in] -> `x @ S.T` [tokens, out], one small matrix product per active block."""
    row_pointers, columns = (index.tolist() for index in topology)
    rows, width = structure.rows, structure.columns
    row_count, column_count = structure.grid(Shape(out_features, x.shape[1]))
    padded = x.new_zeros(x.shape[0], column_count * width)
    padded[:, : x.shape[1]] = x
    y = x.new_zeros(x.shape[0], row_count * rows)
    for row in range(row_count):
        for k in range(row_pointers[row], row_pointers[row + 1]):
            tile = padded[:, columns[k] * width : (columns[k] + 1) * width]
            y[:, row * rows : (row + 1) * rows] += tile @ values[k]
    return y[:, :out_features]
