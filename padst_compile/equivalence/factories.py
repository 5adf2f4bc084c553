"""New tensors beside residues: zeros, ones and constants; floating ones hold residues, so that a model can write to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from padst_compile.equivalence.registry import Setting, primitive


def _filled(of: Setting, size: Sequence[int], value: Any) -> torch.Tensor:
    if of.dtype.is_floating_point:
        return of.residues(value).expand(size).clone()
    return torch.full(size, value, dtype=of.dtype, device=of.device)


@primitive("zeros_like", "empty_like")
def _zeros_like(of: Setting, x: Any, **_: Any) -> torch.Tensor:
    return _filled(of, x.shape, 0)


@primitive("ones_like")
def _ones_like(of: Setting, x: Any, **_: Any) -> torch.Tensor:
    return _filled(of, x.shape, 1)


@primitive("full_like")
def _full_like(of: Setting, x: Any, value: Any, **_: Any) -> torch.Tensor:
    return _filled(of, x.shape, value)


@primitive("new_zeros", "new_empty", "new_empty_strided")
def _new_zeros(of: Setting, x: Any, size: Sequence[int], *_: Any, **__: Any) -> torch.Tensor:
    return _filled(of, size, 0)


@primitive("new_ones")
def _new_ones(of: Setting, x: Any, size: Sequence[int], **_: Any) -> torch.Tensor:
    return _filled(of, size, 1)


@primitive("new_full")
def _new_full(of: Setting, x: Any, size: Sequence[int], value: Any, **_: Any) -> torch.Tensor:
    return _filled(of, size, value)


FACTORIES = frozenset(
    f"aten::{name}"
    for name in ("empty_like", "full_like", "new_empty", "new_empty_strided", "new_full", "new_ones", "new_zeros", "ones_like",
                 "zeros_like")
)  # fmt: skip
