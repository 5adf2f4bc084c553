"""The learners of permutations, wired to layers: what they listen to, when they act, what they change."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from padst_compile import permutation
from padst_compile.errors import AttachError
from padst_compile.kernels import gradient_tap
from padst_compile.kernels.soft_permute import HARD, SOFT
from padst_compile.layers import SoftPermutation
from padst_compile.permutation_search.units import PlaceUnits, place_units
from padst_compile.training.acting_steps import ActingSteps
from padst_compile.training.collector import Reducer, Sum
from padst_compile.training.config import DSTConfig, LearnedPermutation
from padst_compile.training.learner import PermutationLearner
from padst_compile.training.passes import Passes
from padst_compile.training.permutations import birkhoff
from padst_compile.training.permutations.autoshuffle import AutoShuffle, should_harden, weight_at
from padst_compile.training.permutations.blocks import split
from padst_compile.training.permutations.regroup import combine, regroup
from padst_compile.training.permutations.sinkhorn import SinkhornSTE
from padst_compile.training.rearrange import reorder_features
from padst_compile.training.sharding import whole
from padst_compile.training.trained_layer import TrainedLayer
from padst_compile.training.world import World

# Learning rates of Adam: of soft matrices in units of 1/n, and of logits. In an experiment with a planted permutation of 64
# features under noise, 1.0/n found 0.3 of it in 400 steps, 0.3/n 0.4 in 700, and 0.1/n 0.5 in 1200.
_AUTOSHUFFLE_RATE = 0.2
_SINKHORN_RATE = 0.05

_NOTHING: tuple[tuple[Reducer, ...], tuple[Reducer, ...]] = ((), ())


def make_learners(layers: Sequence[TrainedLayer], config: DSTConfig) -> list[PermutationLearner | None]:
    """The learner of each layer's permutation; None where there is none to learn, or nothing that it may exchange.

    Layers that may only have one permutation together (`Exchanges`) learn it together under sinkhorn_ste and keep it under
    the other methods, or where some of them are not in training or have another optimizer.

    Raises:
        AttachError: no layer has anything to learn, or autoshuffle, whose matrices mix all features, may not.
    """
    if config.permutation is None:
        return [None] * len(layers)
    together = _sharing(layers)
    leaders: dict[int, SinkhornLearner] = {}
    learners: list[PermutationLearner | None] = []
    for trained in layers:
        exchanges, mates = trained.exchanges, together.get(id(trained.exchanges), [trained])
        alone = exchanges is None or exchanges.holders == len(trained.layers)
        if trained.layer.permutation is None or (exchanges is not None and not exchanges.sets):
            learners.append(None)
        elif alone:
            learners.append(_make_learner(trained, config, config.permutation))
        elif config.permutation.method != "sinkhorn_ste" or not _complete(mates):
            learners.append(None)
        elif trained is mates[0]:
            leaders[id(exchanges)] = SinkhornLearner(trained, config, config.permutation, mates[1:])
            learners.append(leaders[id(exchanges)])
        else:
            learners.append(FollowingLearner(leaders[id(exchanges)], trained))
    if not any(learners):
        raise AttachError(
            "no layer in training has a permutation that it may learn: what folds for free is the identity alone, or must be "
            "shared; sparsify with permutation_group='any', or leave DSTConfig.permutation out"
        )
    return learners


def _make_learner(trained: TrainedLayer, config: DSTConfig, method: LearnedPermutation) -> PermutationLearner | None:
    start = _permutation(trained)
    permutation.check(start, start.numel(), trained.name)
    match method.method:
        case "autoshuffle":
            return AutoShuffleLearner(trained, config, method)
        case "sinkhorn_ste":
            return SinkhornLearner(trained, config, method)
        case "regroup":
            return None if bool((_sets(trained) < 0).all()) else RegroupLearner(trained, config, method)


def _acting_steps(
    layers: Sequence[TrainedLayer], config: DSTConfig, method: LearnedPermutation, last: int, end: str
) -> ActingSteps:
    """The steps at which a learner with an interval acts on these layers, `last` at the latest, which `end` decides."""
    interval, first = method.interval or config.interval, layers[0]
    acting = ActingSteps(interval, first.offset, last, config, tuple({trained.offset for trained in layers}))
    if next(iter(acting), None) is None:
        raise AttachError(
            f"the permutation of layer {first.name!r} would never learn: {method.method!r} first acts at step {acting.first}, "
            f"or the next one without a topology update, and {end} ends it at step {last}; give LearnedPermutation a shorter "
            f"interval than {interval}, a later end, or the topology a longer interval than {config.interval}"
        )
    return acting


def _sharing(layers: Sequence[TrainedLayer]) -> dict[int, list[TrainedLayer]]:
    """The layers that hold each `Exchanges`, by its id."""
    found: dict[int, list[TrainedLayer]] = {}
    for trained in layers:
        if trained.exchanges is not None:
            found.setdefault(id(trained.exchanges), []).append(trained)
    return found


def _complete(mates: Sequence[TrainedLayer]) -> bool:
    """Whether all layers that must have one permutation take part, and step together."""
    first = mates[0]
    assert first.exchanges is not None  # or it would have no mates
    alike = all(each.optimizer is first.optimizer and torch.equal(_permutation(each), _permutation(first)) for each in mates)
    return alike and sum(len(each.layers) for each in mates) == first.exchanges.holders


def _sets(trained: TrainedLayer) -> torch.Tensor:
    """For each place the number of the set within which regroup may exchange it, -1 for none; int64 `[features]`."""
    size = _permutation(trained).numel()
    return torch.zeros(size, dtype=torch.int64) if trained.exchanges is None else trained.exchanges.independent(size)


class AutoShuffleLearner:
    """A soft matrix under a penalty until it is nearly hard (PA-DST section 4); `permutations.autoshuffle` has the method."""

    def __init__(self, trained: TrainedLayer, config: DSTConfig, method: LearnedPermutation) -> None:
        start = _permutation(trained)
        assert config.total_steps is not None
        if bool((_sets(trained) != 0).any()):
            raise AttachError(
                f"layer {trained.name!r} may exchange only some features (permutation_group='foldable'), while the matrix of "
                "autoshuffle mixes all; learn with 'sinkhorn_ste' or 'regroup', or sparsify with permutation_group='any'"
            )
        self.trained, self.method = trained, method
        self._warmup, self._deadline = (int(part * config.total_steps) for part in (method.warmup, method.deadline))
        generator = trained.generator(config.seed, 0, "soft permutation")
        matrix = birkhoff.initial(start.numel(), generator=generator).to(start.device)
        anchor = torch.zeros(1, device=matrix.device, requires_grad=True)
        self._soft = SoftPermutation(matrix, torch.tensor([SOFT], dtype=torch.uint8), anchor)
        for layer in trained.layers:
            layer.soft = self._soft
        learner = self._make(matrix)
        self._learner: AutoShuffle | None = learner
        self._penalty = learner.penalty()
        self.hardened_at: int | None = None
        self._gradient = _MatrixGradient(trained.passes)

    def _make(self, matrix: torch.Tensor) -> AutoShuffle:
        return AutoShuffle(matrix, learning_rate=_AUTOSHUFFLE_RATE * self.method.learning_rate, owner=self.trained.name)

    @property
    def penalty(self) -> float:
        """See `PermutationLearner`."""
        return self._penalty

    @property
    def hard(self) -> bool:
        """See `PermutationLearner`."""
        return self._learner is None

    def permutation(self) -> torch.Tensor:
        """See `PermutationLearner`."""
        return _permutation(self.trained) if self._learner is None else self._learner.harden()

    def listen(self, step: int) -> tuple[Sequence[Reducer], Sequence[Reducer]]:
        """See `PermutationLearner`; listens to its own matrix instead, at every step."""
        self._gradient = _MatrixGradient(self.trained.passes)
        if self._learner is None:
            gradient_tap.forget(self._soft.state)
        else:
            gradient_tap.listen(self._soft.state, self._gradient)
        return _NOTHING

    def after_step(self, step: int, world: World, loss_scale: float) -> None:
        """See `PermutationLearner`."""
        if self._learner is None:
            return
        self._follow_device()
        own = self._gradient.sum_like(self._learner.matrix)
        total = world.add_up(own).div_(world.size * loss_scale)
        if bool(total.sum().isfinite()):  # alike on all ranks: NaN spreads
            self._learner.step(total, weight_at(step - 1, self._warmup, self.method.penalty_weight))
            self._penalty = world.agree_on_number(self._learner.penalty(), total.device)
        if should_harden(self._penalty, step, threshold=self.method.threshold, deadline=self._deadline):
            self._harden(world)
            self.hardened_at = step

    def finish(self, world: World) -> None:
        """See `PermutationLearner`."""
        self._harden(world)
        gradient_tap.forget(self._soft.state)
        for layer in self.trained.layers:
            layer.soft = None

    def state_dict(self) -> dict[str, Any]:
        """See `PermutationLearner`."""
        # detached, so that a state in memory keeps its matrix when the layer gives its own back
        soft = None if self._learner is None else {k: v.detach() for k, v in self._learner.state_dict().items()}
        return {"soft": soft, "penalty": self._penalty, "hardened_at": self.hardened_at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `PermutationLearner`."""
        if state["soft"] is None:
            self._release()
        elif self._learner is not None:
            self._learner.load_state_dict(state["soft"])
        else:  # hard here, soft in the checkpoint
            self._soft.matrix.untyped_storage().resize_(self._soft.matrix.numel() * self._soft.matrix.element_size())
            self._learner = self._make(self._soft.matrix)
            self._learner.load_state_dict(state["soft"])
            self._soft.state.fill_(SOFT)
        self._penalty, self.hardened_at = state["penalty"], state["hardened_at"]

    def _harden(self, world: World) -> None:
        if self._learner is not None:
            chosen = world.agree(self._learner.harden().to(self._soft.matrix.device))
            self.trained.layer.set_permutation(chosen)
            self._release()

    def _release(self) -> None:
        """From here on the permutation counts; the matrix keeps its shape, which programs check, and gives back its memory."""
        self._soft.state.fill_(HARD)
        self._learner, self._penalty = None, 0.0
        matrix = self._soft.matrix
        with torch.no_grad():
            matrix.set_(torch.empty_like(matrix))  # type: ignore[call-overload]  # takes a tensor
        matrix.untyped_storage().resize_(0)

    def _follow_device(self) -> None:
        if self._learner is not None and self._learner.matrix is not self._soft.matrix:  # the model was moved
            state = self._learner.state_dict()
            self._learner = self._make(self._soft.matrix)
            self._learner.load_state_dict(state)


