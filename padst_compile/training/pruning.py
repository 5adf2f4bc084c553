"""Weights that stay stored but are pruned: held at zero while training, left out of the finished layer."""

from __future__ import annotations

import torch
from torch import nn

from padst_compile.layers import PermutedSparseLinear
from padst_compile.structures import Shape, Structure
from padst_compile.training.sharding import shard_like
from padst_compile.training.trained_layer import TrainedLayer


def stored_mask(trained: TrainedLayer) -> torch.Tensor:
    """1 where a stored value is not pruned, else 0; shaped, typed and sharded like the layer's values."""
    layer, structure, shape = trained.layer, trained.structure, trained.shape
    dense = _spread(trained.active(), structure, shape).to(layer.values.dtype)
    return shard_like(structure.pack(dense, layer.topology), layer.values)


def _spread(units: torch.Tensor, structure: Structure, shape: Shape) -> torch.Tensor:
    """1 at the weights of chosen units, else 0, float32 `[out, in]`: the adjoint of summing weights over units."""
    with torch.enable_grad():
        weight = torch.zeros((), device=units.device).expand(shape.out_features, shape.in_features).requires_grad_()
        (dense,) = torch.autograd.grad(structure.unit_totals(weight), weight, units.float())
    return dense


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
