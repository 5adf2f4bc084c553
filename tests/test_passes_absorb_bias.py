"""linear(x, S) + b  ==  linear(x, S, b)"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

import padst_compile as padst
from padst_compile.passes.absorb_bias import AbsorbBias
from padst_compile.passes.context import Context
from padst_compile.passes.graph import STRUCTURED_LINEAR, argument
from padst_compile.passes.pipeline import Pipeline
from padst_compile.structures import Block
from padst_compile.testing.capture import capture

N = 8


class Model(nn.Module):
    def __init__(self, body: Callable[[Model, Any], Any]) -> None:
        super().__init__()
        weight = torch.randint(-4, 5, (N, N), generator=torch.Generator().manual_seed(0)).double()
        topology = Block(4).choose(weight.abs(), 0.5)
        self.body = body
        self.values = nn.Parameter(Block(4).pack(weight, topology))
        self.register_buffer("rows", topology[0])
        self.register_buffer("columns", topology[1])
        self.bias = nn.Parameter(torch.arange(N).double())
        self.scalar = nn.Parameter(torch.ones(1).double())
        self.matrix = nn.Parameter(torch.ones(3, N).double())

    def product(self, x: Any, bias: Any = None) -> Any:
        return STRUCTURED_LINEAR(x, self.values, [self.rows, self.columns], bias, None, None, N, "block:4x4")

    def forward(self, x: Any) -> Any:
        return self.body(self, x)


def twice(y: Any, bias: Any) -> Any:
    return y + bias + y


def run(body: Callable[[Model, Any], Any]) -> Any:
    facts = Context(fx.symbolic_trace(Model(body)), {}, inference=False)
    x = torch.arange(3 * N).reshape(3, N).double() - 9
    expected = facts.module(x)
    report = AbsorbBias().run(facts)
    facts.module.graph.lint()
    facts.module.recompile()
    assert torch.equal(facts.module(x), expected)
    return facts.module, report


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: m.product(x) + m.bias,
        lambda m, x: torch.add(m.product(x), m.bias),
        lambda m, x: torch.add(input=m.product(x), other=m.bias),
        lambda m, x: torch.add(m.product(x), other=m.bias),
        lambda m, x: torch.ops.aten.add.Tensor(m.product(x), m.bias),
    ],
)
def test_the_sum_moves_into_the_product(body: Callable[[Model, Any], Any]) -> None:
    module, report = run(body)
    (product,) = module.graph.find_nodes(op="call_function", target=STRUCTURED_LINEAR)
    assert (report.rewritten, argument(product, "bias").target) == (1, "bias")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda m, x: m.product(x, m.bias) + m.bias, "the product has a bias already"),
        (lambda m, x: twice(m.product(x), m.bias), "structured_linear_default has 2 readers"),
        (lambda m, x: m.product(x) + x, "the addend is no parameter"),
        (lambda m, x: m.product(x) + 1.0, "the addend is no parameter"),
        (lambda m, x: m.product(x) + m.scalar, "the addend is no vector over the outputs"),
        (lambda m, x: m.product(x) + m.matrix, "the addend is no vector over the outputs"),
    ],
)
def test_refusals(body: Callable[[Model, Any], Any], reason: str) -> None:
    _, report = run(body)
    assert (report.rewritten, [r.reason for r in report.refusals][:1]) == (0, [reason])


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: torch.add(m.product(x), m.bias, alpha=2),
        lambda m, x: m.product(x) - m.bias,
        lambda m, x: m.product(x) * m.bias,
        lambda m, x: m.product(x).relu() + m.bias,
    ],
)
def test_other_functions_are_no_match(body: Callable[[Model, Any], Any]) -> None:
    _, report = run(body)
    assert (report.rewritten, report.refusals) == (0, [])


def test_a_sum_that_changes_the_dtype_is_refused() -> None:
    facts = Context(fx.symbolic_trace(Model(lambda m, x: m.product(x) + m.bias)), {}, inference=False)
    product, total = (node for node in facts.module.graph.nodes if node.op == "call_function")
    product.meta["example_value"] = torch.empty(3, N, dtype=torch.bfloat16)
    total.meta["example_value"] = torch.empty(3, N, dtype=torch.float32)
    assert [r.reason for r in AbsorbBias().run(facts).refusals] == ["the addition changes the dtype"]


def test_a_cast_to_the_dtype_that_the_bias_has_is_no_obstacle() -> None:
    spec = padst.SparsitySpec(padst.Block(2), 0.5, permutation="random", permutation_side="output", ignore=())
    layer = padst.sparsify(nn.Sequential(nn.Linear(N, N)), spec)
    with torch.no_grad():
        graph = capture(layer, torch.randn(3, N))
    facts = graph.context(inference=True)
    report = Pipeline(kernels=None).run(facts)
    assert next(rule for rule in report.rules if rule.rule == "AbsorbBias").rewritten == 1
    assert padst.verify(graph.graph, facts.module, *graph.inputs)
