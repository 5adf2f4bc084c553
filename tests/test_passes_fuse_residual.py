"""native_linear(x, S, b, activation) + r  ==  native_linear(x, S, b, activation, residual=r)"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

import padst_compile as padst
from padst_compile.backend import padst as backend
from padst_compile.kernels import native
from padst_compile.passes.base import RuleReport
from padst_compile.passes.fuse_residual import FuseResidual
from padst_compile.passes.graph import argument
from padst_compile.passes.native_calls import is_native_linear
from padst_compile.testing.rule_runs import diagonals as product
from padst_compile.testing.rule_runs import run_rule

pytestmark = pytest.mark.skipif(not native.load(), reason=f"no native kernels: {native.unavailable_reason()}")

Function = Callable[..., Any]


def sample() -> tuple[torch.Tensor, torch.Tensor]:
    return (torch.arange(24.0) % 7 - 3).reshape(3, 8), (torch.arange(24.0) % 5 - 1).reshape(3, 8)


def apply(function: Function, *inputs: torch.Tensor) -> tuple[RuleReport, fx.GraphModule, Any]:
    return run_rule(FuseResidual, function, *inputs)


def residuals(module: fx.GraphModule) -> int:
    return sum(argument(node, "residual") is not None for node in module.graph.nodes if is_native_linear(node))


def addend_made_later(x: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    y = product(x)
    return y + (r * 2 + 1)


def addend_read_later(x: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    y = product(x) + r
    return y * r


def two_products(x: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    return product(x) + product(r)


def one_product_read_twice(x: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    z, y = product(r), product(x)
    return (z + y) * y


def of_its_own_input(x: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    return x + product(x)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, r: product(x) + r,
        lambda x, r: r + product(x),
        lambda x, r: torch.add(product(x), r),
        lambda x, r: product(x, activation="relu") + r,
        addend_made_later,
        addend_read_later,
        two_products,
        one_product_read_twice,
        of_its_own_input,
    ],
)
def test_the_addition_moves_into_the_kernel(function: Function) -> None:
    report, module, result = apply(function, *sample())
    assert (report.rewritten, report.refusals, residuals(module)) == (1, [], 1)
    assert torch.equal(result, function(*sample()))


def test_a_chain_of_sums_leaves_one_addition() -> None:
    def function(x: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return product(x) + r + x

    report, _, result = apply(function, *sample())
    assert report.rewritten == 1 and [refusal.reason for refusal in report.refusals] == [
        "the kernel adds another tensor already"
    ]
    assert torch.equal(result, function(*sample()))


def read_twice(x: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    y = product(x)
    return (y + r) * y


def doubled(x: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    y = product(x)
    return y + y


def input_written_between(x: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    y = product(x)
    x.add_(1)
    return y + r


def broadcast(x: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    return product(x) + r[0]


def broadcast_product(x: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    return product(x[0]) + r


def promoted(x: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    return product(x.bfloat16()) + r


def strided(x: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    return product(x) + r.T.contiguous().T


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (read_twice, "2 readers"),
        (doubled, "same product"),
        (input_written_between, "writes in place"),
        (broadcast, "differ"),
        (broadcast_product, "differ"),
        (promoted, "differ"),
        (strided, "contiguous"),
    ],
)
def test_what_would_change_the_function_is_refused(function: Function, reason: str) -> None:
    report, module, result = apply(function, *sample())
    assert (report.rewritten, residuals(module)) == (0, 0) and reason in report.refusals[0].reason
    assert torch.equal(result, function(*sample()))


@pytest.mark.parametrize(
    "function",
    [
        lambda x, r: x + r,
        lambda x, r: product(x) + 1,
        lambda x, r: product(x) - r,
        lambda x, r: torch.add(product(x), r, alpha=2),
        lambda x, r: operator.iadd(r.clone(), product(x)),
        lambda x, r: product(x).relu() + r,
    ],
)
def test_other_expressions_do_not_match(function: Function) -> None:
    report, _, result = apply(function, *sample())
    assert (report.rewritten, report.refusals) == (0, [])
    assert torch.equal(result, function(*sample()))


class Mlp(nn.Module):
    """What a transformer has after its attention, in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(96, 32)
        self.act, self.dropout = nn.GELU(approximate="tanh"), nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dropout(self.down(self.dropout(self.act(self.up(self.norm(x))))))  # type: ignore[no-any-return]


def sparse_mlp() -> nn.Module:
    torch.manual_seed(0)
    return padst.sparsify(Mlp().eval(), padst.SparsitySpec(structure="nm:1:4", permutation="random"))


def test_the_kernels_of_a_sparse_mlp_do_all_but_the_norm() -> None:
    model, x = sparse_mlp(), torch.randn(40, 32)  # more tokens than the handful that is never laid out feature-major
    with torch.no_grad():
        explanation = padst.explain(model, x, options={"kernels": "sparse"})
        compiled = torch.compile(model, backend=backend, options={"kernels": "sparse", "verify": True})
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-6)
    fused = {layer.name: layer.fused for layer in explanation.layers}
    assert fused == {
        "up": ("bias", "input_permutation", "activation", "feature-major output"),
        "down": ("bias", "input_permutation", "residual", "feature-major input"),
    }


def test_nothing_is_fused_that_needs_a_gradient() -> None:
    fused = {layer.name: layer.fused for layer in padst.explain(sparse_mlp(), torch.randn(5, 32)).layers}
    assert not any({"activation", "residual"} & set(parts) for parts in fused.values())
