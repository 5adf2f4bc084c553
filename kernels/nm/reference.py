"""The N:M product as anyone would write it down."""

from __future__ import annotations

import torch

from padst_compile.structures import NM, Topology


def nm_linear(structure: NM, x: torch.Tensor, values: torch.Tensor, topology: Topology, out_features: int) -> torch.Tensor:
    """`x` [tokens, in] -> `x @ S.T` [tokens, out], one gathered dot product per output."""
    columns = structure.input_columns(topology)
    y = x.new_zeros(x.shape[0], out_features)
    for i in range(out_features):
        group, member = divmod(i, structure.vector)
        y[:, i] = x[:, columns[group]] @ values[group, :, member]
    return y
