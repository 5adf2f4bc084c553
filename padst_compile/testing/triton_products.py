"""A sparse layer as the Triton ops take it, and the comparison of what they give with float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from padst_compile.structures import NM, Shape, Structure
from padst_compile.testing.sparse_product import SparseProduct

_UNIT = torch.finfo(torch.float32).eps / 2
_STEEPEST = 1.13  # slope of all activations
# Roundings of an activation, relative to its argument: those of exp or erf, of its argument, a sum, a quotient, products.
_ACTIVATION_ROUNDINGS = 8
# What a GPU's exponential flushes to zero, times the largest argument for which that happens.
_ACTIVATION_FLOOR = 1e-35
_EXACT: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}
ACTIVATIONS = tuple(_EXACT)


def rounding_unit(y: torch.Tensor) -> float:
    """The largest relative error of storing float32 as `y`; Triton's interpreter truncates to bfloat16."""
    truncated = y.dtype == torch.bfloat16 and not y.is_cuda
    return torch.finfo(y.dtype).eps * (1.0 if truncated else 0.5)


@dataclasses.dataclass(frozen=True)
class TritonLayer(SparseProduct):
    """A random sparse layer on some device."""

    @classmethod
    def random(
        cls, structure: Structure, shape: Shape, dtype: torch.dtype, device: torch.device, sparsity: float = 0.6
    ) -> TritonLayer:
        """A layer without extras, with about `sparsity` where the structure leaves a choice."""
        topology = structure.choose(torch.rand(shape.out_features, shape.in_features, device=device), sparsity)
        values = structure.pack(torch.randn(shape.out_features, shape.in_features, device=device), topology).to(dtype)
        return cls(structure, shape, values, topology)

    def with_extras(self, *, bias: bool = False, into: bool = False, out: bool = False) -> TritonLayer:
        """The same layer with a random bias and random permutations."""
        into_table = torch.randperm(self.shape.in_features, device=self.values.device).int()
        out_table = torch.randperm(self.shape.out_features, device=self.values.device).int()
        return dataclasses.replace(
            self,
            bias=self.random_output() if bias else None,
            input_permutation=into_table if into else None,
            output_permutation=out_table if out else None,
        )

    def random_input(self, *sizes: int) -> torch.Tensor:
        """`[*sizes, in_features]`."""
        return torch.randn(*sizes, self.shape.in_features, device=self.values.device).to(self.values.dtype)

    def random_output(self, *sizes: int) -> torch.Tensor:
        """`[*sizes, out_features]`."""
        return torch.randn(*sizes, self.shape.out_features, device=self.values.device).to(self.values.dtype)

    def arguments(self, x: torch.Tensor) -> tuple[Any, ...]:
        """What `padst_triton::<kind>_linear` takes."""
        tables = (self.bias, self.input_permutation, self.output_permutation)
        sizes = (self.structure.n, self.structure.m) if isinstance(self.structure, NM) else ()
        epilogue = (self.activation, self.residual, self.gate)
        return (x, self.values, *self.topology, *tables, self.shape.out_features, *sizes, *epilogue)

    @property
    def op(self) -> Any:
        """The op of the structure; the module that defines it must have been imported."""
        return getattr(torch.ops.padst_triton, f"{self.structure.kind}_linear").default

    def check(self, x: torch.Tensor) -> None:
        """Fails unless the op's result for `x` is contiguous, of the right type, and within the error bound."""
        y = self.op(*self.arguments(x))
        if y.dtype != x.dtype or y.shape != (*x.shape[:-1], self.shape.out_features) or not y.is_contiguous():
            raise AssertionError(f"got {y.dtype} {tuple(y.shape)} with strides {y.stride()}")
        self.assert_close(y, x)

    def assert_close(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """Fails where `y` is not the product of `x`, within the error bound.

        A float32 sum of k products is off by at most gamma(k) times the sum of their magnitudes (Higham, section 3.1). What
        follows enlarges that by its slope, and adds its own roundings and that of the result.
        """
        exact, magnitude = self.exact_sums(x)
        terms = self.shape.in_features + 2
        bound = terms * _UNIT / (1 - terms * _UNIT) * magnitude
        if self.activation != "none":
            bound = _STEEPEST * bound + _ACTIVATION_ROUNDINGS * _UNIT * (exact.abs() + bound) + _ACTIVATION_FLOOR
        exact = _EXACT[self.activation](exact)
        if self.gate is not None:
            exact, bound = exact * self.gate.double(), bound * self.gate.double().abs()
            bound = bound + _UNIT * (exact.abs() + bound)
        if self.residual is not None:
            exact = exact + self.residual.double()
            bound = bound + _UNIT * (exact.abs() + bound)
        bound = bound + (exact.abs() + bound) * rounding_unit(y) + torch.finfo(y.dtype).tiny * torch.finfo(y.dtype).eps
        excess = (y.double() - exact).abs() - bound
        if not bool((excess <= 0).all()):  # written so that a NaN fails
            raise AssertionError(f"{self.structure} {self.shape} {tuple(x.shape)}: over the bound by {excess.max():.3g}")
