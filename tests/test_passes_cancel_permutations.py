"""permute(x, p)  ==  x   where p is the identity"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

from padst_compile.passes.cancel_permutations import CancelPermutations
from padst_compile.passes.context import Context
from padst_compile.passes.graph import PERMUTE
from padst_compile.passes.hoist_constants import evaluate, hoist_constants
from padst_compile.passes.pipeline import Pipeline
from padst_compile.permutation import inverse
from padst_compile.testing.capture import capture

N = 6


class Model(nn.Module):
    def __init__(self, forward: Callable[[Model, Any], Any], table: torch.Tensor | None = None) -> None:
        super().__init__()
        self.body = forward
        self.register_buffer("table", torch.arange(N).int() if table is None else table)
        self.register_buffer("other", inverse(self.table))

    def forward(self, x: Any) -> Any:
        return self.body(self, x)


def run(forward: Callable[[Model, Any], Any], *, inference: bool = True, table: torch.Tensor | None = None) -> Any:
    facts = Context(fx.symbolic_trace(Model(forward, table)), {}, inference)
    report = CancelPermutations().run(facts)
    facts.module.graph.lint()
    facts.module.recompile()
    return facts, report


def test_the_identity_vanishes_and_is_watched() -> None:
    facts, report = run(lambda m, x: PERMUTE(x + 1, m.table) * 2)
    assert report.rewritten == 1
    assert facts.module.graph.find_nodes(op="call_function", target=PERMUTE) == []
    assert [str(node.target) for node in facts.assumed] == ["table"]


@pytest.mark.parametrize(
    ("forward", "inference", "reason"),
    [
        (lambda m, x: PERMUTE(x, m.table) * 2, False, "training: the permutation's values may change at any step"),
        (lambda m, x: PERMUTE(x, torch.argsort(x[0])) * 2, True, "the index table is computed from the inputs"),
        (
            lambda m, x: PERMUTE(x, m.table),
            True,
            "the graph returns the result, which must not be the tensor that was permuted",
        ),
        (lambda m, x: PERMUTE(x, m.table).view(-1).add_(1) + x.sum(), True, "add_ writes in place while the result is in use"),
        (lambda m, x: PERMUTE(x, m.table).add_(1) + x, True, "add_ writes in place while the result is in use"),
    ],
)
def test_refusals(forward: Callable[[Model, Any], Any], inference: bool, reason: str) -> None:
    _, report = run(forward, inference=inference)
    assert report.rewritten == 0
    assert [refusal.reason for refusal in report.refusals] == [reason]


def test_a_permutation_that_moves_features_stays() -> None:
    _, report = run(lambda m, x: PERMUTE(x, m.table) * 2, table=torch.tensor([1, 0, 2, 3, 4, 5]).int())
    assert report.refusals[0].reason == "the permutation moves features"


def test_a_permutation_and_its_inverse_cancel_and_the_composed_table_can_be_checked_again() -> None:
    table = torch.tensor([2, 0, 1, 5, 4, 3]).int()
    model = Model(lambda m, x: PERMUTE(PERMUTE(x, m.table), m.other) * 2, table)
    facts = Context(fx.symbolic_trace(model), {}, inference=True)
    x = torch.randn(3, N)
    report = Pipeline(kernels=None).run(facts)
    assert (report.permutations.composed, report.permutations.cancelled, report.permutations.remaining) == (1, 1, 0)
    split = hoist_constants(facts)
    assert torch.equal(split.main(x), x * 2)
    (present,) = evaluate(split.relied_on, [])
    assert torch.equal(present, split.expected[0])
    facts.module.other.copy_(table)
    split.relied_on.other.copy_(table)
    (changed,) = evaluate(split.relied_on, [])
    assert not torch.equal(changed, split.expected[0])


PAIRS: dict[str, Callable[[Any, Any], Any]] = {
    "there and back": lambda m, x: PERMUTE(PERMUTE(x + 1, m.table), torch.argsort(m.table).int()) * 2,
    "back and there": lambda m, x: PERMUTE(PERMUTE(x + 1, m.table.argsort().to(torch.int32)), m.table) * 2,
}
NO_PAIRS: dict[str, Callable[[Any, Any], Any]] = {
    "another table": lambda m, x: PERMUTE(PERMUTE(x + 1, m.table), torch.argsort(m.other).int()) * 2,
    "the same twice": lambda m, x: PERMUTE(PERMUTE(x + 1, m.table), m.table) * 2,
    "descending": lambda m, x: PERMUTE(PERMUTE(x + 1, m.table), torch.argsort(m.table, descending=True).int()) * 2,
}


@pytest.mark.parametrize("case", [*PAIRS, *NO_PAIRS])
def test_a_table_and_its_argsort_cancel_while_training(case: str) -> None:
    model = Model({**PAIRS, **NO_PAIRS}[case], torch.tensor([2, 0, 1, 4, 5, 3]).int())
    x = torch.arange(3 * N).reshape(3, N).double()
    captured = capture(model, x)  # a symbolic trace would compute the tables
    facts = captured.context(inference=False)
    Pipeline(kernels=None).run(facts)
    assert len(facts.module.graph.find_nodes(op="call_function", target=PERMUTE)) == (1 if case in NO_PAIRS else 0)
    assert not facts.assumed
    assert torch.equal(facts.module(*captured.inputs)[0], model(x))
