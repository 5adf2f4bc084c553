"""Permutations that are hard in every forward pass, learned through logits by a straight-through gradient.

After PermLLM (NeurIPS 2025, arXiv 2510.10136): logits become a soft permutation by Sinkhorn's normalisation, linear assignment
makes it hard, and the gradient of the hard one is passed on to the soft one as it is. Only blocks of places are permuted among
themselves, so n features cost n * width logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from padst_compile import permutation
from padst_compile.errors import ResumeError
from padst_compile.permutation_search.assignment import harden_blocks
from padst_compile.training.permutations.adam import Adam
from padst_compile.training.permutations.blocks import Blocks

_ITERATIONS = 5
_HOT, _COLD = 1.0, 0.1  # temperatures at the first update, and from the last on
_MARGIN = 0.1  # of the logits of the start over all others: what learning must overcome
_NEVER = -1e9  # a logit whose exponential is exactly 0; infinite ones would make gradients NaN


def sinkhorn(logits: torch.Tensor, iterations: int = _ITERATIONS, temperature: float = _HOT) -> torch.Tensor:
    """Doubly stochastic matrices from logits, by normalising rows and columns in turn, in log space.

    Args:
        logits: `[blocks, width, width]`; differentiable.
        iterations: 0 leaves rows and columns as they are.
        temperature: divides the logits; low ones make the result harder.

    Returns:
        `[blocks, width, width]`; columns sum to 1, rows in the limit of many iterations.
    """
    logarithms = logits / temperature
    for _ in range(iterations):
        logarithms = logarithms.log_softmax(-1).log_softmax(-2)
    return logarithms.exp()


def temperature_at(update: int, updates: int) -> float:
    """The temperature at an update, counted from 0: it falls linearly over `updates`, then stays."""
    return _COLD if update >= updates else _HOT + (_COLD - _HOT) * update / updates


class SinkhornSTE:
    """Logits behind a hard permutation.

    Args:
        start: int32 `[n]`, the permutation before the first update.
        blocks: which places exchange features; `blocks.split`.
        updates: over which the temperature falls.
        learning_rate: of Adam on the logits.
        owner: the layer, for messages.

    Attributes:
        places: int64 `[blocks, width]`: the rows of Π that a block's rows are.
        features: int64 `[blocks, width]`: the columns of Π that its columns are, the features of `start` at `places`.
    """

    def __init__(
        self,
        start: torch.Tensor,
        blocks: Blocks,
        *,
        updates: int,
        learning_rate: float = 0.05,
        owner: str = "SinkhornSTE",
    ) -> None:
        self._start = permutation.check(start, start.numel(), owner).clone()
        self._blocks = blocks.to(start.device)
        self.updates, self.learning_rate, self.owner = updates, learning_rate, owner
        width = blocks.places.shape[1]
        self._eye = torch.eye(width, dtype=torch.bool, device=start.device)
        self._valid = self._blocks.valid_of_orders()
        logits = (_MARGIN * self._eye.float()).expand(self._valid.shape[0], -1, -1).contiguous()
        self._adam = Adam(logits)

    @property
    def places(self) -> torch.Tensor:
        """See the class."""
        return self._blocks.places

    @property
    def features(self) -> torch.Tensor:
        """See the class."""
        return self._start.long()[self._blocks.places]

    @property
    def logits(self) -> torch.Tensor:
        """float32 `[orders, width, width]`; rows are places, columns features."""
        return self._adam.parameter

    @property
    def update_count(self) -> int:
        """Updates so far."""
        return int(self._adam.steps)

    def to(self, device: torch.device) -> None:
        """Move all of it to another device."""
        self._start, self._blocks, self._eye = self._start.to(device), self._blocks.to(device), self._eye.to(device)
        self._valid = self._valid.to(device)
        self._adam.to(device)

    def soft(self) -> torch.Tensor:
        """The soft permutations at the present temperature, `[orders, width, width]`."""
        with torch.no_grad():
            return self._soften(self.logits)

    def hard(self) -> torch.Tensor:
        """The permutation, int32 `[n]`: linear assignment of the soft one in every block.

        Raises:
            PermutationScoresError: the logits are not finite.
        """
        return self._blocks.permutation(self._start, harden_blocks(self.soft(), self.owner))

    def update(self, gradient: torch.Tensor) -> None:
        """One Adam step on the logits.

        Args:
            gradient: of the loss by the hard Π, `[blocks, width, width]`, any floating dtype: entry `[b, i, j]` is that of
                `Π[places[b, i], features[b, j]]`. It is taken for the soft ones' (straight-through). Layers that must share
                one permutation share one learner, with the sum of their gradients.
        """
        logits = self.logits.detach().clone().requires_grad_()
        with torch.enable_grad():
            soft = self._soften(logits)
        (through,) = torch.autograd.grad(soft, logits, self._blocks.add_up(gradient.to(soft.dtype)))
        self._adam.step(through, self.learning_rate)

    def state_dict(self) -> dict[str, Any]:
        """Logits, moments and number of updates, with what they refer to: tensors, not copies."""
        return {**self._adam.state_dict(), "start": self._start, "places": self._blocks.places}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state, bit for bit; `start` comes from the state.

        Raises:
            ResumeError: the state is of another layer, method or division into blocks; nothing was changed.
        """
        own = {"start": self._start, "places": self._blocks.places}
        for name, tensor in own.items():
            other = state.get(name)
            if other is None or other.shape != tensor.shape:
                raise ResumeError(f"{self.owner}: the state is of another method or layer: its {name!r} does not fit")
        if not torch.equal(state["places"].to(self.places.device), self.places):
            raise ResumeError(f"{self.owner}: the state divides the features into other blocks; resume with its configuration")
        self._adam.load_state_dict({name: value for name, value in state.items() if name not in own}, self.owner)
        self._start.copy_(state["start"])

    def _soften(self, logits: torch.Tensor) -> torch.Tensor:
        """What fills blocks up keeps to itself: exactly 1 on the diagonal, 0 elsewhere."""
        valid = self._valid
        inside = valid[:, :, None] & valid[:, None, :]
        masked = logits.masked_fill(~inside, _NEVER).masked_fill(~inside & self._eye, 0.0)
        return sinkhorn(masked, temperature=temperature_at(self.update_count, self.updates))
