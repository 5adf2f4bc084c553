"""Normalisations, by means and variances; their root is the oracle of `rsqrt`, so they commute with permutations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from padst_compile.equivalence.arithmetic import Dims, dimensions
from padst_compile.equivalence.registry import definition


@definition("var.correction")
def _var(x: Any, dim: Dims = None, *, correction: float | None = None, keepdim: bool = False) -> Any:
    """The mean square of the centred entries, over `n - correction`."""
    dims = dimensions(x, dim)
    terms = math.prod(x.shape[axis] for axis in dims) - (1 if correction is None else correction)
    return (x - x.mean(dims, keepdim=True)).square().sum(dims, keepdim=keepdim) / terms


@definition("std.correction")
def _std(x: Any, dim: Dims = None, **options: Any) -> Any:
    return _var(x, dim, **options).sqrt()


@definition("var_mean.correction")
def _var_mean(x: Any, dim: Dims = None, *, correction: float | None = None, keepdim: bool = False) -> Any:
    return _var(x, dim, correction=correction, keepdim=keepdim), x.mean(dimensions(x, dim), keepdim=keepdim)


@definition("layer_norm")
def _layer_norm(x: Any, shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any) -> Any:
    return _native_layer_norm(x, shape, weight, bias, eps)[0]


@definition("native_layer_norm")
def _native_layer_norm(x: Any, shape: Sequence[int], weight: Any, bias: Any, eps: float) -> Any:
    normal, mean, root = _standardized(x, _last(x, shape), eps)
    return _affine(normal, weight, bias), mean, root


@definition("rms_norm")
def _rms_norm(x: Any, shape: Sequence[int], weight: Any = None, eps: float | None = None) -> Any:
    return _fused_rms_norm(x, shape, weight, eps)[0]


@definition("_fused_rms_norm")
def _fused_rms_norm(x: Any, shape: Sequence[int], weight: Any, eps: float | None) -> Any:
    root = torch.rsqrt(x.square().mean(_last(x, shape), keepdim=True) + (torch.finfo(x.dtype).eps if eps is None else eps))
    return _affine(x * root, weight, None), root


@definition("group_norm")
def _group_norm(x: Any, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any) -> Any:
    grouped = x.reshape(x.shape[0], groups, -1)
    normal, _, _ = _standardized(grouped, [2], eps)
    return _affine(normal.reshape(x.shape), _channels(weight, x), _channels(bias, x))


@definition("batch_norm")
def _batch_norm(
    x: Any, weight: Any, bias: Any, mean: Any, variance: Any, training: bool, momentum: float, eps: float, *_: Any
) -> Any:
    if training:
        raise NotImplementedError("batch statistics; call .eval() first")
    return _batch_norm_inference(x, weight, bias, mean, variance, momentum, eps)[0]


@definition("_native_batch_norm_legit_no_training")
def _batch_norm_inference(x: Any, weight: Any, bias: Any, mean: Any, variance: Any, momentum: float, eps: float) -> Any:
    normal = (x - _channels(mean, x)) * torch.rsqrt(_channels(variance, x) + eps)
    return _affine(normal, _channels(weight, x), _channels(bias, x)), x.new_empty(0), x.new_empty(0)


def _standardized(x: Any, dims: list[int], eps: float) -> tuple[Any, Any, Any]:
    """Entries of mean 0 and variance 1, with the mean and the inverse deviation that made them so."""
    mean = x.mean(dims, keepdim=True)
    centred = x - mean
    root = torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)
    return centred * root, mean, root


def _affine(x: Any, weight: Any, bias: Any) -> Any:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _channels(values: Any, image: Any) -> Any:
    """One number for every channel, beside `[batch, channels, …]`."""
    return None if values is None else values.reshape(1, -1, *[1] * (image.dim() - 2))


def _last(x: Any, shape: Sequence[int]) -> list[int]:
    return list(range(x.dim() - len(shape), x.dim()))
