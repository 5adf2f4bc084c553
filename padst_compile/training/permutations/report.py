"""How far apart two permutations are, in numbers that do not depend on their size."""

from __future__ import annotations

import bisect
import dataclasses

import torch

from padst_compile.permutation import identity, inverse


@dataclasses.dataclass(frozen=True)
class Distance:
    """Of one permutation from another, which is 0 in every respect for equal ones.

    Let `r[i]` be the place at which the other has the feature that the one has at place `i`.

    Attributes:
        moved: fraction of the features that lie elsewhere, `r[i] != i`; about 1 for a random permutation.
        displacement: mean of `|r[i] - i|`, over its mean `(n^2 - 1) / 3n` for random permutations; about 1 for those.
        inversions: fraction of the pairs of features whose order differs (Kendall's τ is `1 - 2 * inversions`); about 0.5 for a
            random permutation, 1 for the reverse.
    """

    moved: float
    displacement: float
    inversions: float


def distance(indices: torch.Tensor, other: torch.Tensor | None = None) -> Distance:
    """How far `indices` `[n]` is from `other` `[n]`, or from the identity."""
    indices = indices.cpu()
    size = indices.numel()
    if size < 2:
        return Distance(0.0, 0.0, 0.0)
    reference = identity(size) if other is None else other.cpu()
    relative = inverse(reference.long())[indices.long()]
    steps = (relative - torch.arange(size)).abs()
    return Distance(
        moved=float((steps > 0).double().mean()),
        displacement=float(steps.double().mean()) * 3 * size / (size * size - 1),
        inversions=_inversions(relative.tolist()) / (size * (size - 1) / 2),
    )


def _inversions(values: list[int]) -> int:
    """Pairs in descending order."""
    seen: list[int] = []
    count = 0
    for value in values:
        place = bisect.bisect(seen, value)
        count += len(seen) - place
        seen.insert(place, value)
    return count
