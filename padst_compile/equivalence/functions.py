"""Functions that are no arithmetic: oracles for a few of them, and the others defined through those.

The definitions decide which rewrites of activations are proved: two ways to write a function are equal here if they lead to
the same oracle of the same argument. tanh is a sigmoid, a GELU is a gate, and everything made of straight pieces is made of
absolute values.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from padst_compile.equivalence import oracles
from padst_compile.equivalence.arithmetic import Dims, dimensions
from padst_compile.equivalence.field import MINUS_INFINITY, PRIME, inverse
from padst_compile.equivalence.registry import Setting, definition, primitive

# --- oracles ---


def _unary(name: str, function: Any) -> None:
    @primitive(name)
    def oracle(of: Setting, x: Any) -> torch.Tensor:
        values: torch.Tensor = function(of.secret(name), of.residues(x))
        return values


for _name in ("log", "log1p", "exp2", "ceil", "floor", "round", "acos", "lgamma", "digamma", "erfinv"):
    _unary(_name, oracles.plain)
for _name in ("erf", "sin", "tan", "sinh", "asin", "atan", "asinh", "atanh", "sign", "trunc"):
    _unary(_name, oracles.odd)
for _name in ("cos", "cosh"):
    _unary(_name, oracles.even)


@primitive("exp")
def _exp(of: Setting, x: Any) -> torch.Tensor:
    """An oracle, but 0 at minus infinity: a masked score weighs nothing."""
    x = of.residues(x)
    return oracles.plain(of.secret("exp"), x).masked_fill_(x == MINUS_INFINITY, 0)


@primitive("sigmoid")
def _sigmoid(of: Setting, x: Any) -> torch.Tensor:
    """One half and an odd oracle."""
    half = of.residues(0.5)
    return (oracles.odd(of.secret("sigmoid"), of.residues(x)) + half) % PRIME


@primitive("sqrt")
def _sqrt(of: Setting, x: Any) -> torch.Tensor:
    return oracles.plain(of.secret("sqrt"), of.residues(x))


@primitive("rsqrt")
def _rsqrt(of: Setting, x: Any) -> torch.Tensor:
    """The inverse of the square root's oracle."""
    return inverse(oracles.plain(of.secret("sqrt"), of.residues(x)))


@primitive("abs")
def _abs(of: Setting, x: Any) -> torch.Tensor:
    """An even oracle, 0 at 0."""
    x = of.residues(x)
    return oracles.even(of.secret("abs"), x).masked_fill_(x == 0, 0)


@primitive("pow")
def _pow(of: Setting, x: Any, exponent: Any) -> torch.Tensor:
    """An oracle of base and exponent."""
    base, power = (oracles.plain(of.secret("pow", side), of.residues(y)) for side, y in enumerate((x, exponent)))
    return oracles.plain(of.secret("pow"), base + power)


@definition("pow.Tensor_Scalar")
def _number_power(x: Any, exponent: float) -> Any:
    """Arithmetic for whole exponents, roots for halves."""
    if float(exponent).is_integer():
        power = _whole_power(x, abs(int(exponent)))
        return power.reciprocal() if exponent < 0 else power
    if float(2 * exponent).is_integer():
        return _number_power(x.sqrt() if exponent > 0 else x.rsqrt(), abs(2 * exponent))
    return torch.pow(x, torch.full((), exponent, dtype=x.dtype, device=x.device))


