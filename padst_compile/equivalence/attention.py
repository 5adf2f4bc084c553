"""Scaled dot-product attention and pooling, by their formulas."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional as F

from padst_compile.equivalence import oracles
from padst_compile.equivalence.field import MINUS_INFINITY
from padst_compile.equivalence.functions import softmax
from padst_compile.equivalence.registry import Setting, definition, primitive


@definition("scaled_dot_product_attention")
def attention(
    query: Any, key: Any, value: Any, mask: Any = None, dropout: float = 0.0, is_causal: bool = False, *,
    scale: float | None = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    """`softmax(scale Q K^T + mask) V`."""
    if dropout > 0.0:
        raise NotImplementedError("dropout in attention; call .eval() first")
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    scores = (query @ key.transpose(-2, -1)) * (1.0 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        mask = seen if mask is None else mask & seen
    return softmax(_masked(scores, mask), -1) @ value


@definition("_scaled_dot_product_flash_attention_for_cpu")
def _flash_attention_cpu(
    query: Any, key: Any, value: Any, dropout: float = 0.0, is_causal: bool = False, *, attn_mask: Any = None, scale: Any = None
) -> Any:
    if dropout > 0.0 or is_causal:
        raise NotImplementedError("a causal or random form of this kernel's op")
    scores = (query @ key.transpose(-2, -1)) * (1.0 / math.sqrt(query.shape[-1]) if scale is None else scale)
    scores = _masked(scores, attn_mask)
    return softmax(scores, -1) @ value, torch.logsumexp(scores, -1)


def _masked(scores: Any, mask: Any) -> Any:
    if mask is None:
        return scores
    return scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask


# --- pooling ---


@definition("avg_pool2d")
def _avg_pool2d(
    x: Any,
    kernel: Any,
    stride: Any = (),
    padding: Any = 0,
    ceil: bool = False,
    counts_padding: bool = True,
    divisor: Any = None,
) -> Any:
    if divisor is not None or (not counts_padding and _pair(padding) != (0, 0)):
        raise NotImplementedError("an average over fewer entries than a window has")
    return _pool_windows(x, kernel, stride, padding, ceil).mean((-2, -1))


@primitive("max_pool2d_with_indices")
def _max_pool2d_with_indices(of: Setting, *arguments: Any) -> tuple[torch.Tensor, None]:
    """The positions of maxima are not known; to read them is an error."""
    return _max_pool2d(of, *arguments), None


@primitive("max_pool2d")
def _max_pool2d(
    of: Setting, x: Any, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil: bool = False
) -> torch.Tensor:
    """A symmetric oracle of what a window shows."""
    if _pair(dilation) != (1, 1):
        raise NotImplementedError("a dilated pooling")
    windows = _pool_windows(of.residues(x), kernel, stride, padding, ceil, outside=MINUS_INFINITY)
    return oracles.symmetric(of.secret("amax"), windows, [-2, -1], keepdim=False)


@definition("adaptive_avg_pool2d", "_adaptive_avg_pool2d")
def _adaptive_avg_pool2d(x: Any, size: Any) -> Any:
    sizes = _pair(size)
    if any(given % wanted for given, wanted in zip(x.shape[-2:], sizes, strict=True)):
        raise NotImplementedError("adaptive pooling to a size that does not divide the image")
    kernel = tuple(given // wanted for given, wanted in zip(x.shape[-2:], sizes, strict=True))
    return _avg_pool2d(x, kernel)


@definition("adaptive_avg_pool1d")
def _adaptive_avg_pool1d(x: Any, size: Any) -> Any:
    return _adaptive_avg_pool2d(x.unsqueeze(-2), (1, *size)).squeeze(-2)


def _pool_windows(x: Any, kernel: Any, stride: Any, padding: Any, ceil: bool, outside: int = 0) -> Any:
    """`[…, rows, columns, kernel rows, kernel columns]`."""
    sizes, steps, pads = _pair(kernel), _pair(stride or kernel), _pair(padding)
    padded = F.pad(x, (pads[1], pads[1], pads[0], pads[0]), value=outside) if any(pads) else x
    whole = all((padded.shape[axis] - sizes[axis]) % steps[axis] == 0 for axis in (-2, -1))
    if ceil and not whole:
        raise NotImplementedError("pooling with windows that stand out")
    return padded.unfold(-2, sizes[0], steps[0]).unfold(-2, sizes[1], steps[1])


def _pair(value: Any) -> tuple[int, int]:
    sizes = (value,) if isinstance(value, int) else tuple(value)
    return sizes[0], sizes[-1]
