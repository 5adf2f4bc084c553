"""Which units stay, which are dropped and which grow: pure functions on grids `[pools, units]`."""

from __future__ import annotations

import torch

_PARTS = 16


def exchange(active: torch.Tensor, keep: torch.Tensor, grow: torch.Tensor, count: int) -> torch.Tensor:
    """Drop `count` active units and grow as many, in the same pools.

    A dropped unit may grow again at once, and then keeps its weights, as in RigL (Evci et al. 2020, algorithm 1).

    Args:
        active: bool `[pools, units]`.
        keep: scores of active units, `[pools, units]`; the smallest are dropped, over all pools.
        grow: scores of units that are not kept. Ties go to the lower position. Where it is -inf, there is no unit, or nothing
            is known of it: that one stays as it is.
        count: how many, at most those that are active and not such ones.

    Returns:
        The new `active`; every pool has as many active units as before.
    """
    kept = active & ~smallest(keep, active & (grow > -torch.inf), count)
    vacancies = active.sum(1) - kept.sum(1)
    vacant = vacancies.nonzero()[:, 0]  # of N:M's many pools most are full
    for pools in vacant.split(-(-len(active) // _PARTS)):  # sorting takes several times their memory
        candidates = grow[pools].masked_fill_(kept[pools], -torch.inf)
        kept[pools] |= rank(candidates) < vacancies[pools, None]
    return kept


def smallest(scores: torch.Tensor, among: torch.Tensor, count: int) -> torch.Tensor:
    """Where the `count` smallest scores of `among` lie, over all pools; ties go to the lower position."""
    places = among.flatten().nonzero()[:, 0]
    chosen = torch.zeros_like(among).flatten()
    chosen[places[torch.sort(scores.flatten()[places], stable=True).indices[:count]]] = True
    return chosen.reshape(among.shape)


def rank(scores: torch.Tensor) -> torch.Tensor:
    """The place of each entry in the descending order of its row; ties in order of position."""
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices
    places = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)
