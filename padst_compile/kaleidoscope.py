"""Structured random permutations, from a network of exchanges like that of kaleidoscope matrices: a control for others."""

from __future__ import annotations

import torch

from padst_compile.permutation import INDEX_DTYPE, identity


def random(size: int, generator: torch.Generator) -> torch.Tensor:
    """A random permutation that a butterfly network can do (the factor B of a kaleidoscope matrix, Dao et al. 2020).

    For `size = 2^k` there are k stages; stage s exchanges, or leaves, the features of each pair of places `(i, i + 2^s)`. Each
    choice of exchanges gives another permutation, all equally likely: `2^(k * size / 2)` of all `size!`.

    Other sizes are taken apart into prime factors (768 = 2^8 * 3), with one stage per factor r that permutes each set of r
    places, a stride apart, at random. A prime size thus has one stage, and any permutation.

    Args:
        size: number of features.
        generator: of the exchanges.

    Returns:
        int32 `[size]` on the generator's device.
    """
    indices = identity(size, device=generator.device)
    stride = 1
    for radix in _prime_factors(size):
        lines = indices.reshape(-1, radix, stride)
        keys = torch.rand(lines.shape, generator=generator, dtype=torch.float64, device=generator.device)
        indices = lines.gather(1, keys.argsort(dim=1, stable=True)).flatten()
        stride *= radix
    return indices.to(INDEX_DTYPE)


def _prime_factors(number: int) -> list[int]:
    """Ascending; none for 1."""
    factors, candidate = [], 2
    while candidate * candidate <= number:
        while number % candidate == 0:
            factors.append(candidate)
            number //= candidate
        candidate += 1
    return [*factors, number] if number > 1 else factors