class _MatrixGradient(Sum):
    """Adds up the gradient of a soft matrix over the backward passes before a step (`gradient_tap`)."""

    def __init__(self, passes: Passes) -> None:
        super().__init__()
        self.poisoned = 0
        self._passes = passes
        passes.watch(self)

    def products(
        self, grad: torch.Tensor, x: torch.Tensor, rows: torch.Tensor | None = None, columns: torch.Tensor | None = None
    ) -> None:
        """See `GradientListener.products`."""
        self.weight(gradient_tap.product(grad, x, rows, columns))

    def weight(self, gradient: torch.Tensor) -> None:
        """See `GradientListener.weight`."""
        self._passes.enter()
        if not bool(gradient.sum().isfinite()):
            self.poisoned += 1
        else:
            self.gather(gradient)

    def clear(self) -> None:
        """See `Restartable.clear`."""
        super().clear()
        self.poisoned = 0

    def sum_like(self, matrix: torch.Tensor) -> torch.Tensor:
        """The sum in the shape of `matrix`, zeros if nothing came, NaN if anything was not finite."""
        if self.poisoned:
            return torch.full_like(matrix, torch.nan)
        return torch.zeros_like(matrix) if self.total is None else self.total


class SinkhornLearner:
    """Logits behind a permutation that is always hard; `permutations.sinkhorn` has the method.

    The gradient of Π follows from the dense gradient G of S, which topology updates compute, too: for `y = S Π x` it is
    `Sᵀ G Π`, for `y = Π S x` it is `Π G Sᵀ`; only the blocks that may change are computed.
    """

    penalty = 0.0
    hard = True
    hardened_at = 0

    def __init__(
        self,
        trained: TrainedLayer,
        config: DSTConfig,
        method: LearnedPermutation,
        followers: Sequence[TrainedLayer] = (),
    ) -> None:
        start = _permutation(trained)
        assert config.total_steps is not None
        self.trained = trained
        deadline = int(method.deadline * config.total_steps)
        self._acting = _acting_steps((trained, *followers), config, method, deadline, "deadline")
        size, exchanges = start.numel(), trained.exchanges
        places = [torch.arange(size)] if exchanges is None else exchanges.sets
        self._learner = SinkhornSTE(
            start,
            split(places, size, method.group, trained.name),
            updates=sum(1 for _ in self._acting),
            learning_rate=_SINKHORN_RATE * method.learning_rate,
            owner=trained.name,
        )
        self._gradients = {each.name: _BlockGradient(each, self._learner) for each in (trained, *followers)}

    def permutation(self) -> torch.Tensor:
        """See `PermutationLearner`."""
        return _permutation(self.trained)

    def listen(self, step: int) -> tuple[Sequence[Reducer], Sequence[Reducer]]:
        """See `PermutationLearner`."""
        return self.listen_to(self.trained, step)

    def listen_to(self, trained: TrainedLayer, step: int) -> tuple[Sequence[Reducer], Sequence[Reducer]]:
        """The same for one of the layers that learn together."""
        self._learner.to(_permutation(trained).device)
        gradient = self._gradients[trained.name] = _BlockGradient(trained, self._learner)
        return ((), (gradient,)) if step in self._acting else _NOTHING

    def after_step(self, step: int, world: World, loss_scale: float) -> None:
        """See `PermutationLearner`."""
        if step not in self._acting:
            return
        parts = [gradient.total for gradient in self._gradients.values() if gradient.total is not None]
        if world.any(len(parts) < len(self._gradients), self._learner.logits.device):
            return
        total = torch.stack(parts).sum(0)
        self._learner.update(world.add_up(total).div_(world.size * loss_scale))
        chosen = world.agree(self._learner.hard())
        for gradient in self._gradients.values():
            gradient.trained.layer.set_permutation(chosen)

    def finish(self, world: World) -> None:
        """See `PermutationLearner`; nothing to harden."""

    def state_dict(self) -> dict[str, Any]:
        """See `PermutationLearner`."""
        return self._learner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `PermutationLearner`."""
        self._learner.load_state_dict(state)


class _BlockGradient(Sum):
    """Adds up the gradient of Π in the blocks of a learner: `total`, float32 `[blocks, width, width]`."""

    def __init__(self, trained: TrainedLayer, learner: SinkhornSTE) -> None:
        super().__init__()
        self.trained, self.learner = trained, learner

    def to(self, device: torch.device) -> None:
        """See `Reducer.to`."""
        super().to(device)
        self.learner.to(device)

    def add(self, gradient: torch.Tensor) -> None:
        """See `Reducer.add`; takes the signed gradient."""
        layer = self.trained.layer
        assert layer.permutation is not None
        weight = self.trained.structure.unpack(whole(layer.values), layer.topology, self.trained.shape).float()
        table, places, features = layer.permutation.long(), self.learner.places, self.learner.features
        if layer.config.permuted == "input":
            back = torch.empty_like(table)
            back[table] = torch.arange(table.numel(), device=table.device)
            self.gather(torch.einsum("obi,obj->bij", weight[:, places], gradient[:, back[features]]))
        else:
            self.gather(torch.einsum("bix,bjx->bij", gradient[table[places]], weight[features]))


class FollowingLearner:
    """Of a layer that must have the permutation of another: hands its gradient to that one's learner, which sets both."""

    penalty = 0.0
    hard = True
    hardened_at = 0

    def __init__(self, leader: SinkhornLearner, trained: TrainedLayer) -> None:
        self.leader, self.trained = leader, trained

    def permutation(self) -> torch.Tensor:
        """See `PermutationLearner`."""
        return _permutation(self.trained)

    def listen(self, step: int) -> tuple[Sequence[Reducer], Sequence[Reducer]]:
        """See `PermutationLearner`."""
        return self.leader.listen_to(self.trained, step)

    def after_step(self, step: int, world: World, loss_scale: float) -> None:
        """See `PermutationLearner`; the leader comes first and has acted."""

    def finish(self, world: World) -> None:
        """See `PermutationLearner`; nothing to harden."""

    def state_dict(self) -> dict[str, Any]:
        """See `PermutationLearner`; the leader has it."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `PermutationLearner`."""


