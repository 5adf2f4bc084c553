"""Arithmetic modulo the prime 2**31 - 1 on int64 tensors, and the way from floating-point numbers into it.

A finite float is `m * 2**e` with whole m and e, and 2 has an inverse, so every float has a residue; sums and products that
are exact in floating point are exact here too. As 2**31 = 1, a power of two is one of 31 numbers.
"""

from __future__ import annotations

import math

import torch

PRIME = 2**31 - 1

# What has no residue gets one by decree: sums and products with it mean nothing, but every program agrees on it.
NOT_A_NUMBER = 1_270_216_262
INFINITY = 1_618_033_989
MINUS_INFINITY = PRIME - INFINITY
INVERSE_OF_ZERO = 577_215_665
_ROOT_OF_TWO_BY_PI = 886_226_925

_MANTISSA_BITS = 53
_HALF_UNIT = 2.0**-24  # relative rounding error of a float32
_LARGEST_ROOT = 2.0**8
_LARGEST_POWER = _LARGEST_ROOT**2
_SQUARE_ROOT = (PRIME + 1) // 4  # x to that power is a square root of x or of -x, and a square itself


def multiply(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """`x * y`, broadcast; both are residues, so that the product stays below 2**62."""
    return (x * y).remainder_(PRIME)


def power(x: torch.Tensor, exponent: int) -> torch.Tensor:
    """`x ** exponent` for any whole exponent, by repeated squaring."""
    if exponent < 0:
        return power(inverse(x), -exponent)
    result, square = torch.ones_like(x), x
    while exponent:
        if exponent & 1:
            result = multiply(result, square)
        exponent >>= 1
        if exponent:
            square = multiply(square, square)
    return result


def inverse(x: torch.Tensor) -> torch.Tensor:
    """`1 / x`: by Fermat `x ** (p - 2)`; of zero a constant, so that it does not cancel what it meets."""
    return power(x, PRIME - 2).masked_fill_(x == 0, INVERSE_OF_ZERO)


def from_floats(values: torch.Tensor) -> torch.Tensor:
    """The residues of a real tensor, in its shape: exactly `m * 2**e`, but for what stands for minus infinity."""
    if not values.is_floating_point():
        return values.long() % PRIME
    scaled = values.double() * 2.0**62  # 2**62 is 1, and most weights become whole numbers below 2**63
    whole = scaled.long()
    residues = whole % PRIME
    rest = whole.double() != scaled
    if bool(rest.any()):
        residues[rest] = _by_parts(values[rest])
    return residues


def is_minus_infinity(values: torch.Tensor) -> torch.Tensor:
    """Where floats stand for minus infinity: models also mask scores with the lowest number of their dtype."""
    return values <= torch.finfo(values.dtype).min


def _by_parts(values: torch.Tensor) -> torch.Tensor:
    """The residues of any floats."""
    masked, values = is_minus_infinity(values), values.double()
    mantissa, exponent = torch.frexp(values.nan_to_num(0.0, 0.0, 0.0))
    whole = (mantissa * 2.0**_MANTISSA_BITS).long() % PRIME
    residues = (whole << (exponent.long() - _MANTISSA_BITS) % 31) % PRIME
    residues[values.isnan()] = NOT_A_NUMBER
    residues[values == math.inf] = INFINITY
    residues[masked] = MINUS_INFINITY
    return residues


def from_number(value: float, dtype: torch.dtype) -> int:
    """The residue of a number of the program, in an operation that computes in `dtype`.

    Like PyTorch, it rounds the number to the precision of the operation first. Square and fourth roots of whole numbers
    and the root of 2/pi are told by their value. The first are mapped such that `d**-0.5` is the inverse of `sqrt(d)` and
    the square of `d**-0.25`: programs write `x / sqrt(d)` for `x * d**-0.5`, and these floats have no exact relation.
    """
    if isinstance(value, int):  # truth values too
        return value % PRIME
    root = _root(abs(value))
    if root is not None:
        return root if value > 0 else PRIME - root
    if dtype in (torch.float16, torch.bfloat16) and value != torch.finfo(dtype).min:
        dtype = torch.float32  # as kernels compute
    return int(from_floats(torch.tensor(value, dtype=dtype if dtype.is_floating_point else torch.float64)))


def _root(value: float) -> int | None:
    """The residue of an irrational root that programs use, or None."""
    if math.isclose(value, math.sqrt(2.0 / math.pi), rel_tol=_HALF_UNIT):
        return _ROOT_OF_TWO_BY_PI
    if not 1.0 / _LARGEST_ROOT < value < _LARGEST_ROOT:
        return None
    for degree, exponent in ((2, _SQUARE_ROOT), (4, _SQUARE_ROOT**2)):
        power = max(value, 1.0 / value) ** degree
        whole = round(power)
        if power < _LARGEST_POWER and math.isclose(power, whole, rel_tol=2 * degree * _HALF_UNIT):
            root = pow(whole, exponent, PRIME)
            return None if math.isqrt(whole) ** 2 == whole else root if value > 1.0 else pow(root, -1, PRIME)
    return None
