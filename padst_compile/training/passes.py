"""Which backward passes count: those whose gradients the next optimizer step uses.

Listeners hear of every backward pass, and some are in vain: a GradScaler leaves the step out because some layer's gradient
overflowed, or a program drops the gradients. The other layers' gradients were finite, and have been added up. That they were
dropped leaves one trace: when the next backward pass reaches the layer, nothing is accumulated beside its weights.

FSDP2 may keep gradients to itself over several passes, of which sharded weights show nothing (without gradient sync and in
another dtype, or without all-reduce). No program can drop those, and when it hands them over it calls the weights' hooks.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Protocol

import torch
from torch.utils.hooks import RemovableHandle

from padst_compile.training.sharding import is_sharded, local


class Restartable(Protocol):
    """Adds something up over the backward passes before a step."""

    def clear(self) -> None:
        """Begin anew."""


class Passes:
    """Watches one set of weights, and lets what is added up beside them begin anew when their gradient has been dropped.

    Args:
        held: the optimizer's weights.
        present: those that the layer has now, which are others while FSDP2 has gathered them.
    """

    def __init__(self, held: torch.Tensor, present: Callable[[], torch.Tensor]) -> None:
        self._held, self._present = held, present
        self._watched: list[Restartable] = []
        self._current: int | None = None
        self._kept_by_fsdp = False
        self._hook: RemovableHandle | None = None

    def watch(self, watched: Restartable) -> None:
        """Let `watched` begin anew, too, until `forget`."""
        self._watched.append(watched)
        if self._hook is None and is_sharded(self._held) and self._held.requires_grad:
            self._hook = self._held.register_post_accumulate_grad_hook(_handed_over(weakref.ref(self)))

    def forget(self) -> None:
        """Watch nothing."""
        self._watched.clear()
        self._kept_by_fsdp = False
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def enter(self) -> None:
        """To be called before a backward pass adds to anything; the first call within a pass looks at the weights."""
        current = torch._C._current_graph_task_id()
        if current != self._current:
            self._current = current
            self.drop_what_is_lost()
            self._kept_by_fsdp = self._hook is not None

    def drop_what_is_lost(self) -> None:
        """Begin anew if nothing is accumulated beside the weights; between backward passes, or before one reaches them."""
        if not self._kept_by_fsdp and not any(_holds_something(weights.grad) for weights in (self._held, self._present())):
            for watched in self._watched:
                watched.clear()

    def hand_over(self) -> None:
        """FSDP2 has put all that it kept beside the optimizer's weights."""
        self._kept_by_fsdp = False


def _handed_over(passes: weakref.ref[Passes]) -> Callable[[torch.Tensor], None]:
    """A hook that does not keep `passes` alive, as the weights may outlive a training that was given up."""

    def hook(parameter: torch.Tensor) -> None:
        alive = passes()
        if alive is not None:
            alive.hand_over()

    return hook


def _holds_something(gradient: torch.Tensor | None) -> bool:
    """Not where it was dropped or zeroed; a rank that has no part of it cannot tell, and assumes so."""
    if gradient is None:
        return False
    own = local(gradient)
    return own.numel() == 0 or bool(own.any())
