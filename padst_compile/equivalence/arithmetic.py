"""Operators that are arithmetic, exact modulo the prime."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from padst_compile.equivalence import products
from padst_compile.equivalence.field import PRIME, from_floats, inverse, is_minus_infinity, multiply
from padst_compile.equivalence.registry import Setting, primitive
from padst_compile.equivalence.residues import Residues

Dims = int | Sequence[int] | None


@primitive("add")
def add(of: Setting, x: Any, y: Any, *, alpha: Any = 1) -> torch.Tensor:
    """`x + alpha y`; the infinities of a mask absorb what they are added to."""
    total = of.residues(x) + (of.residues(y) if alpha == 1 else multiply(of.residues(y), of.residues(alpha)))
    for operand in (x, y):
        total = _absorbed(total, operand)
    return total.remainder_(PRIME)


@primitive("sub", "subtract")
def sub(of: Setting, x: Any, y: Any, *, alpha: Any = 1) -> torch.Tensor:
    """`x - alpha y`."""
    return (of.residues(x) - (of.residues(y) if alpha == 1 else multiply(of.residues(y), of.residues(alpha)))) % PRIME


@primitive("rsub")
def rsub(of: Setting, x: Any, y: Any, alpha: Any = 1) -> torch.Tensor:
    """`y - alpha x`."""
    return sub(of, y, x, alpha=alpha)


@primitive("neg")
def neg(of: Setting, x: Any) -> torch.Tensor:
    """`-x`."""
    return -of.residues(x) % PRIME


@primitive("mul", degree=2)
def mul(of: Setting, x: Any, y: Any) -> torch.Tensor:
    """`x y`."""
    return multiply(of.residues(x), of.residues(y))


@primitive("div", degree=2)
def div(of: Setting, x: Any, y: Any, *, rounding_mode: str | None = None) -> torch.Tensor:
    """`x / y`."""
    if rounding_mode is not None:
        raise NotImplementedError(f"division with rounding_mode={rounding_mode!r}")
    return multiply(of.residues(x), inverse(of.residues(y)))


@primitive("reciprocal")
def reciprocal(of: Setting, x: Any) -> torch.Tensor:
    """`1 / x`."""
    return inverse(of.residues(x))


@primitive("sum")
def sum_(of: Setting, x: Any, dim: Dims = None, keepdim: bool = False, *, dtype: Any = None) -> torch.Tensor:
    """The sum over some or all dimensions."""
    return of.residues(x).sum(dimensions(x, dim), keepdim).remainder_(PRIME)


@primitive("mean")
def mean(of: Setting, x: Any, dim: Dims = None, keepdim: bool = False, *, dtype: Any = None) -> torch.Tensor:
    """The sum over the number of terms."""
    dims = dimensions(x, dim)
    terms = math.prod(x.shape[axis] for axis in dims)
    return multiply(sum_(of, x, dims, keepdim), inverse(torch.tensor(terms % PRIME, device=of.device)))


@primitive("cumsum")
def cumsum(of: Setting, x: Any, dim: int, *, dtype: Any = None) -> torch.Tensor:
    """Running sums."""
    return of.residues(x).cumsum(dim).remainder_(PRIME)


@primitive("mm", "bmm", "mv", "dot", "matmul", degree=2)
def matmul(of: Setting, x: Any, y: Any) -> torch.Tensor:
    """Any product of matrices and vectors."""
    return products.matmul(of.residues(x), of.residues(y))


@primitive("linear", degree=2)
def linear(of: Setting, x: Any, weight: Any, bias: Any = None) -> torch.Tensor:
    """`x @ weight.T + bias`."""
    product = products.matmul(of.residues(x), of.residues(weight).t())
    return product if bias is None else (product + of.residues(bias)).remainder_(PRIME)


@primitive("convolution", "_convolution", degree=2)
def convolution(
    of: Setting, x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool,
    output_padding: Any, groups: int, *_: Any,
) -> torch.Tensor:  # fmt: skip
    """A cross-correlation."""
    if transposed:
        raise NotImplementedError("a transposed convolution")
    image = products.convolution(of.residues(x), of.residues(weight), stride, padding, dilation, groups)
    if bias is None:
        return image
    return (image + of.residues(bias).reshape(-1, *[1] * (weight.dim() - 2))).remainder_(PRIME)


@primitive("eq")
def eq(of: Setting, x: Any, y: Any) -> torch.Tensor:
    """Whether residues are equal."""
    return of.residues(x) == of.residues(y)


@primitive("ne", "not_equal")
def ne(of: Setting, x: Any, y: Any) -> torch.Tensor:
    """Whether residues differ."""
    return of.residues(x) != of.residues(y)


def dimensions(x: torch.Tensor, dim: Dims) -> list[int]:
    """The dimensions that a reduction is over, none of them negative; none given means all."""
    if dim is None or (not isinstance(dim, int) and len(dim) == 0):
        return list(range(x.dim()))
    return [axis % max(x.dim(), 1) for axis in ([dim] if isinstance(dim, int) else dim)] if x.dim() else []


def _absorbed(total: torch.Tensor, operand: Any) -> torch.Tensor:
    """A sum in which the infinite entries of an operand that is no residue stay what they are."""
    if isinstance(operand, Residues) or not isinstance(operand, torch.Tensor) or not operand.is_floating_point():
        return total
    infinite = is_minus_infinity(operand) | (operand == math.inf)
    return torch.where(infinite, from_floats(operand), total) if bool(infinite.any()) else total
