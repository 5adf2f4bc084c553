"""AutoShuffle, the method of PA-DST: descend on a soft permutation under a penalty until it is nearly hard.

The loss is `task + λ Σ_layers P(M) / 2n`. The penalty of a layer is below 1 whatever its size, so λ is the most that a layer's
softness may add to the loss, and the gradient of the penalty is of order `λ / n` per entry. So is the task's where the loss
depends on all n features about equally; that is why one λ does for all layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from padst_compile.permutation_search.assignment import harden
from padst_compile.training.permutations import birkhoff
from padst_compile.training.permutations.adam import Adam


def weight_at(step: int, warmup: int, weight: float) -> float:
    """λ at an optimizer step, counted from 0: rises linearly to `weight` over `warmup` steps, then stays.

    Early on the task must decide; a penalty at full strength from the start makes the random start hard.
    """
    return weight if step >= warmup else weight * step / warmup


def should_harden(penalty: float, step: int, *, threshold: float = 0.11, deadline: int | None = None) -> bool:
    """Whether a layer's permutation becomes hard now: its normalised penalty is low enough, or its time is up.

    Args:
        penalty: `birkhoff.penalty` of the layer.
        step: the optimizer step.
        threshold: in an experiment without a task, linear assignment at 0.11 agreed in 94.5 % of the rows with what further
            training would have given, at 0.22 in 88 %.
        deadline: the step from which on every permutation is hard; None for never.
    """
    return penalty < threshold or (deadline is not None and step >= deadline)


class AutoShuffle:
    """A soft permutation that learns.

    Args:
        matrix: `[n, n]` float32, doubly stochastic (`birkhoff.initial`); changed in place, so that it may be a layer's buffer.
        learning_rate: of Adam, in units of `1/n`, the size of the entries at the start.
        owner: the layer, for messages.
    """

    def __init__(self, matrix: torch.Tensor, *, learning_rate: float = 1.0, owner: str = "AutoShuffle") -> None:
        self.learning_rate, self.owner = learning_rate, owner
        self._adam = Adam(matrix)

    @property
    def matrix(self) -> torch.Tensor:
        """M, float32 `[n, n]`."""
        return self._adam.parameter

    def step(self, task_gradient: torch.Tensor, weight: float) -> None:
        """One step of projected Adam.

        Args:
            task_gradient: of the task's loss by M, `[n, n]`, any floating dtype. One that is not finite makes `harden` raise
                later: leave out such steps.
            weight: λ of this step.
        """
        gradient = birkhoff.penalty_gradient(self.matrix).mul_(weight).add_(task_gradient)
        self._adam.step(gradient, self.learning_rate / self.matrix.shape[0])
        birkhoff.project_(self.matrix)

    def penalty(self) -> float:
        """How far from a permutation, in [0, 1)."""
        return float(birkhoff.penalty(self.matrix))

    def harden(self) -> torch.Tensor:
        """The nearest permutation, int32 `[n]`.

        Raises:
            PermutationScoresError: the matrix is not finite.
        """
        return harden(self.matrix, self.owner)

    def state_dict(self) -> dict[str, Any]:
        """Matrix, moments and number of steps: tensors, not copies."""
        return self._adam.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state, bit for bit; the matrix stays the same tensor.

        Raises:
            ResumeError: the state is of another layer or method; nothing was changed.
        """
        self._adam.load_state_dict(state, self.owner)