class RegroupLearner:
    """Moves features to where their units are active; `permutations.regroup` has the method."""

    penalty = 0.0
    hard = True
    hardened_at = 0

    def __init__(self, trained: TrainedLayer, config: DSTConfig, method: LearnedPermutation) -> None:
        self.trained, self.config, self.method = trained, config, method
        self._acting = _acting_steps((trained,), config, method, config.last_update, "DSTConfig.end")
        self._gradient: _LineScores | None = None
        self._units()  # refuses structures that it cannot help

    def permutation(self) -> torch.Tensor:
        """See `PermutationLearner`."""
        return _permutation(self.trained)

    def listen(self, step: int) -> tuple[Sequence[Reducer], Sequence[Reducer]]:
        """See `PermutationLearner`."""
        self._gradient = _LineScores(self._units()) if step in self._acting else None
        return _NOTHING if self._gradient is None else ((self._gradient,), ())

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
            sets=_sets(self.trained).masked_fill(self._given_up(), -1),
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


class _LineScores(Sum):
    """Adds up `|gradient|` per group of lines and place: `total`, float32 `[line groups, n]`."""

    def __init__(self, units: PlaceUnits) -> None:
        super().__init__()
        self.units = units

    def to(self, device: torch.device) -> None:
        """See `Reducer.to`."""
        super().to(device)
        self.units = self.units.to(device)

    def add(self, gradient: torch.Tensor) -> None:
        """See `Reducer.add`; takes magnitudes."""
        self.gather(self.units.scores(gradient))


def _permutation(trained: TrainedLayer) -> torch.Tensor:
    assert trained.layer.permutation is not None  # or it would have no learner
    return trained.layer.permutation
