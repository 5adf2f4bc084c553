"""0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))  ==  gelu(x, approximate="tanh")"""

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
from padst_compile.passes.recognize_gelu import RecognizeGelu

Function = Callable[[torch.Tensor], Any]
SCALE = math.sqrt(2.0 / math.pi)


def gelu_new(x: torch.Tensor) -> torch.Tensor:
    """As transformers writes it for GPT-2."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def gelu_fast(x: torch.Tensor) -> torch.Tensor:
    """As transformers writes it, with ten digits."""
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


def apply(function: Function, x: torch.Tensor) -> tuple[RuleReport, fx.GraphModule, Any]:
    found: list[Any] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        rule = RecognizeGelu()
        report = rule.run(Context(gm, {}, inference=False))
        assert rule.run(Context(gm, {}, inference=False)).rewritten == 0
        gm.graph.lint()
        gm.recompile()
        found.extend([report, gm])
        return gm.forward

    result = torch.compile(function, backend=backend, fullgraph=True)(x)
    return found[0], found[1], result


def sample(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.cat([torch.randn(200, generator=generator) * 4, torch.tensor([0.0, -40.0, 40.0])]).to(dtype)


@pytest.mark.parametrize(
    "function",
    [
        gelu_new,
        lambda x: 0.5 * x * (1.0 + torch.tanh(x * SCALE * (1.0 + 0.044715 * x * x))),
        lambda x: x * 0.5 * (torch.tanh(SCALE * (x + 0.044715 * x**3)) + 1),
        lambda x: 0.5 * (x * (1 + torch.tanh(SCALE * x + SCALE * 0.044715 * x * x * x))),
        lambda x: x * (0.5 + 0.5 * (SCALE * (x + 0.044715 * x * torch.pow(x, 2))).tanh()),
        lambda x: torch.mul(torch.add(x, x * F.tanh(SCALE * torch.add(x, torch.mul(0.044715, x**3)))), 0.5),
        lambda x: gelu_new(x + 1) * 2,
        lambda x: gelu_new(torch.tanh(x) * x),
    ],
)
def test_every_way_of_writing_it_becomes_one_call(function: Function) -> None:
    x = sample()
    report, module, result = apply(function, x)
    assert (report.rewritten, report.refusals) == (1, [])
    assert len(module.graph.find_nodes(op="call_function", target=F.gelu)) == 1
    # 1 + tanh(u) is exact to eps absolutely, not relatively: so is what is multiplied by x.
    assert bool(((result - function(x)).abs() <= 64 * torch.finfo(torch.float64).eps * (1 + x.abs())).all())


def test_one_of_a_kind_after_the_other() -> None:
    report, _, result = apply(lambda x: gelu_new(gelu_new(x)), sample())
    assert report.rewritten == 2
    torch.testing.assert_close(result, gelu_new(gelu_new(sample())), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_dtypes_become_more_accurate(dtype: torch.dtype) -> None:
    x = sample(dtype)
    report, _, result = apply(gelu_new, x)
    assert report.rewritten == 1 and result.dtype == dtype
    exact = gelu_new(x.double())
    assert (result.double() - exact).abs().max() <= (gelu_new(x).double() - exact).abs().max()


def test_the_gradient_is_the_same() -> None:
    x = sample().requires_grad_()
    (expected,) = torch.autograd.grad(gelu_new(x).sum(), x)
    (actual,) = torch.autograd.grad(apply(gelu_new, x)[2].sum(), x)
    assert bool(((actual - expected).abs() <= 64 * torch.finfo(torch.float64).eps * (1 + x.abs() ** 3)).all())


def write_between(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    half = 0.5 * x
    gate = 1.0 + torch.tanh(SCALE * (x + 0.044715 * x**3))
    x.add_(1.0)
    return half * gate


def gate_read_twice(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    tanh = torch.tanh(SCALE * (x + 0.044715 * x**3))
    return 0.5 * x * (1.0 + tanh), tanh


def whole(x: torch.Tensor) -> torch.Tensor:
    return gelu_new(x.float().to(torch.int64))


@pytest.mark.parametrize(
    ("function", "reason"), [(write_between, "in place"), (gate_read_twice, "read elsewhere"), (whole, "dtype")]
)
def test_what_would_change_the_function_is_refused(function: Function, reason: str) -> None:
    x = sample()
    report, _, result = apply(function, x)
    assert report.rewritten == 0 and reason in report.refusals[0].reason
    expected = function(x)
    results, wanted = (result, expected) if isinstance(expected, tuple) else ((result,), (expected,))
    assert all(torch.equal(a, b) for a, b in zip(results, wanted, strict=True))


@pytest.mark.parametrize(
    "function",
    [
        gelu_fast,
        lambda x: 0.5 * x * (1.0 + torch.tanh(0.7979 * (x + 0.044715 * x**3))),
        lambda x: 0.5 * x * (1.0 + torch.tanh(SCALE * (x + 0.0447 * x**3))),
        lambda x: 0.5 * x * (1.0 + torch.tanh(SCALE * (x + 0.044715 * x**2))),
        lambda x: 0.5 * x * (1.0 + torch.tanh(SCALE * (x + 0.044715 * x**3 + 0.001))),
        lambda x: 0.51 * x * (1.0 + torch.tanh(SCALE * (x + 0.044715 * x**3))),
        lambda x: 0.5 * x * (0.9 + torch.tanh(SCALE * (x + 0.044715 * x**3))),
        lambda x: 0.5 * (x + 1) * (1.0 + torch.tanh(SCALE * (x + 0.044715 * x**3))),
        lambda x: 0.5 * x * (1.0 + torch.sigmoid(SCALE * (x + 0.044715 * x**3))),
        lambda x: 0.5 * x.flip(0) * (1.0 + torch.tanh(SCALE * (x + 0.044715 * x**3))),
        lambda x: torch.tanh(x) * x,
    ],
)
def test_other_expressions_do_not_match(function: Function) -> None:
    x = sample()
    report, _, result = apply(function, x)
    assert (report.rewritten, report.refusals) == (0, [])
    assert torch.equal(result, function(x))
