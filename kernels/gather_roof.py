"""Whether a kernel that fetches an input for every weight can beat a dense product: a bound, not a measurement.

Such a kernel reads one element from the first-level cache for each product it adds. A multiprocessor of Hopper reads 128 bytes
per cycle, so 132 of them at 1.75 GHz fetch 7.4e12 elements of 4 bytes a second, and up to twice as many of 2 bytes. A dense
product, which PyTorch computes and never splits, makes about 3e14 products a second in 16 bits and 1.5e14 in TF32, on tensor
cores at 62 % of their peak, and 2.5e13 in float32 on CUDA cores. Below the density at which both take as long, fetching wins;
dense is the better way elsewhere. With few tokens both wait for the weights, of which a sparse product has fewer.

In inference `choose_kernels` measures instead; this decides for gradients, whose choice nothing measures yet.
"""

from __future__ import annotations

import torch

from padst_compile.kernels import triton_support

_FETCHES = 7.4e12 * 4  # bytes a second
_DENSE_16_BIT = 3e14
_DENSE_TF32 = 1.5e14
_DENSE_FLOAT32 = 2.5e13
_FEW_TOKENS = 32


def gather_is_faster(density: float, x: torch.Tensor) -> bool:
    """Whether to gather activations `x` [tokens, features] for a weight of which `density` is active."""
    return x.shape[0] <= _FEW_TOKENS or density < _FETCHES / x.dtype.itemsize / _dense_rate(x.dtype)


def _dense_rate(dtype: torch.dtype) -> float:
    if dtype.itemsize == 2:
        return _DENSE_16_BIT
    return _DENSE_TF32 if triton_support.precision(dtype) == "tf32" else _DENSE_FLOAT32
