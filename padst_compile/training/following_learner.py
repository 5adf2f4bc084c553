"""The permutation of a layer that another layer's learner sets, too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from padst_compile.training.reducer import Reducer
from padst_compile.training.sinkhorn_learner import SinkhornLearner
from padst_compile.training.trained_layer import TrainedLayer
from padst_compile.training.world import World


class FollowingLearner:
    """Of a layer that must have the permutation of another: hands its gradient to that one's learner, which sets both."""

    penalty = 0.0
    hard = True
    hardened_at = 0

    def __init__(self, leader: SinkhornLearner, trained: TrainedLayer) -> None:
        self.leader, self.trained = leader, trained

    def permutation(self) -> torch.Tensor:
        """See `PermutationLearner`."""
        return self.trained.permutation

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
