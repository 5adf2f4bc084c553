"""From scores to permutations: exact linear assignment, so that the result is a permutation whatever the scores are.

Rounding each row of a soft matrix on its own (argmax) may take a feature twice and lose another; assignment cannot.
"""

from __future__ import annotations

import torch

from padst_compile.errors import PermutationScoresError
from padst_compile.permutation import INDEX_DTYPE


def harden(scores: torch.Tensor, owner: str = "harden") -> torch.Tensor:
    """The permutation `p` with the largest sum of `scores[i, p[i]]`.

    Equal sums are decided by scipy's algorithm from the scores alone, alike on all devices; scores that are all equal give the
    identity.

    Args:
        scores: `[n, n]`, any real dtype and device; a soft permutation or a matrix of benefits. Computed with in float64.
        owner: what they belong to, for the message.

    Returns:
        int32 `[n]` on the device of the scores.

    Raises:
        PermutationScoresError: not square, or not finite.
    """
    if scores.ndim != 2:
        raise PermutationScoresError(f"{owner}: scores of a permutation are a square matrix, got shape {list(scores.shape)}")
    return harden_blocks(scores[None], owner)[0]


def harden_blocks(scores: torch.Tensor, owner: str = "harden_blocks") -> torch.Tensor:
    """The same for every block of `scores` `[blocks, n, n]`; int32 `[blocks, n]`.

    Raises:
        PermutationScoresError: not square, or not finite.
    """
    from scipy.optimize import linear_sum_assignment  # late: `import padst_compile` stays cheap

    if scores.ndim != 3 or scores.shape[1] != scores.shape[2]:
        raise PermutationScoresError(f"{owner}: scores of permutations are square matrices, got shape {list(scores.shape)}")
    matrices = scores.detach().to("cpu", torch.float64)
    if not bool(matrices.isfinite().all()):
        raise PermutationScoresError(
            f"{owner}: the scores hold NaN or infinite entries, so no permutation is best; "
            "look for the step that first made a gradient infinite, and lower the learning rate"
        )
    chosen = torch.empty(matrices.shape[:2], dtype=INDEX_DTYPE)
    for block, matrix in enumerate(matrices.numpy()):
        _, columns = linear_sum_assignment(matrix, maximize=True)
        chosen[block] = torch.from_numpy(columns)
    return chosen.to(scores.device)
