"""The diagonal product as anyone would write it down."""

from __future__ import annotations

import torch

from padst_compile.structures import Diagonal, Topology


def diagonal_linear(
    structure: Diagonal, x: torch.Tensor, values: torch.Tensor, topology: Topology, out_features: int
) -> torch.Tensor:
    """`x` [tokens, in] -> `x @ S.T` [tokens, out], one shifted multiply-add per diagonal."""
    in_features = x.shape[1]
    y = x.new_zeros(x.shape[0], out_features)
    for offset, diagonal in zip(topology[0].tolist(), values, strict=True):
        steps = torch.arange(diagonal.numel())
        if in_features >= out_features:
            y += x[:, (steps + offset) % in_features] * diagonal
        else:
            y[:, (steps + offset) % out_features] += x * diagonal
    return y
