"""A layer's permutation, or that of layers which share one, as logits behind it: their gradient, and when they learn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from padst_compile.training.acting_steps import acting_steps
from padst_compile.training.config import DSTConfig, LearnedPermutation
from padst_compile.training.learner import NOTHING
from padst_compile.training.permutations.blocks import split
from padst_compile.training.permutations.sinkhorn import SinkhornSTE
from padst_compile.training.reducer import Reducer, SumOfGradients
from padst_compile.training.sharding import whole
from padst_compile.training.trained_layer import TrainedLayer
from padst_compile.training.world import World

_LEARNING_RATE = 0.05  # of Adam, on the logits


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
        start = trained.permutation
        assert config.total_steps is not None
        self.trained = trained
        deadline = int(method.deadline * config.total_steps)
        self._acting = acting_steps((trained, *followers), config, method, deadline, "deadline")
        size, exchanges = start.numel(), trained.exchanges
        places = [torch.arange(size)] if exchanges is None else exchanges.sets
        self._learner = SinkhornSTE(
            start,
            split(places, size, method.group, trained.name),
            updates=sum(1 for _ in self._acting),
            learning_rate=_LEARNING_RATE * method.learning_rate,
            owner=trained.name,
        )
        self._gradients = {each.name: _BlockGradient(each, self._learner) for each in (trained, *followers)}

    def permutation(self) -> torch.Tensor:
        """See `PermutationLearner`."""
        return self.trained.permutation

    def listen(self, step: int) -> tuple[Sequence[Reducer], Sequence[Reducer]]:
        """See `PermutationLearner`."""
        return self.listen_to(self.trained, step)

    def listen_to(self, trained: TrainedLayer, step: int) -> tuple[Sequence[Reducer], Sequence[Reducer]]:
        """The same for one of the layers that learn together."""
        self._learner.to(trained.permutation.device)
        gradient = self._gradients[trained.name] = _BlockGradient(trained, self._learner)
        return ((), (gradient,)) if step in self._acting else NOTHING

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


class _BlockGradient(SumOfGradients):
    """Adds up the gradient of Π in the blocks of a learner: `total`, float32 `[blocks, width, width]`."""

    def __init__(self, trained: TrainedLayer, learner: SinkhornSTE) -> None:
        super().__init__()
        self.trained, self.learner = trained, learner
        self._weight: torch.Tensor | None = None  # while a gradient comes

    def to(self, device: torch.device) -> None:
        """See `Reducer.to`."""
        super().to(device)
        self.learner.to(device)

    def add(self, part: torch.Tensor, begin: int) -> None:
        """See `Reducer.add`; takes the signed gradient."""
        layer = self.trained.layer
        if self._weight is None:
            self._weight = self.trained.structure.unpack(whole(layer.values), layer.topology, self.trained.shape)
        table, features = self.trained.permutation.long(), self.learner.features
        if layer.config.permuted == "input":
            back = torch.empty_like(table)
            back[table] = torch.arange(table.numel(), device=table.device)
            weight = self._weight[begin : begin + len(part)].float()
            self.pending.gather(torch.einsum("obi,obj->bij", weight[:, self.learner.places], part[:, back[features]]))
        else:
            self._add_rows(part, begin, table[self.learner.places], features)

    def end(self) -> None:
        """See `Reducer.end`."""
        super().end()
        self._weight = None

    def clear(self) -> None:
        """See `Restartable.clear`."""
        super().clear()
        self._weight = None

    def _add_rows(self, part: torch.Tensor, begin: int, rows: torch.Tensor, features: torch.Tensor) -> None:
        """For the output side: each row of the gradient meets the weights of the features of its block alone."""
        assert self._weight is not None
        if self.pending.total is None:
            self.pending.total = part.new_zeros(*rows.shape, features.shape[1])
        for own, block_rows, block_features in zip(self.pending.total, rows, features, strict=True):
            here = ((block_rows >= begin) & (block_rows < begin + len(part))).nonzero()[:, 0]
            if here.numel():
                own[here] += part[block_rows[here] - begin] @ self._weight[block_features].float().T
