"""Whether a kernel that fetches an input for every weight can beat a dense product: a bound, not a measurement.

Such a kernel reads one element from the first-level cache for each product it adds. A multiprocessor of Hopper reads 128 bytes
per cycle, so 132 of them at 1.75 GHz fetch 7.4e12 elements of 4 bytes a second, and up to twice as many of 2 bytes. A dense
product makes about 3e14 products a second in 16 bits, 1.5e14 in TF32 and 5e13 as the sum of three of these, all on tensor
cores at 62 % of their peak, and 2.5e13 in float32 on CUDA cores. Below the density at which both take as long, fetching wins;
dense is the better way elsewhere. With few tokens both wait for the weights, of which a sparse product has fewer.

In inference `choose_kernels` measures instead; this decides for gradients, whose choice nothing measures yet.
"""

from __future__ import annotations

import torch

from padst_compile.kernels import triton_support

_FETCHES = 7.4e12 * 4  # bytes a second
_DENSE_16_BIT = 3e14
_DENSE_FLOAT32 = {"tf32": 1.5e14, "tf32x3": 5e13, "ieee": 2.5e13}
_FEW_TOKENS = 32


def gather_is_faster(density: float, x: torch.Tensor) -> bool:
    """Whether to gather activations `x` [tokens, features] for a weight of which `density` is active."""
    dense = _DENSE_16_BIT if x.dtype.itemsize == 2 else _DENSE_FLOAT32[triton_support.precision(x.dtype)]
    return x.shape[0] <= _FEW_TOKENS or density < _FETCHES / x.dtype.itemsize / dense
