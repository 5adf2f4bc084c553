"""Learns a permutation from the scores that topology updates have anyway: features move to where their units are active.

Given scores A of every feature for every group of lines, a feature's benefit at a place is the sum of A over the groups that
are active there. Linear assignment over a part of the features finds the exchange with the largest total benefit. It is always
hard, holds no state, and costs a small product and an assignment over the features that may move.
"""

from __future__ import annotations

import torch

from padst_compile.permutation_search.assignment import harden
from padst_compile.permutation_search.units import PlaceUnits


def combine(weight_scores: torch.Tensor, gradient_scores: torch.Tensor, units: PlaceUnits) -> torch.Tensor:
    """Scores A from weights and gradients, each relative to its mean over active units.

    A feature that moves keeps its weights where its unit is active before and after. A unit that is not active has no weights,
    so it counts with its gradient alone, as in RigL.

    Args:
        weight_scores: sums of `|weight|`, `[line groups, n]`, columns in the order of the places; zero where not active.
        gradient_scores: sums of `|gradient|` of the dense S, the same.
        units: of the layer.
    """
    held = units.held()
    return _relative(weight_scores, held) + _relative(gradient_scores, held)


def regroup(
    scores: torch.Tensor,
    units: PlaceUnits,
    *,
    fraction: float,
    generator: torch.Generator,
    gain: float = 0.05,
    sets: torch.Tensor | None = None,
) -> torch.Tensor:
    """An order of the features with a larger total benefit.

    Candidates are as many features as may move: half of them those that miss most, by their scores for groups of lines that are
    not active at their place; the rest at random. Each cycle of exchanges must by itself raise the benefit of its features by
    more than `gain` times what they have.

    Args:
        scores: A, `[line groups, n]`, finite and non-negative, columns in the order of the places.
        units: what is active where.
        fraction: of the features that may move at most, in [0, 1].
        generator: of the random candidates.
        gain: least relative gain. An early experiment without such a threshold, and with a fraction of 0.6, lost to a
            random permutation that stays.
        sets: int64 `[n]`: places with the same number may exchange features, those with -1 none; None for all with all.

    Returns:
        int64 `[n]` on the device of the scores: place `s` gets the feature that was at place `order[s]`. The identity where
        nothing gains enough.

    Raises:
        PermutationScoresError: scores that are not finite.
    """
    order = torch.arange(scores.shape[1])
    sets = torch.zeros_like(order) if sets is None else sets.cpu()
    candidates = _candidates(scores, units, int(fraction * scores.shape[1]), generator)
    candidates = candidates[sets[candidates] >= 0]
    if candidates.numel() < 2:
        return order.to(scores.device)
    group, sets = units.group.cpu()[candidates], sets[candidates]
    at = candidates.to(scores.device)
    # [places, features]: what each candidate would have at each candidate's place
    benefits = (units.active[:, units.group[at]].double().T @ scores[:, at].double()).cpu()
    staying = group[:, None] == group[None, :]
    wanted = benefits.where(~staying, benefits * (1 + gain))
    forbidden = -1 - wanted.sum()  # below what any permitted exchange could make up for
    sources = harden(wanted.where(sets[:, None] == sets[None, :], forbidden), "regroup").long()
    sources = _only_between_groups(sources, torch.unique(torch.stack((sets, group)), dim=1, return_inverse=True)[1])
    accepted = _clear_gains(sources, benefits, gain)
    order[candidates] = candidates[accepted]
    return order.to(scores.device)


def _relative(scores: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
    mean = (scores * held).sum() / held.sum().clamp_min(1)
    return scores.float() / mean.clamp_min(torch.finfo(torch.float32).tiny)


def _candidates(scores: torch.Tensor, units: PlaceUnits, count: int, generator: torch.Generator) -> torch.Tensor:
    """Ascending places of the features that may move, int64 `[count]` on the CPU."""
    missed = (scores.double() * ~units.held()).sum(0).cpu()
    ranked = torch.sort(missed, descending=True, stable=True).indices
    first = ranked[: count // 2]
    rest = ranked[count // 2 :]
    drawn = torch.randperm(rest.numel(), generator=generator, device=generator.device).cpu()[: count - first.numel()]
    return torch.cat((first, rest[drawn])).sort().values


def _only_between_groups(sources: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """The same assignment of features to groups of places, with each feature that stays in its group at its own place."""
    arrivals = (group[sources] != group).nonzero().flatten()
    moving = sources[arrivals]
    # As many features arrive in a group as leave it: its left places and its arrivals are paired off in order.
    by_destination = moving[torch.sort(group[arrivals], stable=True).indices]
    left = moving.sort().values
    left = left[torch.sort(group[left], stable=True).indices]
    result = torch.arange(sources.numel())
    result[left] = by_destination
    return result


def _clear_gains(sources: torch.Tensor, benefits: torch.Tensor, gain: float) -> torch.Tensor:
    """`sources` without the cycles that gain too little."""
    result = torch.arange(sources.numel())
    chain, have, get = sources.tolist(), benefits.diagonal().tolist(), benefits.gather(1, sources[:, None]).flatten().tolist()
    seen = set()
    for first, source in enumerate(chain):
        if first in seen or source == first:
            continue
        cycle, place = [], first
        while place not in seen:
            seen.add(place)
            cycle.append(place)
            place = chain[place]
        before = sum(have[place] for place in cycle)
        if sum(get[place] for place in cycle) - before > gain * before:
            result[cycle] = sources[cycle]
    return result
