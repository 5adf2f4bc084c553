"""Moves weights, gradients and optimizer state of a layer to another topology, or to another order of its features.

Every tensor goes the same way, one at a time: to its place in the dense weight, there under the new order, and back under the
new topology. So what is active before and after keeps its value, what grows starts at zero, and the largest temporary is one
dense weight. Everything is written in place: compiled programs, optimizers and users keep their references.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from padst_compile import permutation
from padst_compile.layers import PermutedSparseLinear
from padst_compile.structures import Topology
from padst_compile.training.sharding import whole, write


def companions(parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    """What lies beside each entry of a parameter: its gradient and every optimizer state of its shape (moments, momenta)."""
    if parameter.grad is not None:
        yield parameter.grad
    for state in optimizer.state.get(parameter, {}).values():
        if isinstance(state, torch.Tensor) and state.shape == parameter.shape:
            yield state


def change_topology(layer: PermutedSparseLinear, optimizer: torch.optim.Optimizer, topology: Topology) -> None:
    """Make `topology`, of the same shapes, the layer's own."""
    _move(layer, optimizer, topology, None)


def reorder_features(layer: PermutedSparseLinear, optimizer: torch.optim.Optimizer, order: torch.Tensor) -> None:
    """Let the features of the permuted side change places under the same topology.

    Place `s` of S then belongs to the feature that place `order[s]` belonged to, and the layer's permutation follows, so what a
    weight connects stays the same; weights whose new place is not active are lost.

    Args:
        layer: with a permutation.
        optimizer: which holds its values.
        order: int64 `[features of the permuted side]`, a permutation.
    """
    assert layer.permutation is not None  # the caller's to see to
    _move(layer, optimizer, layer.topology, order)
    old = layer.permutation.clone()
    if layer.config.permuted == "input":
        new = permutation.compose(old, order)  # S'[:, s] = S[:, order[s]] meets x[old[order[s]]]
    else:
        new = permutation.inverse(order).to(old.dtype)[old.long()]  # (S' x)[new[i]] = (S x)[old[i]] with S' = S[order]
    with torch.no_grad():
        layer.permutation.copy_(new)


def _move(
    layer: PermutedSparseLinear, optimizer: torch.optim.Optimizer, topology: Topology, order: torch.Tensor | None
) -> None:
    structure, shape, old = layer.config.structure, layer.config.shape, layer.topology
    with torch.no_grad():
        for tensor in (layer.values, *companions(layer.values, optimizer)):
            dense = structure.unpack(whole(tensor), old, shape)
            if order is not None:
                dense = dense.index_select(1 if layer.config.permuted == "input" else 0, order)
            write(tensor, structure.pack(dense, topology))
            del dense
        for index, new in zip(old, topology, strict=True):
            index.copy_(new)
