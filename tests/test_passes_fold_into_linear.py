"""permute(f(x W.T + b), p)  ==  f(x W[p].T + b[p])   for a pointwise f"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from padst_compile.passes.context import Context
from padst_compile.passes.fold_into_linear import FoldIntoLinear
from padst_compile.passes.graph import PERMUTE
from padst_compile.passes.hoist_constants import evaluate, hoist_constants

N = 6
NOT_DENSE = "it does not start at a dense linear layer with parameters as weights"


class Model(nn.Module):
    def __init__(self, body: Callable[[Model, Any], Any]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.body = body
        self.layer = nn.Linear(N, N)
        self.weight = nn.Parameter(torch.randint(-4, 5, (N, N), generator=generator).double())
        self.bias = nn.Parameter(torch.randint(-4, 5, (N,), generator=generator).double())
        self.register_buffer("p", torch.randperm(N, generator=generator).int())

    def forward(self, x: Any) -> Any:
        return PERMUTE(self.body(self, x), self.p)


def run(body: Callable[[Model, Any], Any], *, inference: bool = True) -> Any:
    facts = Context(fx.symbolic_trace(Model(body)), {}, inference)
    x = torch.arange(3 * N).reshape(3, N).double() - 9
    expected = facts.module(x) if inference else None
    report = FoldIntoLinear().run(facts)
    facts.module.graph.lint()
    facts.module.recompile()
    return facts, report, x, expected


FOLDED: dict[str, Callable[[Model, Any], Any]] = {
    "alone": lambda m, x: F.linear(x, m.weight, m.bias),
    "without bias": lambda m, x: F.linear(x, m.weight),
    "addmm": lambda m, x: torch.addmm(m.bias, x, m.weight),
    "mm": lambda m, x: torch.ops.aten.mm.default(x, torch.ops.aten.permute.default(m.weight, [1, 0])),
    "activation": lambda m, x: F.relu(F.linear(x, m.weight, m.bias)),
    "chain": lambda m, x: -(F.relu(F.linear(x, m.weight, m.bias)) * 2 + 1),
    "inactive dropout": lambda m, x: F.dropout(F.linear(x, m.weight, m.bias), 0.5, False),
}


@pytest.mark.parametrize("body", FOLDED.values(), ids=FOLDED)
def test_the_permutation_becomes_the_order_of_the_rows(body: Callable[[Model, Any], Any]) -> None:
    facts, report, x, expected = run(body)
    assert report.rewritten == 1
    assert facts.module.graph.find_nodes(op="call_function", target=PERMUTE) == []
    assert torch.equal(facts.module(x), expected)
    split = hoist_constants(facts)
    assert torch.equal(split.main(x, *evaluate(split.prepare, [])), expected)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda m, x: F.relu(x), None),
        (lambda m, x: F.linear(x, x), NOT_DENSE),
        (lambda m, x: F.linear(x, m.weight).softmax(-1).relu(), None),
        (lambda m, x: F.softmax(F.linear(x, m.weight), -1), NOT_DENSE),
        (lambda m, x: F.dropout(F.linear(x, m.weight)), NOT_DENSE),
        (lambda m, x: F.linear(x, m.weight) * x, NOT_DENSE),
        (lambda m, x: F.linear(x, m.weight).mul(x), None),
        (lambda m, x: F.relu(F.linear(x, m.weight), True), NOT_DENSE),
        (lambda m, x: F.mish(F.linear(x, m.weight), True), NOT_DENSE),
        (lambda m, x: m.layer(x), NOT_DENSE),
    ],
)
def test_other_functions_are_left_alone(body: Callable[[Model, Any], Any], reason: str | None) -> None:
    facts = Context(fx.symbolic_trace(Model(body)), {}, inference=True)
    report = FoldIntoLinear().run(facts)
    assert (report.rewritten, [r.reason for r in report.refusals]) == (0, [] if reason is None else [reason])


def test_training_is_refused() -> None:
    _, report, _, _ = run(FOLDED["alone"], inference=False)
    expected = "training: reordering the weight at every step costs more than reordering the activations"
    assert [r.reason for r in report.refusals] == [expected]


def test_a_shared_result_is_refused() -> None:
    class Shared(Model):
        def forward(self, x: Any) -> Any:
            y = F.linear(x, self.weight)
            return PERMUTE(F.relu(y), self.p) + y

    report = FoldIntoLinear().run(Context(fx.symbolic_trace(Shared(lambda m, x: x)), {}, inference=True))
    assert report.refusals[0].reason == "linear has 2 readers, which would all see the new order"


def test_a_table_from_the_inputs_is_refused() -> None:
    class Dynamic(Model):
        def forward(self, x: Any) -> Any:
            return PERMUTE(F.linear(x, self.weight), torch.argsort(x[0]))

    report = FoldIntoLinear().run(Context(fx.symbolic_trace(Dynamic(lambda m, x: x)), {}, inference=True))
    assert report.refusals[0].reason == "the index table is computed from the inputs"
