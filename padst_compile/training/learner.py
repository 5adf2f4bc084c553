"""What the runtime asks of whoever learns the permutation of a layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from padst_compile.training.reducer import Reducer
from padst_compile.training.world import World

NOTHING: tuple[tuple[Reducer, ...], tuple[Reducer, ...]] = ((), ())  # what a learner asks for that need not `listen`


class PermutationLearner(Protocol):
    """Learns one layer's permutation from what it sees between optimizer steps."""

    @property
    def penalty(self) -> float:
        """How far from a permutation the layer still is, in [0, 1); 0 once hard."""

    @property
    def hard(self) -> bool:
        """Whether the layer applies a permutation, not a mixture."""

    @property
    def hardened_at(self) -> int | None:
        """The step at which it became hard; 0 for one that always was, None while soft."""

    def permutation(self) -> torch.Tensor:
        """The layer's permutation, or the one that it would become now, int32 `[features]`."""

    def listen(self, step: int) -> tuple[Sequence[Reducer], Sequence[Reducer]]:
        """Who wants the magnitudes, and who the signed dense gradients of S, of the backward passes before `step`."""

    def after_step(self, step: int, world: World, loss_scale: float) -> None:
        """Use what was seen, after the optimizer's `step`-th step; gradients were of the loss times `loss_scale`."""

    def finish(self, world: World) -> None:
        """Make the permutation hard and take training state off the layer."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
