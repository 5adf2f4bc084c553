"""The runtime of a training: what happens to sparse layers around each optimizer step."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from padst_compile.errors import AttachError
from padst_compile.structures import NM
from padst_compile.training.collector import DenseGradient
from padst_compile.training.config import DSTConfig
from padst_compile.training.invariants import check_layer
from padst_compile.training.learner import PermutationLearner
from padst_compile.training.newcomers import Newcomers
from padst_compile.training.pruning import compact, stored_mask
from padst_compile.training.resume import VERSION, check_fingerprints, check_state
from padst_compile.training.schedule import is_due
from padst_compile.training.sharding import is_sharded, local
from padst_compile.training.soft_top_k import SoftTopK
from padst_compile.training.topology import Situation, TopologyUpdate, needs_gradient, update_topology
from padst_compile.training.trained_layer import TrainedLayer
from padst_compile.training.unit_scores import FineScores, SampledScores, UnitScores
from padst_compile.training.world import World

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass
class _Member:
    """A layer with what belongs to it during a training."""

    trained: TrainedLayer
    learner: PermutationLearner | None
    gates: SoftTopK | None
    scores: UnitScores | None = None
    listener: DenseGradient | None = None


class Runtime:
    """Trains the sparse layers of a model; made by `padst.attach`, which says how to use it.

    Everything happens in hooks of the optimizers: after a step pruned weights are set back to zero, the topology is updated
    when it is due, and permutations learn. Then, if the next step needs dense gradients, the runtime begins to listen for them.
    Permutations come last because gradients belong to the order of features that they were computed in: had features moved,
    growth would be decided for others.

    Attributes:
        config: as given.
        updates: of the topology that took place, in all layers.
        skipped: updates left out: all because of NaN or infinite gradients, one layer's because no gradient came from it.
        last_update: what the latest update did to each layer.
        update_seconds, learning_seconds, hook_seconds: time spent in updates, in learning permutations, and in all hooks, since
            `attach` or the latest `load_state_dict`.
    """

    def __init__(
        self,
        layers: Sequence[TrainedLayer],
        optimizers: Sequence[torch.optim.Optimizer],
        config: DSTConfig,
        world: World,
        learners: Sequence[PermutationLearner | None],
        newcomers: Newcomers,
        grad_scaler: torch.amp.GradScaler | None = None,
        reshard: Callable[[], None] = lambda: None,
    ) -> None:
        self.config, self.world = config, world
        self._reshard, self._newcomers = reshard, newcomers
        self._optimizers, self._grad_scaler = tuple(optimizers), grad_scaler
        self._steps = [0] * len(optimizers)
        self._timed_from = 0
        pairs = zip(layers, learners, strict=True)
        self._members = [_Member(layer, learner, _gates(layer, config)) for layer, learner in pairs]
        self.updates = self.skipped = 0
        self.update_seconds = self.hook_seconds = self.learning_seconds = 0.0
        self.last_update: tuple[TopologyUpdate, ...] = ()
        self._handles = [optimizer.register_step_pre_hook(self._before_step) for optimizer in optimizers]
        self._handles += [optimizer.register_step_post_hook(self._after_step) for optimizer in optimizers]
        for number in range(len(optimizers)):
            self._listen(number)

    def __repr__(self) -> str:
        return f"Runtime({self.config.method}, step {self.step}, {len(self._members)} sparse layers, {self.updates} updates)"

    @property
    def step(self) -> int:
        """Optimizer steps so far; of several optimizers, the one that took the most."""
        return max(self._steps)

    @property
    def timed_steps(self) -> int:
        """Optimizer steps that the seconds are of: those since `attach` or the latest `load_state_dict`."""
        return self.step - self._timed_from

    @property
    def layers(self) -> tuple[TrainedLayer, ...]:
        """The sparse layers in training."""
        return tuple(member.trained for member in self._members)

    @property
    def learners(self) -> dict[str, PermutationLearner]:
        """By layer name, who learns its permutation."""
        return {member.trained.name: member.learner for member in self._members if member.learner is not None}

    def metrics(self) -> dict[str, float]:
        """Numbers for a log: density, exploration, updates, and the state of the permutations.

        `density` is that of the active weights. It stays exactly what it was at every update, but for magnitude and dynadiag,
        which prune, and for ablation: `ablated` counts the outputs that were given up, by which N:M layers are sparser.
        """
        active = sum(layer.active_weights() for layer in self.layers)
        explored = [layer.explored for layer in self.layers]
        learners = self.learners.values()
        return {
            "step": float(self.step),
            "density": active / sum(layer.shape.numel for layer in self.layers),
            "exploration": sum(seen / total for seen, total in explored) / len(explored),
            "updates": float(self.updates),
            "skipped_updates": float(self.skipped),
            "ablated": float(sum(int(layer.given_up().sum()) for layer in self.layers)),
            "dropped": float(sum(update.dropped for update in self.last_update)),
            "grown": float(sum(update.grown for update in self.last_update)),
            "penalty": sum(learner.penalty for learner in learners) / max(1, len(learners)),
            "hardened": float(sum(learner.hard for learner in learners)),
            "update_seconds": self.update_seconds,
            "hook_seconds": self.hook_seconds,
        }

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiled optimizer step calls it between two programs
    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        number = self._number_of(optimizer)
        self._newcomers.check(number, optimizer)
        for member in self._members_of(number):
            if member.trained.has_other_weights:
                raise AttachError(
                    f"layer {member.trained.name!r} has other weights than those that its optimizer got, which would train in "
                    "vain (load_state_dict(assign=True) replaces them, for example); call padst.finalize(model), make the "
                    "optimizer anew and attach again"
                )
            if member.listener is not None:
                member.trained.passes.drop_what_is_lost()

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # as above
    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        began = time.perf_counter()
        self._reshard()
        number = self._number_of(optimizer)
        self._steps[number] += 1
        step, members = self._steps[number], self._members_of(number)
        with torch.no_grad():
            for member in members:
                member.trained.follow()
                if member.gates is not None:
                    member.gates.after_step(step, self.world)
                member.trained.hold_at_zero()
            due = [member for member in members if is_due(step, self.config, member.trained.offset)]
            if due:
                self._update(due, step)
                self.update_seconds += time.perf_counter() - began
            self._learn(members, step)
        self._listen(number)
        self.hook_seconds += time.perf_counter() - began

    def _number_of(self, optimizer: torch.optim.Optimizer) -> int:
        return next(i for i, own in enumerate(self._optimizers) if own is optimizer)

    def _members_of(self, number: int) -> list[_Member]:
        return [member for member in self._members if member.trained.optimizer is self._optimizers[number]]

    def _learn(self, members: Sequence[_Member], step: int) -> None:
        began = time.perf_counter()
        scale = 1.0 if self._grad_scaler is None else self._grad_scaler.get_scale()
        for member in members:
            if member.learner is not None:
                member.learner.after_step(step, self.world, scale)
                member.trained.share_topology()
        self.learning_seconds += time.perf_counter() - began

    def _listen(self, number: int) -> None:
        """Ask for the dense gradients that the next step of an optimizer needs."""
        step = self._steps[number] + 1
        for member in self._members_of(number):
            trained = member.trained
            trained.forget()
            wanted = is_due(step, self.config, trained.offset) and needs_gradient(self.config.method)
            member.scores = self._scores(trained, step) if wanted else None
            magnitudes, signed = ((), ()) if member.learner is None else member.learner.listen(step)
            sampled = member.scores if isinstance(member.scores, SampledScores) else None
            own = () if member.scores is None or sampled is not None else (member.scores,)
            member.listener = None
            soft = member.learner is not None and not member.learner.hard  # hears of its matrix, and must know of each pass
            if member.scores is not None or magnitudes or signed or soft:
                member.listener = DenseGradient((*own, *magnitudes), signed, sampled, trained.passes)
                trained.listen(member.listener)

    def _scores(self, trained: TrainedLayer, step: int) -> UnitScores:
        """What adds up the gradients of a layer's units, from all its output rows or a sample."""
        structure, score, total = trained.structure, self.config.score, trained.shape.out_features
        if self.config.gradient_rows == 1.0:
            return (FineScores if trained.has_single_weights else UnitScores)(structure, score, trained.shape)
        order = torch.randperm(total, generator=trained.generator(self.config.seed, step, "rows"))
        rows = order[: max(1, round(self.config.gradient_rows * total))].sort().values
        return SampledScores(structure, score, trained.shape, rows.to(trained.layer.topology[0].device))

    def _update(self, members: Sequence[_Member], step: int) -> None:
        device = members[0].trained.layer.topology[0].device
        wrong = [member.trained.name for member in members if not _finite(member)]
        if self.world.any(bool(wrong), device):
            where = repr(wrong[0]) if wrong else "a layer of another rank"
            self._leave_out(step, f"the gradients or weights of {where} are not finite")
            return
        silent = self.world.add_up(torch.tensor([float(_is_silent(member)) for member in members], device=device)).tolist()
        done = []
        for member, without_gradient in zip(members, silent, strict=True):
            if without_gradient:
                self._leave_out(step, f"no gradient came from layer {member.trained.name!r}, which keeps its topology")
                continue
            if member.scores is not None and member.scores.total is not None:
                self.world.add_up(member.scores.total)
            done.append(update_topology(Situation(member.trained, self.config, step, member.scores), self.world))
            if self.config.check_invariants:
                check_layer(member.trained, self.world)
        self.last_update = tuple(done)
        self.updates += bool(done)

    def _leave_out(self, step: int, reason: str) -> None:
        self.skipped += 1
        _LOG.warning("step %d: topology update left out, %s (%d so far)", step, reason, self.skipped)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold beside those of the model and the optimizers: tensors and plain values."""
        return {
            "version": VERSION,
            "config": self.config.to_dict(),
            "steps": list(self._steps),
            "updates": self.updates,
            "skipped": self.skipped,
            "last_update": [dataclasses.asdict(update) for update in self.last_update],
            "layers": {
                member.trained.name: {
                    **member.trained.state_dict(),
                    "learner": None if member.learner is None else member.learner.state_dict(),
                    "gates": None if member.gates is None else member.gates.state_dict(),
                }
                for member in self._members
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken, after the model and the optimizers have loaded theirs.

        Raises:
            ResumeError: the state is of another model, specification or configuration; nothing has changed then.
        """
        self.check(state)
        check_fingerprints(state, self.layers)
        self._steps = list(state["steps"])
        self._timed_from = self.step
        self.update_seconds = self.hook_seconds = self.learning_seconds = 0.0
        self.updates, self.skipped = state["updates"], state["skipped"]
        self.last_update = tuple(TopologyUpdate(**update) for update in state["last_update"])
        for member in self._members:
            stored = state["layers"][member.trained.name]
            member.trained.load_state_dict(stored)
            member.trained.mask = None if member.trained.alive is None else stored_mask(member.trained)
            if member.learner is not None:
                member.learner.load_state_dict(stored["learner"])
            if member.gates is not None:
                member.gates.load_state_dict(stored["gates"])
        for number in range(len(self._optimizers)):
            self._listen(number)

    def check(self, state: Mapping[str, Any]) -> None:
        """Whether `state` is of such a model and of this configuration, whatever the model's weights are now.

        Raises:
            ResumeError: it is not; the message says in what they differ.
        """
        check_state(state, self.config, self.layers, len(self._optimizers))

    def finish(self) -> None:
        """See `padst.finalize`, which calls this."""
        self._reshard()
        for handle in self._handles:
            handle.remove()
        for member in self._members:
            member.trained.forget()
            member.trained.follow()
            if member.learner is not None:
                member.learner.finish(self.world)
                member.trained.share_topology()
            if member.gates is not None:
                member.gates.finish(self.world)
            if member.trained.alive is not None and not _keeps_places(member.trained):
                _compact(member.trained, member.trained.alive)