def _whole_power(x: Any, exponent: int) -> Any:
    if exponent < 2:
        return x if exponent else torch.ones_like(x)
    root = _whole_power(x, exponent // 2)
    return root * root * x if exponent % 2 else root * root


@primitive("amax")
def _amax(of: Setting, x: Any, dim: Dims = (), keepdim: bool = False) -> torch.Tensor:
    """A symmetric oracle of the entries."""
    return oracles.symmetric(of.secret("amax"), of.residues(x), dimensions(x, dim), keepdim)


@definition("amin")
def _amin(x: Any, dim: Dims = (), keepdim: bool = False) -> Any:
    return -torch.amax(-x, dimensions(x, dim), keepdim)


@primitive("gt")
def _gt(of: Setting, x: Any, y: Any) -> torch.Tensor:
    """A pseudo-random order of each two numbers: never both `x > y` and `y > x`."""
    difference = of.residues(x) - of.residues(y)
    return oracles.positive(of.secret("order"), difference % PRIME)


@primitive("lt")
def _lt(of: Setting, x: Any, y: Any) -> torch.Tensor:
    return _gt(of, y, x)


@primitive("ge")
def _ge(of: Setting, x: Any, y: Any) -> torch.Tensor:
    return ~_gt(of, y, x)


@primitive("le")
def _le(of: Setting, x: Any, y: Any) -> torch.Tensor:
    return ~_gt(of, x, y)


@primitive("isnan", "isinf")
def _is_special(of: Setting, x: Any) -> torch.Tensor:
    """Computed numbers are finite here."""
    return torch.zeros_like(of.residues(x), dtype=torch.bool)


@primitive("isfinite")
def _is_finite(of: Setting, x: Any) -> torch.Tensor:
    return of.residues(x) != MINUS_INFINITY


# --- made of straight pieces ---


@definition("relu")
def _relu(x: Any) -> Any:
    return 0.5 * (x + x.abs())


@definition("maximum")
def _maximum(x: Any, y: Any) -> Any:
    return 0.5 * (x + y + (x - y).abs())


@definition("minimum")
def _minimum(x: Any, y: Any) -> Any:
    return 0.5 * (x + y - (x - y).abs())


@definition("clamp", "hardtanh", "clip")
def _clamp(x: Any, low: Any = None, high: Any = None) -> Any:
    x = x if low is None else low + torch.relu(x - low)
    return x if high is None else high - torch.relu(high - x)


@definition("clamp_min")
def _clamp_min(x: Any, low: Any) -> Any:
    return _clamp(x, low)


@definition("clamp_max")
def _clamp_max(x: Any, high: Any) -> Any:
    return _clamp(x, None, high)


@definition("leaky_relu")
def _leaky_relu(x: Any, slope: float = 0.01) -> Any:
    positive = torch.relu(x)
    return positive + slope * (x - positive)


@definition("prelu", "_prelu_kernel")
def _prelu(x: Any, weight: Any) -> Any:
    positive = torch.relu(x)
    shape = [1, -1, *[1] * (x.dim() - 2)] if weight.dim() == 1 and x.dim() > 1 else weight.shape
    return positive + weight.reshape(shape) * (x - positive)


@definition("hardsigmoid")
def _hardsigmoid(x: Any) -> Any:
    return (x + 3.0).clamp(0.0, 6.0) / 6.0


@definition("hardswish")
def _hardswish(x: Any) -> Any:
    return x * _hardsigmoid(x)


# --- made of exponentials ---


@definition("tanh")
def _tanh(x: Any) -> Any:
    return 2.0 * torch.sigmoid(2.0 * x) - 1.0


@definition("silu")
def _silu(x: Any) -> Any:
    return x * torch.sigmoid(x)


@definition("gelu")
def _gelu(x: Any, approximate: str = "none") -> Any:
    if approximate == "tanh":
        return x * torch.sigmoid(2.0 * (math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1.0 + torch.erf(math.sqrt(0.5) * x))


@definition("glu")
def _glu(x: Any, dim: int = -1) -> Any:
    value, gate = x.chunk(2, dim)
    return value * torch.sigmoid(gate)


@definition("expm1")
def _expm1(x: Any) -> Any:
    return x.exp() - 1.0


@definition("erfc")
def _erfc(x: Any) -> Any:
    return 1.0 - torch.erf(x)


@definition("elu")
def _elu(x: Any, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Any:
    positive = torch.relu(x)
    return scale * (positive + alpha * torch.expm1(input_scale * (x - positive)))


@definition("softplus")
def _softplus(x: Any, beta: float = 1.0, threshold: float = 20.0) -> Any:
    return torch.log(1.0 + torch.exp(beta * x)) / beta


@definition("mish")
def _mish(x: Any) -> Any:
    return x * torch.tanh(_softplus(x))


@definition("log_sigmoid")
def _log_sigmoid(x: Any) -> Any:
    return torch.log(torch.sigmoid(x))


@definition("softmax", "_softmax", "_safe_softmax")
def softmax(x: Any, dim: int, dtype: torch.dtype | bool | None = None) -> Any:
    """Exponentials over their sum, without the shift by the maximum, which changes nothing."""
    weights = (x.to(dtype) if isinstance(dtype, torch.dtype) else x).exp()
    return weights / weights.sum(dim, keepdim=True)


@definition("log_softmax", "_log_softmax")
def _log_softmax(x: Any, dim: int, dtype: torch.dtype | bool | None = None) -> Any:
    x = x.to(dtype) if isinstance(dtype, torch.dtype) else x
    return x - x.exp().sum(dim, keepdim=True).log()


@definition("logsumexp")
def _logsumexp(x: Any, dim: Any, keepdim: bool = False) -> Any:
    return x.exp().sum(dim, keepdim=keepdim).log()


# --- compounds of arithmetic ---


@definition("addmm", "baddbmm")
def _addmm(x: Any, left: Any, right: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    product = left @ right if alpha == 1 else alpha * (left @ right)
    return product if beta == 0 else (x if beta == 1 else beta * x) + product


@definition("addcmul")
def _addcmul(x: Any, left: Any, right: Any, *, value: Any = 1) -> Any:
    return x + value * (left * right)


@definition("addcdiv")
def _addcdiv(x: Any, left: Any, right: Any, *, value: Any = 1) -> Any:
    return x + value * (left / right)


@definition("lerp")
def _lerp(x: Any, end: Any, weight: Any) -> Any:
    return x + weight * (end - x)


@definition("linalg_vector_norm")
def _vector_norm(x: Any, order: float = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    if order != 2:
        raise NotImplementedError(f"a norm of order {order}")
    return x.square().sum(list(range(x.dim())) if dim is None else dim, keepdim=keepdim).sqrt()
