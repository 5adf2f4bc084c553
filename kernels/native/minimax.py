"""Where the coefficients of activation.h come from; nothing here runs at compile time or later.

Remez exchange in float64: the polynomial whose largest relative error is smallest takes that error at one point more than it
has coefficients, with alternating signs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch

_POINTS = 20000
_STEPS = 30
_LIMIT = 13.2  # beyond it the normal distribution's tail is no normal float
_SCALE = 0.34  # the best for this degree and limit, to two digits


class Polynomial(NamedTuple):
    """Coefficients, the lowest first, and the largest relative error."""

    coefficients: list[float]
    error: float


def minimax(function: Callable[[float], float], low: float, high: float, degree: int) -> Polynomial:
    """The polynomial nearest to a function without zeros on an interval, by relative error."""
    x = (low + high) / 2 - (high - low) / 2 * torch.cos(torch.linspace(0, math.pi, _POINTS, dtype=torch.float64))
    y = torch.tensor([function(value) for value in x.tolist()], dtype=torch.float64)
    powers = x[:, None] ** torch.arange(degree + 1)
    chosen = torch.linspace(0, _POINTS - 1, degree + 2).round().long()
    signs = (-1.0) ** torch.arange(degree + 2, dtype=torch.float64)
    for _ in range(_STEPS):
        system = torch.cat([powers[chosen], (signs * y[chosen])[:, None]], dim=1)
        coefficients = torch.linalg.solve(system, y[chosen])[:-1]
        error = powers @ coefficients / y - 1
        chosen = _extrema(error, degree + 2)
    return Polynomial(coefficients.tolist(), float(error.abs().max()))


def exponential() -> Polynomial:
    """`exp(r)` for what is left of an exponent after whole powers of two, and a little more."""
    return minimax(math.exp, -0.5001 * math.log(2), 0.5001 * math.log(2), 5)


def normal_tail() -> Polynomial:
    """`exp(a^2 / 2) Phi(-a) / t` as a function of `t = 1 / (1 + 0.34 a)`."""

    def ratio(t: float) -> float:
        a = (1 / t - 1) / _SCALE
        return math.exp(a * a / 2) * math.erfc(a / math.sqrt(2)) / 2 / t

    return minimax(ratio, 1 / (1 + _SCALE * _LIMIT), 1.0, 8)


def _extrema(error: torch.Tensor, count: int) -> torch.Tensor:
    """Where the error is largest between two changes of its sign; of more than `count`, without the smaller at the ends."""
    signs = error.sign()
    starts = [0, *((signs[1:] != signs[:-1]).nonzero()[:, 0] + 1).tolist(), len(error)]
    found = [a + int(error[a:b].abs().argmax()) for a, b in itertools.pairwise(starts)]
    while len(found) > count:
        found.pop(0 if abs(error[found[0]]) < abs(error[found[-1]]) else -1)
    return torch.tensor(found)
