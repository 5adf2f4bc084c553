"""The gradient of a loss by the matrix of a permutation, from what the forward pass read and what the backward pass brought."""

from __future__ import annotations

import torch


def permutation_gradient(
    grad_permuted: torch.Tensor,
    x: torch.Tensor,
    *,
    tokens: int | None = None,
    generator: torch.Generator | None = None,
    chunk: int = 4096,
) -> torch.Tensor:
    """dL/dΠ for `z = x @ Π.T`: entry `[i, j]` is the sum over tokens of `grad_permuted[t, i] * x[t, j]`.

    Args:
        grad_permuted: dL/dz, `[..., n]`.
        x: what was permuted, in its own order, `[..., n]`.
        tokens: estimate from that many tokens, drawn without repetition and scaled up, so that the mean is right; None or more
            than there are: all.
        generator: of that choice.
        chunk: tokens at a time; bounds the float32 copies of 16-bit inputs.

    Returns:
        `[n, n]`, accumulated in float32, or float64 for float64 inputs.
    """
    gradients, inputs, scale = _sample(grad_permuted, x, tokens, generator)
    dtype = _accumulator(x)
    total = torch.zeros(gradients.shape[1], inputs.shape[1], dtype=dtype, device=x.device)
    for one, other in zip(gradients.split(chunk), inputs.split(chunk), strict=True):
        total.addmm_(one.to(dtype).T, other.to(dtype))
    return total.mul_(scale)


def block_gradient(
    grad_permuted: torch.Tensor,
    x: torch.Tensor,
    places: torch.Tensor,
    features: torch.Tensor,
    *,
    tokens: int | None = None,
    generator: torch.Generator | None = None,
    chunk: int = 4096,
) -> torch.Tensor:
    """Only certain blocks of dL/dΠ: entry `[k, a, b]` is the one at `[places[k, a], features[k, b]]`.

    Args:
        grad_permuted: as for `permutation_gradient`.
        x: the same.
        places: int64 `[blocks, width]`, rows of Π.
        features: int64 `[blocks, width]`, columns of Π.
        tokens: as for `permutation_gradient`.
        generator: the same.
        chunk: the same.

    Returns:
        `[blocks, width, width]`, accumulated in float32, or float64 for float64 inputs.
    """
    gradients, inputs, scale = _sample(grad_permuted, x, tokens, generator)
    dtype = _accumulator(x)
    total = torch.zeros(*places.shape, features.shape[1], dtype=dtype, device=x.device)
    for one, other in zip(gradients.split(chunk), inputs.split(chunk), strict=True):
        rows = one[:, places].to(dtype).permute(1, 2, 0)  # [blocks, width, tokens]
        total.baddbmm_(rows, other[:, features].to(dtype).transpose(0, 1))
    return total.mul_(scale)


def _sample(
    grad_permuted: torch.Tensor, x: torch.Tensor, tokens: int | None, generator: torch.Generator | None
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Both as `[tokens, n]`, and the factor that makes up for those left out."""
    gradients = grad_permuted.detach().reshape(-1, grad_permuted.shape[-1])
    inputs = x.detach().reshape(-1, x.shape[-1])
    count = inputs.shape[0]
    if tokens is None or tokens >= count:
        return gradients, inputs, 1.0
    drawn = torch.randperm(count, generator=generator, device="cpu" if generator is None else generator.device)[:tokens]
    chosen = drawn.sort().values.to(x.device)
    return gradients[chosen], inputs[chosen], count / tokens


def _accumulator(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
