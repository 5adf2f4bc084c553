"""Exact matrix products and convolutions of residues, by floating-point matrix products.

Integer matrix products are slow on CPUs. Residues lie below 2**31; one operand is cut into signed digits so short that every
partial sum of K products stays within 2**53, where float64 is exact in whatever order it adds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from padst_compile.equivalence.field import PRIME

_EXACT_BITS = 53
_RESIDUE_BITS = 31


def matmul(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """`torch.matmul` of residues."""
    if x.numel() < y.numel():  # the smaller operand is cut: every digit costs a product
        other = y.double()
        products = ((digit.double() @ other, shift) for digit, shift in _digits(x, x.shape[-1]))
    else:
        other = x.double()
        products = ((other @ digit.double(), shift) for digit, shift in _digits(y, x.shape[-1]))
    total: torch.Tensor | int = 0
    for product, shift in products:
        total = total + product.long().remainder_(PRIME).mul_(1 << shift).remainder_(PRIME)
    return torch.as_tensor(total).remainder_(PRIME)


def convolution(
    image: torch.Tensor,
    weight: torch.Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:
    """`torch.convolution` of residues `[batch, channels, …]`, not transposed and without bias."""
    windows = _windows(image, weight.shape[2:], stride, padding, dilation)
    batch, sizes = image.shape[0], windows.shape[2 : weight.dim()]
    dims = weight.dim() - 2
    grouped = windows.unflatten(1, (groups, -1)).movedim(1, 0)  # [groups, batch, channels, sizes…, kernel…]
    rows = grouped.movedim(2, 2 + dims).reshape(groups, batch * sizes.numel(), -1)
    columns = weight.reshape(groups, weight.shape[0] // groups, -1).transpose(1, 2)
    product = matmul(rows, columns).reshape(groups, batch, *sizes, -1)
    return product.movedim(-1, 1).movedim(2, 0).reshape(batch, weight.shape[0], *sizes)


def _windows(
    image: torch.Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> torch.Tensor:
    """What the kernel sees at every position: `[batch, channels, sizes…, kernel…]`."""
    pads = [pad for size in reversed(_each(padding, len(kernel))) for pad in (size, size)]
    windows = torch.nn.functional.pad(image, pads)
    for axis, (size, step, gap) in enumerate(
        zip(kernel, _each(stride, len(kernel)), _each(dilation, len(kernel)), strict=True)
    ):
        windows = windows.unfold(2 + axis, (size - 1) * gap + 1, step)[..., ::gap]
    return windows


def _each(values: Sequence[int], dims: int) -> list[int]:
    """A value for every dimension of a kernel; a single one stands for all."""
    return list(values) * dims if len(values) == 1 else list(values)


def _digits(x: torch.Tensor, terms: int) -> list[tuple[torch.Tensor, int]]:
    """Signed digits of x and the power of two of each, short enough for sums of that many terms."""
    width = _EXACT_BITS - _RESIDUE_BITS + 1 - max(terms - 1, 0).bit_length()
    half, last = 1 << (width - 1), -(-(_RESIDUE_BITS + 1) // width) - 1
    digits = []
    for place in range(last):
        digit = ((x + half) & (2 * half - 1)) - half
        x = (x - digit) >> width
        digits.append((digit, place * width))
    return [*digits, (x, last * width % _RESIDUE_BITS)]  # at most `half` is left; 2**31 is 1
