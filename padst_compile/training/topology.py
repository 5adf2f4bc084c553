"""One topology update of one layer: score, choose, move."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from padst_compile.structures import NM
from padst_compile.training.ablation import neurons_to_keep
from padst_compile.training.config import DSTConfig, Method
from padst_compile.training.pruning import stored_mask
from padst_compile.training.rearrange import change_topology
from padst_compile.training.schedule import fraction_at, sparsity_at
from padst_compile.training.selection import exchange, smallest
from padst_compile.training.sharding import whole
from padst_compile.training.trained_layer import TrainedLayer
from padst_compile.training.unit_scores import UnitScores, unit_scores, unit_sizes
from padst_compile.training.world import World


@dataclasses.dataclass(frozen=True)
class TopologyUpdate:
    """What an update did to a layer: units that were active before and not after, and the other way round."""

    layer: str
    step: int
    dropped: int
    grown: int


@dataclasses.dataclass(frozen=True)
class Situation:
    """What an update of a layer may look at; `gradients` are those since the last step, where the method asked for them."""

    trained: TrainedLayer
    config: DSTConfig
    step: int
    gradients: UnitScores | None


Score = Callable[[Situation], torch.Tensor]


def _magnitude(now: Situation) -> torch.Tensor:
    layer = now.trained.layer
    return _scores_of(now, whole(layer.values).float().abs())


def _magnitude_and_gradient(now: Situation) -> torch.Tensor:
    """`|w| + λ |g|` (MEST, Yuan et al. 2021, equation 1)."""
    layer = now.trained.layer
    importance = whole(layer.values).float().abs()
    if layer.values.grad is not None:
        importance += now.config.mest_weight * whole(layer.values.grad).float().abs()
    return _scores_of(now, importance)


def _scores_of(now: Situation, magnitudes: torch.Tensor) -> torch.Tensor:
    """Norms of units, from magnitudes of the layer's values."""
    structure, shape = now.trained.structure, now.trained.shape
    return unit_scores(structure, structure.unpack(magnitudes, now.trained.layer.topology, shape), now.config.score)


def _gradient(now: Situation) -> torch.Tensor:
    assert now.gradients is not None  # the runtime listened, and leaves the update out where nothing came
    return now.gradients.estimate()


def _chance(now: Situation) -> torch.Tensor:
    """Uniform numbers, drawn alike on all ranks; -inf where there is no unit."""
    shape, structure = now.trained.shape, now.trained.structure
    device = now.trained.layer.topology[0].device
    inside = unit_sizes(structure, shape, device) > -torch.inf
    generator = now.trained.generator(now.config.seed, now.step, "growth")
    return torch.rand(inside.shape, generator=generator).to(device).masked_fill(~inside, -torch.inf)


@dataclasses.dataclass(frozen=True)
class _Rule:
    """How a method scores the units that are active, and those that might grow."""

    keep: Score
    grow: Score
    needs_gradient: bool = False


_RULES: dict[Method, _Rule] = {
    "rigl": _Rule(_magnitude, _gradient, needs_gradient=True),
    "set": _Rule(_magnitude, _chance),
    "mest": _Rule(_magnitude_and_gradient, _chance),
}


def needs_gradient(method: Method) -> bool:
    """Whether the method grows where the dense gradient is large."""
    return method in _RULES and _RULES[method].needs_gradient


def update_topology(now: Situation, world: World) -> TopologyUpdate:
    """Bring the layer's topology, weights and optimizer state to where the method wants them after this step."""
    trained = now.trained
    before = trained.active()
    after = world.agree(_pruned(now, before) if now.config.method == "magnitude" else _exchanged(now, before))
    if now.config.method == "magnitude":
        trained.alive = after
    else:
        if _ablates(now):  # every group of a neuron that stays has active units
            trained.alive = after.any(1, keepdim=True).expand_as(after).clone()
        _store(trained, after)
    if trained.alive is not None:
        trained.mask = stored_mask(trained)
        trained.hold_at_zero()
    trained.visit()
    return TopologyUpdate(trained.name, now.step, int((before & ~after).sum()), int((after & ~before).sum()))


def _store(trained: TrainedLayer, after: torch.Tensor) -> None:
    """Make room for the units of `after`; what was given up keeps its places, which N:M has in any case."""
    stored = trained.structure.active_units(trained.layer.topology, trained.shape)
    wanted = after if trained.alive is None else after | (stored & ~trained.alive)
    if not torch.equal(stored, wanted):
        change_topology(trained.layer, trained.optimizer, trained.structure.topology_of(wanted, trained.shape))
        trained.share_topology()


def _ablates(now: Situation) -> bool:
    return now.config.ablation is not None and isinstance(now.trained.structure, NM)


def _exchanged(now: Situation, active: torch.Tensor) -> torch.Tensor:
    rule, structure = _RULES[now.config.method], now.trained.structure
    keep, grow = rule.keep(now), rule.grow(now)
    count = round(fraction_at(now.step, now.config) * int((active & (grow > -torch.inf)).sum()))
    if now.config.ablation is not None and isinstance(structure, NM):
        stay = neurons_to_keep(structure, now.trained.shape, active, keep, grow, count, now.config.ablation)
        active = active & stay
        count = min(count, int(active.sum()))
    return exchange(active, keep, grow, count)


def _pruned(now: Situation, active: torch.Tensor) -> torch.Tensor:
    """Never fewer than one unit stays."""
    trained = now.trained
    stored = trained.structure.active_units(trained.layer.topology, trained.shape)
    first = 1.0 - int(stored.sum()) / stored.numel()
    wanted = max(1, round((1.0 - sparsity_at(now.step, now.config, first)) * stored.numel()))
    surplus = max(0, int(active.sum()) - wanted)
    return active & ~smallest(_magnitude(now), active, surplus)
