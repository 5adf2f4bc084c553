"""`padst::soft_permute`: a permutation that is still being learned, soft or hard as a flag in memory says.

The flag is a tensor, not an attribute, so a layer that hardens recompiles nothing. The gradient of the soft matrix is no
output: it goes to whoever listens at the flag (`gradient_tap`), so that a hardened layer neither computes nor stores it.
"""

from __future__ import annotations

from typing import Any

import torch

from padst_compile.kernels import gradient_tap, remembered
from padst_compile.kernels.permute import gather_features

HARD, SOFT = 0, 1


@torch.library.custom_op("padst::soft_permute", mutates_args=())
def soft_permute(
    x: torch.Tensor, indices: torch.Tensor, soft: torch.Tensor, state: torch.Tensor, anchor: torch.Tensor | None = None
) -> torch.Tensor:
    """`x @ soft.T` while soft, `x[..., indices]` once hard (PA-DST section 3: `Π x` with Π relaxed to `soft`).

    Args:
        x: `[..., features]`, floating.
        indices: int32 `[features]`, the permutation once hard.
        soft: `[features, features]`, floating; computed with in the dtype of `x`. Not read once hard.
        state: uint8 `[1]` on the CPU: `SOFT` or `HARD`.
        anchor: float32 `[1]` that takes gradients, all zero. With it a backward pass runs, and listeners hear of it, even where
            `x` takes none, as at a model's input.

    Returns:
        A new contiguous tensor of `x`'s shape and dtype.
    """
    if int(state) == SOFT:
        with torch.autocast(x.device.type, enabled=False):  # the result has the dtype of `x`, as promised
            return torch.nn.functional.linear(x, soft.to(x.dtype))
    return gather_features(x, indices)


@soft_permute.register_fake
def _soft_permute_fake(
    x: torch.Tensor, indices: torch.Tensor, soft: torch.Tensor, state: torch.Tensor, anchor: torch.Tensor | None = None
) -> torch.Tensor:
    torch._check(x.shape[-1] == indices.shape[0], lambda: f"{indices.shape[0]} indices cannot permute {x.shape[-1]} features")
    return x.new_empty(x.shape)


@torch.library.custom_op("padst::soft_permute_gradient", mutates_args=())
def soft_permute_gradient(
    grad: torch.Tensor, x: torch.Tensor, indices: torch.Tensor, soft: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of `x` `[..., features]` and of the anchor.

    While soft, a listener gets the products that make up the gradient of `soft`.
    """
    nothing = torch.zeros(1, device=grad.device)
    if int(state) != SOFT:
        return gather_features(grad, remembered.inverse(indices)), nothing
    listener = gradient_tap.listener_of((state,))
    if listener is not None:
        listener.products(grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1]))
    with torch.autocast(grad.device.type, enabled=False):
        return torch.nn.functional.linear(grad, soft.to(grad.dtype).T), nothing


@soft_permute_gradient.register_fake
def _soft_permute_gradient_fake(
    grad: torch.Tensor, x: torch.Tensor, indices: torch.Tensor, soft: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return grad.new_empty(grad.shape), grad.new_empty(1, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.anchored = inputs[4] is not None


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    grad_x, grad_anchor = torch.ops.padst.soft_permute_gradient(grad, *ctx.saved_tensors)
    return grad_x, None, None, None, grad_anchor if ctx.anchored else None


soft_permute.register_autograd(_backward, setup_context=_save)
