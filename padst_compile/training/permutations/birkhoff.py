"""Soft permutations: doubly stochastic matrices (the Birkhoff polytope), and the penalty that drives them to its corners.

The penalty is that of AutoShuffleNet (Lyu et al., KDD 2020, arXiv 1901.08624), which PA-DST uses: on the polytope
`P(M) = Σ rows (‖·‖1 - ‖·‖2) + Σ columns (‖·‖1 - ‖·‖2)` is zero for permutations alone. It is divided by its upper bound 2n
here, so that one weight and one threshold mean the same for layers of all sizes.
"""

from __future__ import annotations

import torch

from padst_compile.errors import PermutationScoresError

_INITIAL_PASSES = 20
_INITIAL_NOISE = 0.05  # relative to 1/n


def matrix_of(indices: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The matrix Π of a permutation `[n]`: `Π[i, indices[i]] = 1`, `[n, n]`, and `x @ Π.T == x[..., indices]`."""
    size = indices.numel()
    matrix = torch.zeros(size, size, dtype=dtype, device=indices.device)
    return matrix.scatter_(1, indices.long()[:, None], 1.0)


def penalty(matrix: torch.Tensor) -> torch.Tensor:
    """`P(M) / 2n`: 0 for a permutation, `1 - 1/√n` for the uniform matrix, so in [0, 1) on the polytope.

    Args:
        matrix: `[n, n]`; 16-bit types are computed with in float32.

    Returns:
        A scalar.
    """
    wide = _wide(matrix)
    lines = 2 * wide.abs().sum() - _lengths(wide, 1).sum() - _lengths(wide, 0).sum()
    return lines / (2 * matrix.shape[0])


def penalty_gradient(matrix: torch.Tensor) -> torch.Tensor:
    """The gradient of `penalty`, `[n, n]`, in closed form.

    At an entry of 0 this is the derivative towards positive values, the only ones that the polytope has: there the 1-norms grow
    at full rate, while the derivative of `|m|` that autograd takes, 0, would let noise push such entries up for nothing. A row
    or column of zeros, whose 2-norm has no derivative, contributes none.
    """
    wide = _wide(matrix)
    tiny = torch.finfo(wide.dtype).tiny
    signs = torch.where(wide < 0, -2.0, 2.0)
    rows, columns = _lengths(wide, 1).clamp_min(tiny), _lengths(wide, 0).clamp_min(tiny)
    return (signs - wide / rows - wide / columns) / (2 * matrix.shape[0])


def project_(matrix: torch.Tensor, passes: int = 1) -> torch.Tensor:
    """Bring a matrix back towards the polytope, in place: no negative entries, then normal columns and rows in turn.

    Rows sum to 1 afterwards; columns do so in the limit of many passes (Sinkhorn). One pass after every step is what PA-DST's
    precursor does: steps are small, so errors do not pile up. A line without any positive entry becomes uniform.

    Args:
        matrix: `[n, n]` float32 or float64. In 16 bits small entries would vanish, so it is refused.
        passes: over columns and rows.

    Returns:
        `matrix`.

    Raises:
        PermutationScoresError: another dtype.
    """
    if matrix.dtype not in (torch.float32, torch.float64):
        raise PermutationScoresError(
            f"soft permutations are projected in float32, not {matrix.dtype}; keep the matrix in float32"
        )
    with torch.no_grad():
        matrix.clamp_(min=0)
        for _ in range(passes):
            for dim in (0, 1):
                sums = matrix.sum(dim, keepdim=True)
                empty = sums == 0
                matrix.div_(sums.masked_fill(empty, 1)).add_(empty.to(matrix.dtype) / matrix.shape[0])
    return matrix


def initial(size: int, *, generator: torch.Generator) -> torch.Tensor:
    """A doubly stochastic matrix to start from: nearly uniform, whatever the layer's permutation was.

    For the outcome is easily decided here. In an experiment with the penalty alone, 52 to 65 % of the rows of a random start
    ended where its own linear assignment puts them; in another, with a weak task and a penalty at full strength from the first
    step, a share of 0.1 for the permutation before led back to it in every row. Small noise and a penalty that warms up
    (`autoshuffle.weight_at`) leave the choice to the task.

    Returns:
        float32 `[size, size]` on the device of the generator.
    """
    uniform = torch.rand(size, size, generator=generator, dtype=torch.float32, device=generator.device)
    return project_(1 + _INITIAL_NOISE * (2 * uniform - 1), _INITIAL_PASSES)


def _wide(matrix: torch.Tensor) -> torch.Tensor:
    return matrix.detach() if matrix.dtype == torch.float64 else matrix.detach().float()


def _lengths(matrix: torch.Tensor, dim: int) -> torch.Tensor:
    lengths: torch.Tensor = torch.linalg.vector_norm(matrix, dim=dim, keepdim=True)
    return lengths
