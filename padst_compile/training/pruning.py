"""Weights that stay stored but are pruned: held at zero while training, left out of the finished layer."""

from __future__ import annotations

import torch
from torch import nn

from padst_compile.layers import PermutedSparseLinear
from padst_compile.training.sharding import shard_like
from padst_compile.training.trained_layer import TrainedLayer


def stored_mask(trained: TrainedLayer) -> torch.Tensor:
    """1 where a stored value is not pruned, else 0; shaped, typed and sharded like the layer's values."""
    layer, structure, shape = trained.layer, trained.structure, trained.shape
    ones = torch.ones(shape.out_features, shape.in_features, dtype=layer.values.dtype, device=layer.topology[0].device)
    survivors = structure.topology_of(trained.active(), shape)
    dense = structure.unpack(structure.pack(ones, survivors), survivors, shape)
    return shard_like(structure.pack(dense, layer.topology), layer.values)


def compact(layer: PermutedSparseLinear, alive: torch.Tensor) -> None:
    """Leave the weights of pruned units out of the layer, whose values and index tensors become smaller.

    Args:
        layer: with plain, unsharded values.
        alive: bool `[pools, units]`.
    """
    structure, shape = layer.config.structure, layer.config.shape
    survivors = structure.topology_of(structure.active_units(layer.topology, shape) & alive, shape)
    dense = structure.unpack(layer.values.detach(), layer.topology, shape)
    layer.values = nn.Parameter(structure.pack(dense, survivors), requires_grad=layer.values.requires_grad)
    for name, index in zip(structure.index_names, survivors, strict=True):
        layer.register_buffer(name, index)
