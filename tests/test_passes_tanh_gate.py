"""The tanh form of GELU, computed with a sigmoid."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx
from torch.nn import functional as F

from padst_compile.passes.base import RuleReport
from padst_compile.passes.context import Context
from padst_compile.passes.tanh_gate import TanhGate

Function = Callable[[torch.Tensor], Any]


def gelu_new(x: torch.Tensor) -> torch.Tensor:
    """As transformers writes it."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def apply(function: Function, x: torch.Tensor) -> tuple[RuleReport, Any]:
    found: list[Any] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        report = TanhGate().run(Context(gm, {}, inference=False))
        gm.graph.lint()
        gm.recompile()
        found.append(report)
        return gm.forward

    result = torch.compile(function, backend=backend, fullgraph=True)(x)
    return found[0], result


def sample() -> torch.Tensor:
    return torch.cat(
        [torch.randn(200, dtype=torch.float64) * 4, torch.tensor([0.0, -40.0, 40.0, -1e50, 1e-300], dtype=torch.float64)]
    )


@pytest.mark.parametrize(
    "function",
    [
        gelu_new,
        lambda x: (1 + torch.tanh(x)) * (x * 0.5),
        lambda x: torch.mul(torch.mul(x, 0.5), torch.add(torch.tanh(x + 1), 1)),
    ],
)
def test_the_function_is_the_same(function: Function) -> None:
    x = sample()
    report, result = apply(function, x)
    assert report.rewritten == 1
    # 1 + tanh(u) is exact to eps absolutely, not relatively: so is what is multiplied by x.
    bound = 16 * torch.finfo(torch.float64).eps * (x.abs() + 1e-300)
    assert bool(((result - function(x)).abs() <= bound).all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_call_is_the_same(dtype: torch.dtype) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x, approximate="tanh")

    x = (torch.randn(500) * 4).to(dtype)
    report, result = apply(function, x)
    assert report.rewritten == 1 and result.dtype == dtype
    wide = torch.finfo(dtype if dtype == torch.float64 else torch.float32)
    # Rounding of the exponent counts as often as it is large; both sides round once to a narrow dtype.
    exponent = (1.6 * (x.double() + 0.045 * x.double() ** 3)).abs()
    bound = x.double().abs() * wide.eps * (16 + 8 * exponent * torch.exp(-exponent)) + function(x).double().abs() * (
        torch.finfo(dtype).eps if dtype.itemsize == 2 else 0
    )
    assert bool(((result.double() - function(x).double()).abs() <= bound + torch.finfo(dtype).tiny).all())


def test_the_gradient_is_the_same() -> None:
    x = (torch.randn(200, dtype=torch.float64) * 4).requires_grad_()
    (expected,) = torch.autograd.grad(gelu_new(x).sum(), x)
    _, result = apply(gelu_new, x)
    (actual,) = torch.autograd.grad(result.sum(), x)
    assert bool(((actual - expected).abs() <= 64 * torch.finfo(torch.float64).eps * (1 + x.abs() ** 3)).all())


def write_between(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    half, gate = 0.5 * x, 1.0 + torch.tanh(x)
    x.add_(1.0)
    return half * gate


def read_twice(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    tanh = torch.tanh(x)
    return 0.5 * x * (1.0 + tanh), tanh


@pytest.mark.parametrize(("function", "reason"), [(write_between, "in place"), (read_twice, "2 readers")])
def test_what_would_change_the_function_is_refused(function: Function, reason: str) -> None:
    x = sample()
    report, result = apply(function, x)
    assert report.rewritten == 0
    assert reason in report.refusals[0].reason
    expected = function(x)
    results, wanted = (result, expected) if isinstance(expected, tuple) else ((result,), (expected,))
    assert all(torch.equal(a, b) for a, b in zip(results, wanted, strict=True))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: 0.4 * x * (1.0 + torch.tanh(x)),
        lambda x: 0.5 * x * (1.5 + torch.tanh(x)),
        lambda x: 0.5 * x * (1.0 + torch.sin(x)),
        lambda x: 0.5 * x + (1.0 + torch.tanh(x)),
        lambda x: (0.5 + x) * (1.0 + torch.tanh(x)),
        F.gelu,
    ],
)
def test_other_products_do_not_match(function: Function) -> None:
    x = sample()
    report, result = apply(function, x)
    assert (report.rewritten, report.refusals) == (0, [])
    assert torch.equal(result, function(x))
