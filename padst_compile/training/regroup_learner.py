"""A layer's permutation by moves of whole features: what decides them, and what moves along."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from padst_compile.permutation_search.units import PlaceUnits, place_units
from padst_compile.training.acting_steps import acting_steps
from padst_compile.training.config import DSTConfig, LearnedPermutation
from padst_compile.training.learner import NOTHING
from padst_compile.training.permutations.regroup import combine, regroup
from padst_compile.training.rearrange import reorder_features
from padst_compile.training.reducer import Reducer, SumOfGradients
from padst_compile.training.sharding import whole
from padst_compile.training.trained_layer import TrainedLayer
from padst_compile.training.world import World


class RegroupLearner:
    """Moves features to where their units are active; `permutations.regroup` has the method."""

    penalty = 0.0
    hard = True
    hardened_at = 0

    def __init__(self, trained: TrainedLayer, config: DSTConfig, method: LearnedPermutation) -> None:
        self.trained, self.config, self.method = trained, config, method
        self._acting = acting_steps((trained,), config, method, config.last_update, "DSTConfig.end")
        self._gradient: _LineScores | None = None
        self._units()  # refuses structures that it cannot help

    def permutation(self) -> torch.Tensor:
        """See `PermutationLearner`."""
        return self.trained.permutation

    def listen(self, step: int) -> tuple[Sequence[Reducer], Sequence[Reducer]]:
        """See `PermutationLearner`."""
        self._gradient = _LineScores(self._units()) if step in self._acting else None
        return NOTHING if self._gradient is None else ((self._gradient,), ())

    def after_step(self, step: int, world: World, loss_scale: float) -> None:
        """See `PermutationLearner`."""
        if self._gradient is None or step not in self._acting:
            return
        seen, layer = self._gradient.total, self.trained.layer
        if world.any(seen is None, layer.topology[0].device):
            return
        assert seen is not None
        units = self._units()
        dense = self.trained.structure.unpack(whole(layer.values), layer.topology, self.trained.shape).float().abs_()
        order = regroup(
            combine(units.scores(dense), world.add_up(seen), units),
            units,
            fraction=self._fraction(step),
            generator=self.trained.generator(self.config.seed, step, "regroup"),
            gain=self.method.gain,
            sets=self.trained.exchange_sets().masked_fill(self._given_up(), -1),
        )
        order = world.agree(order)
        if not torch.equal(order, torch.arange(order.numel(), device=order.device)):
            reorder_features(layer, self.trained.optimizer, order)
            self.trained.hold_at_zero()  # what came to a pruned place

    def finish(self, world: World) -> None:
        """See `PermutationLearner`; nothing to harden."""

    def state_dict(self) -> dict[str, Any]:
        """See `PermutationLearner`; the permutation is the layer's."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `PermutationLearner`."""

    def _units(self) -> PlaceUnits:
        layer = self.trained.layer
        side = layer.config.permuted
        assert side is not None
        kept = None if self.trained.mask is None else whole(self.trained.mask)
        return place_units(self.trained.structure, layer.topology, self.trained.shape, side, self.trained.name, kept)

    def _given_up(self) -> torch.Tensor:
        """Places whose features stay: outputs that ablation gave up, bool `[features]`."""
        if self.trained.layer.config.permuted == "output":
            return self.trained.given_up()
        return torch.zeros(self.trained.shape.in_features, dtype=torch.bool)

    def _fraction(self, step: int) -> float:
        return self.method.fraction / 2 * (1 + math.cos(math.pi * step / self.config.last_update))


class _LineScores(SumOfGradients):
    """Adds up `|gradient|` per group of lines and place: `total`, float32 `[line groups, n]`."""

    def __init__(self, units: PlaceUnits) -> None:
        super().__init__()
        self.units = units

    def to(self, device: torch.device) -> None:
        """See `Reducer.to`."""
        super().to(device)
        self.units = self.units.to(device)

    def add(self, part: torch.Tensor, begin: int) -> None:
        """See `Reducer.add`; takes magnitudes."""
        if self.pending.total is None:
            self.pending.total = part.new_zeros(self.units.active.shape[0], self.units.group.numel())
        self.units.add_scores(self.pending.total, part, begin)
