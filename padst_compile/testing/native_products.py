"""Layers for the C++ kernels, and how far from float64 a kernel may be."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from padst_compile.structures import NM, Shape, Structure
from padst_compile.testing.sparse_product import SparseProduct

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
UNIT = torch.finfo(torch.float32).eps / 2


@dataclasses.dataclass(frozen=True)
class Activation:
    """What an activation is, and how far the kernel may be off.

    Attributes:
        exact: the function in float64.
        slope: a bound of its derivative.
        relative: error of the kernel in units of 2^-24 of the result, per value.
        tiny: where results are that small, the kernel may return the same for all of them.
    """

    exact: Callable[[torch.Tensor], torch.Tensor]
    slope: float = 1.0
    relative: Callable[[torch.Tensor], torch.Tensor] = torch.zeros_like
    tiny: float = 0.0

    def error(self, x: torch.Tensor, off: torch.Tensor | float = 0.0) -> torch.Tensor:
        """The bound for arguments that are themselves off by up to `off`."""
        result = self.exact(x).abs() + self.slope * off
        return self.relative(x) * UNIT * result + self.tiny


def _exact_gelu(x: torch.Tensor) -> torch.Tensor:
    """`x Phi(x)` by the complementary error function, which is accurate for negative x where `1 + erf` is not."""
    tail: torch.Tensor = torch.special.erfc(-x * 0.5**0.5)
    return x * 0.5 * tail


def _tanh_exponent(x: torch.Tensor) -> torch.Tensor:
    exponent: torch.Tensor = 2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)
    return exponent


# In units of 2^-24, to first order. exp: 1.3 for its polynomial, 1 for its argument, 2 for Horner's rule, which roundings of
# the first coefficients dominate. A sigmoid: one exp, a sum and a quotient, 1 each. The argument of gelu_tanh: 2 constants,
# 2 products and a sum of positive terms, 5 in all, times itself, because that is the relative slope of exp. gelu: t is off
# by 2, which its function of t multiplies by up to 2.4; that function's polynomial by 3, and 3 products; twice the sum for
# positive x, where half of x may cancel; and the last difference.
ACTIVATIONS = {
    "none": Activation(lambda x: x),
    "relu": Activation(lambda x: x.clamp(min=0)),
    "gelu": Activation(_exact_gelu, 1.13, lambda x: torch.full_like(x, 2 * (4.3 + 4.8 + 3 + 3) + 1), 8e-38),
    "gelu_tanh": Activation(
        lambda x: x * torch.sigmoid(_tanh_exponent(x)), 1.13, lambda x: 6.3 + 5 * _tanh_exponent(x.clamp(max=0)).abs(), 1e-36
    ),
    "silu": Activation(lambda x: x * torch.sigmoid(x), 1.1, lambda x: torch.full_like(x, 6.3), 2e-36),
}


@dataclasses.dataclass(frozen=True)
class Layer(SparseProduct):
    """A random sparse layer and what its native op takes."""

    @classmethod
    def random(cls, structure: Structure, shape: Shape, dtype: torch.dtype, sparsity: float = 0.6) -> Layer:
        """A layer of `shape` with about `sparsity`, where the structure leaves a choice."""
        topology = structure.choose(torch.rand(shape.out_features, shape.in_features), sparsity)
        values = structure.pack(torch.randn(shape.out_features, shape.in_features), topology).to(dtype)
        return cls(structure, shape, values, topology)

    def with_extras(self, bias: bool, permute_in: bool, permute_out: bool) -> Layer:
        """The same layer with a random bias and random permutations."""
        return dataclasses.replace(
            self,
            bias=torch.randn(self.shape.out_features).to(self.values.dtype) if bias else None,
            input_permutation=torch.randperm(self.shape.in_features).int() if permute_in else None,
            output_permutation=torch.randperm(self.shape.out_features).int() if permute_out else None,
        )

    def __call__(self, x: torch.Tensor, **options: Any) -> torch.Tensor:
        """The native result."""
        op = getattr(torch.ops.padst_native, f"{self.structure.kind}_linear")
        sizes = (self.structure.n, self.structure.m) if isinstance(self.structure, NM) else ()
        extras = (self.bias, self.input_permutation, self.output_permutation)
        epilogue = (self.activation, self.residual, self.gate)
        result: torch.Tensor = op(
            x, self.values, *self.topology, *extras, self.shape.out_features, *sizes, *epilogue, **options
        )
        return result

    def check(self, x: torch.Tensor) -> None:
        """Compares with float64, within the error bound of a float32 dot product and one rounding to the dtype.

        A sum of k products in float32, in any order, is off by at most gamma(k) * sum |x_i w_i| (Higham, section 3.1). An
        activation enlarges that by no more than its steepest slope, and adds its own error; a gate and a residual add
        roundings.
        """
        exact, magnitude = self.exact_sums(x)
        terms = self.shape.in_features + 2
        bound = terms * UNIT / (1 - terms * UNIT) * magnitude
        activation = ACTIVATIONS[self.activation]
        bound = activation.slope * bound + activation.error(exact, bound)
        exact = activation.exact(exact)
        if self.gate is not None:
            exact, bound = exact * self.gate.double(), bound * self.gate.double().abs()
            bound = bound + (exact.abs() + bound) * UNIT
        if self.residual is not None:
            exact = exact + self.residual.double()
            bound = bound + (exact.abs() + bound) * UNIT
        rounding = torch.finfo(x.dtype)
        bound = bound + (exact.abs() + bound) * rounding.eps / 2 + rounding.smallest_normal * rounding.eps

        y = self(x)
        assert y.dtype == x.dtype
        assert y.shape == (*x.shape[:-1], self.shape.out_features)
        assert y.is_contiguous()
        excess = (y.double() - exact).abs() - bound
        assert bool((excess <= 0).all()), f"{self.structure} {self.shape} {tuple(x.shape)}: over the bound by {excess.max()}"
