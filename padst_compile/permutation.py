"""The permutation algebra: index tensors, how they compose, how they are undone.

A permutation of `n` features is an int32 tensor `p` of shape `[n]`. Applied to the last axis of `x` it reads
`permute(x, p)[..., i] = x[..., p[i]]`: the matrix Π of the paper (section 3, `y = S Π x`) has `Π[i, p[i]] = 1`. Then

    permute(permute(x, p), q)          == permute(x, compose(p, q))         with compose(p, q) = p[q]
    permute(permute(x, p), inverse(p)) == x
"""

from __future__ import annotations

import torch

from padst_compile.errors import InvalidPermutationError

INDEX_DTYPE = torch.int32


def identity(size: int, *, device: torch.device | str | None = None) -> torch.Tensor:
    """The permutation of `size` features that moves nothing, int32 `[size]`."""
    return torch.arange(size, dtype=INDEX_DTYPE, device=device)


def random(size: int, generator: torch.Generator) -> torch.Tensor:
    """A uniformly random permutation, int32 `[size]` on the CPU, reproducible from `generator`."""
    return torch.randperm(size, generator=generator, device=generator.device).to(INDEX_DTYPE)


def compose(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The permutation that applies `first`, then `second`; both `[n]`."""
    return first[second]


def inverse(permutation: torch.Tensor) -> torch.Tensor:
    """The permutation that undoes `permutation`, `[n]`."""
    positions = torch.arange(permutation.numel(), dtype=permutation.dtype, device=permutation.device)
    return torch.zeros_like(permutation).scatter(0, permutation.long(), positions)


def is_identity(permutation: torch.Tensor) -> bool:
    """Whether `permutation` moves nothing."""
    return torch.equal(permutation, identity(permutation.numel(), device=permutation.device).to(permutation.dtype))


def check(indices: torch.Tensor, size: int, owner: str) -> torch.Tensor:
    """`indices` as a valid int32 permutation of `size` features.

    Args:
        indices: integer tensor `[size]`.
        size: the number of features it permutes.
        owner: the layer it belongs to, for the message.

    Raises:
        InvalidPermutationError: wrong dtype, shape, range, or a feature that occurs twice.
    """
    if indices.dtype.is_floating_point or indices.dtype.is_complex or indices.dtype == torch.bool:
        raise InvalidPermutationError(f"{owner}: a permutation holds integers, not {indices.dtype}; pass indices.long()")
    if indices.shape != (size,):
        raise InvalidPermutationError(
            f"{owner}: a permutation of {size} features has shape [{size}], not {list(indices.shape)}"
        )
    seen = torch.zeros(size, dtype=torch.bool, device=indices.device)
    in_range = bool(((indices >= 0) & (indices < size)).all())
    if in_range:
        seen[indices.long()] = True
    if not in_range or not bool(seen.all()):
        raise InvalidPermutationError(f"{owner}: every feature 0 … {size - 1} must occur exactly once in a permutation")
    return indices.to(INDEX_DTYPE)
