"""Which backward passes count: those whose gradients the next optimizer step uses.

Listeners hear of every backward pass, and some are in vain: a GradScaler leaves the step out because some layer's gradient
overflowed, or a program drops the gradients. The other layers' gradients were finite, and have been added up. That they were
dropped leaves one trace: when the next backward pass reaches the layer, nothing is accumulated beside its weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from padst_compile.training.sharding import local


class Restartable(Protocol):
    """Adds something up over the backward passes before a step."""

    def clear(self) -> None:
        """Begin anew."""


class Passes:
    """Watches one set of weights, and lets what is added up beside them begin anew when their gradient has been dropped.

    Args:
        weights: those that hold the gradient: the optimizer's, and those that the layer has now, which are others while FSDP2
            has gathered them.
    """

    def __init__(self, weights: Callable[[], tuple[torch.Tensor, ...]]) -> None:
        self._weights = weights
        self._watched: list[Restartable] = []
        self._current: int | None = None

    def watch(self, watched: Restartable) -> None:
        """Let `watched` begin anew, too, until `forget`."""
        self._watched.append(watched)

    def forget(self) -> None:
        """Watch nothing."""
        self._watched.clear()

    def enter(self) -> None:
        """To be called before a backward pass adds to anything; the first call within a pass looks at the weights."""
        current = torch._C._current_graph_task_id()
        if current != self._current:
            self._current = current
            self.drop_what_is_lost()

    def drop_what_is_lost(self) -> None:
        """Begin anew if nothing is accumulated beside the weights; between backward passes, or before one reaches them."""
        if not any(_holds_something(weights.grad) for weights in self._weights()):
            for watched in self._watched:
                watched.clear()


def _holds_something(gradient: torch.Tensor | None) -> bool:
    """Not where it was dropped or zeroed; a rank that has no part of it cannot tell, and assumes so."""
    if gradient is None:
        return False
    own = local(gradient)
    return own.numel() == 0 or bool(own.any())