def _gates(trained: TrainedLayer, config: DSTConfig) -> SoftTopK | None:
    if config.method != "dynadiag":
        return None
    assert config.final_sparsity is not None  # the configuration demands it
    trained.structure.check(trained.shape, config.final_sparsity, trained.name)
    keep = trained.structure.units_per_pool(trained.shape, config.final_sparsity)
    return SoftTopK(trained, keep, config.last_update)


def _finite(member: _Member) -> bool:
    """Whether this step's gradient and the weights are finite."""
    values = member.trained.layer.values
    if member.listener is not None and member.listener.poisoned:
        return False
    return all(bool(local(tensor).isfinite().all()) for tensor in (values, values.grad) if tensor is not None)


def _is_silent(member: _Member) -> bool:
    """Whether a layer's gradient was asked for and never came: it was not used, or not trained."""
    return member.scores is not None and member.scores.total is None


def _keeps_places(trained: TrainedLayer) -> bool:
    """Whether pruned weights stay stored as zeros: N:M has fixed places, and FSDP2 a parameter that it alone replaces."""
    return isinstance(trained.structure, NM) or is_sharded(trained.layer.values)


def _compact(trained: TrainedLayer, alive: torch.Tensor) -> None:
    first = trained.layer
    compact(first, alive)
    for layer in trained.layers[1:]:
        layer.values = first.values
        for name, index in zip(first.config.structure.index_names, first.topology, strict=True):
            layer.register_buffer(name, index)
