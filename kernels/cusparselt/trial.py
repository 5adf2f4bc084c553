"""Whether the library's results are right here: some of its algorithms were not, on some sizes (pytorch/pytorch#155333)."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from padst_compile.kernels.cusparselt.op import two_of_four_linear, two_of_four_pack

_RARE = 1.5  # standard deviations: one input of eight is not zero, so that sums stay small whole numbers


def assert_exact(weight: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Multiplies signs, whose sums are whole numbers and exact in any order, for several numbers of tokens.

    Args:
        weight: `[out, in]`, 2:4, in a dtype that is multiplied.
        x: `[tokens, in]`, of a normal distribution.
        bias: `[out]` or None.

    Raises:
        RuntimeError: a sum is wrong, or what the library raises.
    """
    signs, inputs = weight.sign(), x.sign() * (x.abs() > _RARE)
    packed, added = two_of_four_pack(signs), None if bias is None else bias.sign()
    for tokens in _token_counts(x.shape[0]):
        exact = F.linear(inputs[:tokens], signs, added)
        if not torch.equal(two_of_four_linear(inputs[:tokens], packed, added, None, weight.shape[0]), exact):
            raise RuntimeError(f"its results for {tokens} tokens are wrong here")


def _token_counts(tokens: int) -> list[int]:
    """What a power of two stands for: itself, and some numbers down to its half."""
    return sorted({tokens, max(1, tokens * 3 // 4), tokens // 2 + 1})
