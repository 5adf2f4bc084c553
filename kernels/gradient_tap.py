"""Lets a listener see what the weight gradient of a layer is made of, in eager and in compiled backward passes alike.

Growth of weights that are not active needs the dense gradient, which no op computes. Module hooks would not do: a compiled
program ignores those that come later. So the ops that compute the gradient of the active weights hand their operands to
whoever listens to the layer, which they know by its first index tensor: its place in memory stays the same while a model
trains, through autocast, sharding of the weights, and compilation; a layer that moves takes its listener along. Without
listeners this costs one look at an empty dict.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Protocol

import torch


class GradientListener(Protocol):
    """Receives the gradient of a layer's dense S, `y = S x`, in one of two forms, once for each backward pass."""

    def products(
        self, grad: torch.Tensor, x: torch.Tensor, rows: torch.Tensor | None = None, columns: torch.Tensor | None = None
    ) -> None:
        """The gradient is `product(grad, x, rows, columns)`."""

    def weight(self, gradient: torch.Tensor) -> None:
        """The gradient itself, `[out_features, in_features]`, of a layer that runs dense."""

    def to(self, device: torch.device) -> None:
        """Keep on this device what there is so far, and expect gradients from it: the layer has been moved."""


_GATHERED_ROWS = 32  # enough for a GEMM, and few of the tokens' columns to gather
_PARTS = 8


def part_height(height: int, rows: torch.Tensor | None = None) -> int:
    """How many rows of a gradient of `height` rows to compute at once, so that they are a fraction of it; `rows` as below."""
    return max(_GATHERED_ROWS, -(-height // _PARTS)) if rows is None else _GATHERED_ROWS


def product(
    grad: torch.Tensor, x: torch.Tensor, rows: torch.Tensor | None = None, columns: torch.Tensor | None = None
) -> torch.Tensor:
    """`(grad.T @ x)[rows][:, columns]`, without a copy of that size, of `grad` or of `x`.

    Args:
        grad: `[tokens, out_features]`.
        x: `[tokens, in_features]`.
        rows: features of `grad`, int32 or int64; None for all of them.
        columns: features of `x`, likewise.

    Returns:
        float32 `[rows, columns]`.
    """
    if rows is None and columns is None:
        return (grad.T @ x).float()
    height = grad.shape[1] if rows is None else len(rows)
    result = torch.empty(height, x.shape[1] if columns is None else len(columns), device=x.device)
    step = part_height(height, rows)
    for begin in range(0, height, step):
        result[begin : begin + step] = product_part(grad, x, rows, columns, begin, step)
    return result


def product_part(
    grad: torch.Tensor, x: torch.Tensor, rows: torch.Tensor | None, columns: torch.Tensor | None, begin: int, count: int
) -> torch.Tensor:
    """The rows from `begin` on of `product`, at most `count`: float32, in memory of their own."""
    part = slice(begin, begin + count)
    gradient = ((grad[:, part] if rows is None else grad[:, rows[part]]).T @ x).float()
    return gradient if columns is None else gradient.index_select(1, columns)


# Weak, so that a training that is given up midway leaves nobody behind who listens to memory that others use by then.
_listeners: weakref.WeakValueDictionary[tuple[torch.device, int], GradientListener] = weakref.WeakValueDictionary()


def listen(index: torch.Tensor, listener: GradientListener) -> None:
    """Let `listener` have every gradient of the layer whose first index tensor this is, until `forget` or its end of life."""
    _listeners[_key(index)] = listener


def forget(index: torch.Tensor) -> None:
    """Stop listening to a layer; nothing happens if nobody did."""
    _listeners.pop(_key(index), None)


def listener_of(topology: Sequence[torch.Tensor]) -> GradientListener | None:
    """Who listens to the layer with these index tensors, or None."""
    return _listeners.get(_key(topology[0])) if _listeners else None


def _key(index: torch.Tensor) -> tuple[torch.device, int]:
    return index.device, index.data_ptr()
