"""SRigL's ablation of neurons (Lasby et al. 2024, section 3.2): outputs that keep few salient weights are given up.

A weight is salient if its magnitude is among the largest that will stay, or its gradient among the largest that could grow,
over the whole layer. SRigL hands the weights of given-up neurons to the others; N:M fixes how many a neuron has, so here the
layer becomes sparser instead.
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
        bool `[pools, units]`, alike for all units of a neuron (with `vector` rows, of that group of neurons). As many stay as
        could hold all active weights if they were dense.
    """
    rows, groups = structure.groups(shape)
    salient = _largest(keep, active, int(active.sum()) - count) | _largest(grow, ~active & (grow > -torch.inf), count)
    per_neuron = salient.reshape(rows, -1).sum(1)
    living = active.reshape(rows, -1).any(1)
    fan_in = structure.n * groups
    stay = living & (per_neuron >= threshold * fan_in)
    least = -(-int(active.sum()) // shape.in_features)
    if int(stay.sum()) < least:
        stay = _largest(per_neuron.float(), living, least)
    return stay[:, None].expand(rows, groups * structure.m).reshape(active.shape)


def _largest(scores: torch.Tensor, among: torch.Tensor, count: int) -> torch.Tensor:
    order = torch.sort(scores.masked_fill(~among, -torch.inf).flatten(), descending=True, stable=True).indices
    chosen = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    chosen[order[:count]] = True
    return chosen.reshape(scores.shape) & among
