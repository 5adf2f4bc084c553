"""How far a floating-point product may be from the exact one, derived instead of guessed."""

from __future__ import annotations

import torch


def error_bound(magnitude: torch.Tensor, terms: int, dtype: torch.dtype) -> torch.Tensor:
    """The most that a sum of products can be off, in whatever order it is added up.

    With the unit roundoff `u` of `dtype`, a sum of `k` terms is off by at most `gamma(k) = k u / (1 - k u)` times the sum
    of their magnitudes (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1); one more rounding stores it.

    Args:
        magnitude: the same product of absolute values, for example `x.abs() @ weight.abs().T + bias.abs()`.
        terms: how many terms each sum has; every product and every extra addition counts as one more.
        dtype: in which the sum is computed and stored.

    Returns:
        Float64 tensor in the shape of `magnitude`.
    """
    info = torch.finfo(dtype)
    unit = info.eps / 2
    gamma = terms * unit / (1 - terms * unit)
    return magnitude.double() * (gamma + unit * (1 + gamma)) + info.smallest_normal * terms


def assert_within_error_bound(actual: torch.Tensor, exact: torch.Tensor, magnitude: torch.Tensor, terms: int) -> None:
    """Fails where `actual` is further from `exact` than `error_bound` allows for its dtype.

    Args:
        actual: the computed sums.
        exact: the same in float64.
        magnitude: see `error_bound`.
        terms: see `error_bound`.
    """
    if actual.shape != exact.shape:
        raise AssertionError(f"expected shape {list(exact.shape)}, got {list(actual.shape)}")
    excess = (actual.double() - exact).abs() - error_bound(magnitude, terms, actual.dtype)
    if not bool((excess <= 0).all()):  # written so that a NaN fails
        raise AssertionError(f"{int((~(excess <= 0)).sum())} entries exceed the error bound, by up to {excess.max():.3g}")
