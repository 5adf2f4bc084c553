"""SRigL's ablation of neurons (Lasby et al. 2024, section 3.2): outputs that keep few salient weights are given up.

A weight is salient if its magnitude is among the largest that will stay, or its gradient among the largest that could grow,
over what is left of the layer. SRigL hands the weights of given-up neurons to the others; N:M fixes how many a neuron has, so
here the layer becomes sparser instead. Of a given-up neuron the bias is left, and it never comes back.
"""

from __future__ import annotations

import torch

from padst_compile.structures import NM, Shape


def neurons_to_keep(
    structure: NM, shape: Shape, active: torch.Tensor, keep: torch.Tensor, grow: torch.Tensor, count: int, threshold: float
) -> torch.Tensor:
    """Which neurons stay, as a grid of units.

    Args:
        structure: of the layer.
        shape: of the layer.
        active: bool `[pools, units]`, without neurons given up before, which stay so.
        keep: magnitudes `[pools, units]`.
        grow: gradients `[pools, units]`.
        count: units that the update exchanges.
        threshold: fraction of its fan-in that must be salient for a neuron to stay (SRigL's gamma).

    Returns:
        bool `[pools, units]`, alike for all units of a neuron (with `vector` rows, of that group of neurons). Of all updates
        together at least as many stay as could hold, if they were dense, the weights that the layer began with.
    """
    rows, groups = structure.groups(shape)
    living = active.reshape(rows, -1).any(1)
    could_grow = ~active & _spread(living, active) & (grow > -torch.inf)
    salient = _largest(keep, active, int(active.sum()) - count) | _largest(grow, could_grow, count)
    per_neuron = salient.reshape(rows, -1).sum(1)
    fan_in = structure.n * groups
    stay = living & (per_neuron >= threshold * fan_in)
    least = -(-rows * fan_in // shape.in_features)
    if int(stay.sum()) < least:
        stay = _largest(per_neuron.float(), living, least)
    return _spread(stay, active)


def _spread(neurons: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """A choice of neurons, bool `[neurons]`, as one of their units: in the shape of `grid`."""
    return neurons[:, None].expand(-1, grid.numel() // neurons.numel()).reshape(grid.shape)


def _largest(scores: torch.Tensor, among: torch.Tensor, count: int) -> torch.Tensor:
    order = torch.sort(scores.masked_fill(~among, -torch.inf).flatten(), descending=True, stable=True).indices
    chosen = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    chosen[order[:count]] = True
    return chosen.reshape(scores.shape) & among
