"""permute(norm(x, w, b), p)  ==  norm(permute(x, p), w[p], b[p])"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from padst_compile.passes.context import Context
from padst_compile.passes.fold_into_norm import FoldIntoNorm
from padst_compile.passes.graph import PERMUTE, is_call

N = 6
aten = torch.ops.aten
P, Q = torch.tensor([3, 1, 0, 5, 2, 4]).int(), torch.tensor([1, 2, 0, 4, 5, 3]).int()


class Model(nn.Module):
    def __init__(self, norm: Callable[[Model, Any], Any]) -> None:
        super().__init__()
        self.norm = norm
        self.weight, self.bias = nn.Parameter(torch.arange(1.0, N + 1).double()), nn.Parameter(torch.arange(N).double())
        self.register_buffer("p", P)
        self.register_buffer("q", Q)

    def forward(self, x: Any) -> Any:
        return PERMUTE(self.norm(self, PERMUTE(x, self.p)), self.q)


NORMS: dict[str, Callable[[Model, Any], Any]] = {
    "layer_norm": lambda m, x: F.layer_norm(x, (N,), m.weight, m.bias, 1e-3),
    "layer_norm by keyword": lambda m, x: F.layer_norm(x, normalized_shape=(N,), weight=m.weight, bias=m.bias, eps=1e-3),
    "layer_norm without bias": lambda m, x: F.layer_norm(x, (N,), m.weight),
    "layer_norm without weights": lambda m, x: F.layer_norm(x, (N,)),
    "rms_norm": lambda m, x: F.rms_norm(x, (N,), m.weight, 1e-3),
    "rms_norm by keyword": lambda m, x: F.rms_norm(x, (N,), eps=1e-3, weight=m.weight),
    "aten.layer_norm": lambda m, x: aten.layer_norm.default(x, [N], m.weight, m.bias, 1e-3, False),
    "aten.rms_norm": lambda m, x: aten.rms_norm.default(x, [N], m.weight, 1e-3),
}


def facts_of(norm: Callable[[Model, Any], Any]) -> Context:
    return Context(fx.symbolic_trace(Model(norm)), {}, inference=False)


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_the_permutation_meets_the_one_before_the_norm(norm: Callable[[Model, Any], Any]) -> None:
    facts = facts_of(norm)
    x = torch.randn(4, N, dtype=torch.float64) * 3
    expected = facts.module(x)
    assert FoldIntoNorm().run(facts).rewritten == 1
    facts.module.graph.lint()
    facts.module.recompile()
    # A reordered sum of six numbers rounds up to five times on either side; a norm's scale is at most 6 + 5.
    torch.testing.assert_close(facts.module(x), expected, rtol=0, atol=200 * torch.finfo(torch.float64).eps * 11)
    permutes = facts.module.graph.find_nodes(op="call_function", target=PERMUTE)
    assert is_call(permutes[-1].args[0], PERMUTE)


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (lambda m, x: F.layer_norm(x, (4, N)), "the norm spans several axes"),
        (lambda m, x: F.layer_norm(x * 2, (N,)), "no other permutation comes before the norm to meet this one"),
        (lambda m, x: F.layer_norm(x, (N,), x[0]), "the norm's weights are computed from the inputs"),
    ],
)
def test_refusals(norm: Callable[[Model, Any], Any], reason: str) -> None:
    report = FoldIntoNorm().run(facts_of(norm))
    assert (report.rewritten, [r.reason for r in report.refusals]) == (0, [reason])


def test_a_norm_with_another_reader_keeps_its_order() -> None:
    class Shared(Model):
        def forward(self, x: Any) -> Any:
            y = F.layer_norm(PERMUTE(x, self.p), (N,))
            return PERMUTE(y, self.q) + y

    report = FoldIntoNorm().run(Context(fx.symbolic_trace(Shared(lambda m, x: x)), {}, inference=False))
    assert report.refusals[0].reason == "layer_norm has 2 readers, which would all see the new order"


def test_group_norm_and_softmax_are_no_match() -> None:
    for function in (lambda m, x: F.group_norm(x, 2), lambda m, x: F.softmax(x, -1)):
        report = FoldIntoNorm().run(facts_of(function))
        assert (report.rewritten, report.refusals) == (0, [])


def test_the_moved_permutation_has_the_dtype_of_the_norms_input() -> None:
    facts = facts_of(NORMS["layer_norm"])
    for node in facts.module.graph.nodes:
        if node.op == "call_function":
            low = is_call(node, PERMUTE) and node.args[0].op == "placeholder"
            node.meta["example_value"] = torch.empty(4, N, dtype=torch.bfloat16 if low else torch.float32)
    FoldIntoNorm().run(facts)
    permutes = facts.module.graph.find_nodes(op="call_function", target=PERMUTE)
    assert [node.meta["example_value"].dtype for node in permutes] == [torch.bfloat16, torch.bfloat16]
