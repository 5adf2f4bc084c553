"""act(native_linear(x, S, b))  ==  native_linear(x, S, b, activation=act)"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx
from torch.nn import functional as F

from padst_compile.kernels import native
from padst_compile.passes.base import RuleReport
from padst_compile.passes.context import Context
from padst_compile.passes.fuse_activation import FuseActivation
from padst_compile.passes.graph import argument
from padst_compile.passes.native_calls import is_native_linear
from padst_compile.testing.rule_runs import diagonals, run_rule

pytestmark = pytest.mark.skipif(not native.load(), reason=f"no native kernels: {native.unavailable_reason()}")

Function = Callable[[torch.Tensor], Any]
UNIT = torch.finfo(torch.float32).eps / 2


def product(x: torch.Tensor, **epilogue: Any) -> torch.Tensor:
    return diagonals(x, torch.arange(8.0) - 4, **epilogue)


def n_m(x: torch.Tensor) -> torch.Tensor:
    offsets = torch.arange(16, dtype=torch.uint8).reshape(8, 2) % 4
    result: torch.Tensor = torch.ops.padst_native.nm_linear.default(x, torch.ones(8, 2, 1), offsets, None, None, None, 8, 1, 4)
    return result


def block(x: torch.Tensor) -> torch.Tensor:
    pointers, columns = torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([1, 0], dtype=torch.int32)
    values = torch.arange(32.0).reshape(2, 4, 4) - 9
    result: torch.Tensor = torch.ops.padst_native.block_linear.default(x, values, pointers, columns, None, None, None, 8)
    return result


def sample() -> torch.Tensor:
    return (torch.arange(24.0) % 7 - 3).reshape(3, 8)


def apply(function: Function, *inputs: torch.Tensor) -> tuple[RuleReport, fx.GraphModule, Any]:
    return run_rule(FuseActivation, function, *inputs)


def activations(module: fx.GraphModule) -> list[str]:
    return [argument(node, "activation") for node in module.graph.nodes if is_native_linear(node)]


@pytest.mark.parametrize("multiply", [product, n_m, pytest.param(block, marks=pytest.mark.skipif(
    not native.supports("block", torch.float32), reason="no micro-kernel for block layers"))])  # fmt: skip
@pytest.mark.parametrize(
    ("activation", "name"),
    [
        (F.relu, "relu"),
        (torch.relu, "relu"),
        (torch.ops.aten.relu.default, "relu"),
        (lambda y: y.relu(), "relu"),
        (lambda y: y.relu_(), "relu"),
        (lambda y: F.relu(y, inplace=True), "relu"),
        (torch.nn.ReLU(), "relu"),
        (F.gelu, "gelu"),
        (torch.nn.GELU(), "gelu"),
        (torch.ops.aten.gelu.default, "gelu"),
        (lambda y: F.gelu(y, approximate="tanh"), "gelu_tanh"),
        (F.silu, "silu"),
        (lambda y: F.silu(y, inplace=True), "silu"),
    ],
)
def test_the_activation_moves_into_the_kernel(multiply: Function, activation: Function, name: str) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return activation(multiply(x)) + 1  # type: ignore[no-any-return]

    x = sample()
    report, module, result = apply(function, x)
    assert (report.rewritten, report.refusals, activations(module)) == (1, [], [name])
    assert not any(node.target is F.relu for node in module.graph.nodes)
    expected = function(x)
    # ATen's functions are off by a few roundings of their argument where 1 + erf(x) cancels.
    slack = 0.0 if name == "relu" else 32 * UNIT
    assert bool(((result - expected).abs() <= slack * (1 + multiply(x).abs())).all())


def test_dtype_is_kept_under_autocast() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.relu(product(x))

    report, _, result = apply(function, sample())
    assert report.rewritten == 1 and result.dtype == torch.float32 and torch.equal(result, F.relu(product(sample())))


def two_readers(x: torch.Tensor) -> torch.Tensor:
    y = product(x)
    return F.relu(y) + y


def a_view_reads_too(x: torch.Tensor) -> torch.Tensor:
    y = product(x)
    z = y[0]
    return F.relu(y) + z


def another_activation(x: torch.Tensor) -> torch.Tensor:
    return F.relu(product(x, activation="silu"))


def residual_first(x: torch.Tensor) -> torch.Tensor:
    return F.relu(product(x, residual=x))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (two_readers, "2 readers"),
        (a_view_reads_too, "2 readers"),
        (another_activation, "another activation"),
        (residual_first, "another residual"),
    ],
)
def test_what_would_change_the_function_is_refused(function: Function, reason: str) -> None:
    report, _, result = apply(function, sample())
    assert report.rewritten == 0 and reason in report.refusals[0].reason
    assert torch.equal(result, function(sample()))


def test_a_change_of_dtype_is_refused() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    linear = graph.call_function(torch.ops.padst_native.diagonal_linear.default, (x, x, x, None, None, None, 8))
    relu = graph.call_function(torch.relu, (linear,))
    linear.meta["example_value"], relu.meta["example_value"] = torch.empty(8), torch.empty(8, dtype=torch.bfloat16)
    graph.output(relu)
    report = FuseActivation().run(Context(fx.GraphModule({}, graph), {}, inference=True))
    assert [refusal.reason for refusal in report.refusals] == ["the activation changes the dtype"]


@pytest.mark.parametrize(
    "function",
    [
        F.relu,
        lambda x: F.relu(product(x) + 1),
        lambda x: torch.tanh(product(x)),
        lambda x: F.relu6(product(x)),
        lambda x: F.leaky_relu(product(x)),
        lambda x: product(F.relu(x)),
        lambda x: F.relu(product(x).T),
    ],
)
def test_other_expressions_do_not_match(function: Function) -> None:
    report, _, result = apply(function, sample())
    assert (report.rewritten, report.refusals) == (0, [])
    assert torch.equal(result, function(sample()))
