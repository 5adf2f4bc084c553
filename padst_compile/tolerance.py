"""How far a result may be from the exact one: a few times as far as plain rounding takes the same model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

# How much worse than the model's own rounding a result may be: blocked sums associate differently.
_SLACK = 4.0


def relative_error(found: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> float:
    """The largest difference, relative to the largest entry of all that is exact; NaN where either holds one.

    One scale for all tensors: what is exactly zero in one (the gradient of a key's bias, say) carries the rounding of others.
    """
    scale = max((t.abs().max().item() for t in exact if t.numel()), default=0.0)
    errors = [(a.double() - e).abs().max() for a, e in zip(found, exact, strict=True) if e.numel()]
    worst = torch.stack(errors).max().item() if errors else 0.0  # torch's max keeps a NaN
    return worst / max(scale, torch.finfo(torch.float64).tiny)


def allowed_error(own_rounding: float, dtype: torch.dtype, measured_in: torch.dtype | None = None) -> float:
    """The relative error that a result in `dtype` may have.

    Args:
        own_rounding: the relative error of the model itself, run eagerly in `measured_in`. It says how the model amplifies
            roundings, which is the same in every dtype.
        dtype: of the result.
        measured_in: the dtype of that run; `dtype` itself where not given.
    """
    roundings = own_rounding / torch.finfo(measured_in or dtype).eps
    return _SLACK * max(roundings, 1.0) * torch.finfo(dtype).eps
