"""Sums over tokens, cut into shares: enough programs for the device, added up in a fixed order afterwards."""

from __future__ import annotations

import dataclasses

import torch

_PROGRAMS = 512  # some waves of a large GPU
_LEAST_STEPS = 8  # a share is worth a pass over its sums only if it adds up at least as many steps


@dataclasses.dataclass(frozen=True)
class TokenShares:
    """How many programs sum over the tokens for the same result, and how many tokens each of them takes.

    Depends on sizes alone, so the same sums are made in every run.
    """

    count: int
    size: int


def share_tokens(tokens: int, step: int, programs: int) -> TokenShares:
    """Shares that bring `programs` per share to a full device.

    Args:
        tokens: to sum over.
        step: tokens that a program takes at once; shares are multiples of it.
        programs: of one share.
    """
    steps = max(1, -(-tokens // step))
    wanted = min(-(-_PROGRAMS // max(1, programs)), max(1, steps // _LEAST_STEPS))
    size = -(-steps // wanted) * step
    return TokenShares(max(1, -(-tokens // size)), size)


def partial_sums(shares: TokenShares, like: torch.Tensor) -> torch.Tensor:
    """Uninitialised memory `[shares, *like.shape]` for the sums of all shares: float32, unless one share is the result."""
    dtype = like.dtype if shares.count == 1 else torch.float32
    return torch.empty((shares.count, *like.shape), dtype=dtype, device=like.device)


def total(partial: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The sum of `partial_sums` in `dtype`."""
    return partial[0] if partial.shape[0] == 1 else partial.sum(0).to(dtype)
