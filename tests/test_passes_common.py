"""What holds for every rewrite rule: it keeps the function, the graph's validity and its meta, and respects writes in place."""

from __future__ import annotations

import operator
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import padst_compile
from padst_compile.passes.absorb_bias import AbsorbBias
from padst_compile.passes.base import RewriteRule
from padst_compile.passes.cancel_permutations import CancelPermutations
from padst_compile.passes.choose_kernels import ChooseKernels
from padst_compile.passes.compose_permutations import ComposePermutations
from padst_compile.passes.context import Context
from padst_compile.passes.fold_into_norm import FoldIntoNorm
from padst_compile.passes.fuse_input_permutation import FuseInputPermutation
from padst_compile.passes.fuse_output_permutation import FuseOutputPermutation
from padst_compile.passes.graph import PERMUTE, STRUCTURED_LINEAR
from padst_compile.passes.pipeline import Pipeline
from padst_compile.structures import Block

SIZE = 8
ROOT = Path(padst_compile.__file__).parent.parent


class Tables(nn.Module):
    """Tables, weights and a block-sparse product, all of whole numbers in float64, so that every result is exact."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name in ("p", "q"):
            self.register_buffer(name, torch.randperm(SIZE, generator=generator).int())
        self.register_buffer("identity", torch.arange(SIZE).int())
        weight = torch.randint(-4, 5, (SIZE, SIZE), generator=generator).double()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.randint(-4, 5, (SIZE,), generator=generator).double())
        self.topology = Block(4).choose(weight.abs(), 0.5)
        for number, index in enumerate(self.topology):
            self.register_buffer(f"index{number}", index)
        self.values = nn.Parameter(Block(4).pack(weight, self.topology))

    def product(self, x: Any, bias: Any = None) -> Any:
        return STRUCTURED_LINEAR(x, self.values, [self.index0, self.index1], bias, None, None, SIZE, "block:4x4")


class Composed(Tables):
    def forward(self, x: Any) -> Any:
        return PERMUTE(PERMUTE(x, self.p), self.q) * 2


class Cancelled(Tables):
    def forward(self, x: Any) -> Any:
        return PERMUTE(x + 1, self.identity) * 2


class Normed(Tables):
    def forward(self, x: Any) -> Any:
        return PERMUTE(F.layer_norm(PERMUTE(x, self.p), (SIZE,), self.bias, self.bias), self.q) * 2


class PermutedInput(Tables):
    def forward(self, x: Any) -> Any:
        return self.product(PERMUTE(x, self.p), self.bias) * 2


class PermutedOutput(Tables):
    def forward(self, x: Any) -> Any:
        return PERMUTE(self.product(x, self.bias), self.p) * 2


class Biased(Tables):
    def forward(self, x: Any) -> Any:
        return (self.product(x) + self.bias) * 2


RULES: list[tuple[Callable[[], RewriteRule], type[Tables]]] = [
    (ComposePermutations, Composed),
    (CancelPermutations, Cancelled),
    (FoldIntoNorm, Normed),
    (FuseInputPermutation, PermutedInput),
    (FuseOutputPermutation, PermutedOutput),
    (AbsorbBias, Biased),
]
every_rule = pytest.mark.parametrize(("rule", "model"), RULES, ids=[model.__name__ for _, model in RULES])


def traced(model: nn.Module) -> Context:
    """A model's graph, where its parameters may be used as they are."""
    return Context(fx.symbolic_trace(model), {}, inference=True)


def sample() -> torch.Tensor:
    return torch.randint(-9, 10, (3, SIZE), generator=torch.Generator().manual_seed(1)).double()


def writes(x: fx.Node) -> dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """Calls that write to `x`: target, positional and keyword arguments."""
    return {
        "torch.relu_": (torch.relu_, (x,), {}),
        "F.relu by keyword": (F.relu, (x,), {"inplace": True}),
        "F.relu by position": (F.relu, (x, True), {}),
        "F.mish by position": (F.mish, (x, True), {}),
        "F.dropout by position": (F.dropout, (x, 0.5, True, True), {}),
        "operator.iadd": (operator.iadd, (x, 1.0), {}),
        "operator.setitem": (operator.setitem, (x, 0, 1.0), {}),
        "out": (torch.neg, (x,), {"out": x}),
        "aten.mul_": (torch.ops.aten.mul_.Tensor, (x, 2.0), {}),
        "x.add_": ("add_", (x, 1.0), {}),
    }


WRITES = list(writes(fx.Graph().placeholder("x")))


def insert_write(graph: fx.Graph, after: fx.Node, to: fx.Node, kind: str) -> None:
    target, args, kwargs = writes(to)[kind]
    with graph.inserting_after(after):
        if isinstance(target, str):
            graph.call_method(target, args, kwargs)
        else:
            graph.call_function(target, args, kwargs)


@every_rule
def test_the_function_is_the_same(rule: Callable[[], RewriteRule], model: type[Tables]) -> None:
    facts, x = traced(model()), sample()
    expected = facts.module(x)
    report = rule().run(facts)
    facts.module.graph.lint()
    facts.module.recompile()
    assert report.rewritten == 1
    if model is Normed:  # sums of the same numbers in another order: each of a few operations rounds once
        torch.testing.assert_close(facts.module(x), expected, rtol=0, atol=64 * torch.finfo(torch.float64).eps * 9)
    else:
        assert torch.equal(facts.module(x), expected)


@every_rule
def test_gradients_are_the_same(rule: Callable[[], RewriteRule], model: type[Tables]) -> None:
    facts, x = traced(model()), sample().requires_grad_()
    parameters = list(facts.module.parameters())
    expected = torch.autograd.grad(facts.module(x).square().sum(), [x, *parameters], allow_unused=True)
    rule().run(facts)
    facts.module.recompile()
    found = torch.autograd.grad(facts.module(x).square().sum(), [x, *parameters], allow_unused=True)
    for now, then in zip(found, expected, strict=True):
        torch.testing.assert_close(now, then, rtol=1e-12, atol=1e-12)


@every_rule
def test_a_second_run_finds_nothing_to_do(rule: Callable[[], RewriteRule], model: type[Tables]) -> None:
    facts = traced(model())
    rule().run(facts)
    before = str(facts.module.graph)
    assert rule().run(facts).rewritten == 0
    assert str(facts.module.graph) == before


@every_rule
def test_arguments_given_by_keyword_are_understood(rule: Callable[[], RewriteRule], model: type[Tables]) -> None:
    facts, x = traced(model()), sample()
    expected = facts.module(x)
    for node in facts.module.graph.nodes:
        if node.target in (PERMUTE, STRUCTURED_LINEAR):
            names = [argument.name for argument in node.target._schema.arguments]
            node.kwargs, node.args = dict(zip(names, node.args, strict=True)), ()
        elif node.target is F.linear:
            node.kwargs, node.args = dict(zip(("input", "weight", "bias"), node.args, strict=True)), ()
        elif node.target is operator.add and model is Biased:
            node.target = torch.add
            node.kwargs, node.args = dict(zip(("input", "other"), node.args, strict=True)), ()
    facts.module.recompile()
    assert rule().run(facts).rewritten == 1
    facts.module.recompile()
    torch.testing.assert_close(facts.module(x), expected, rtol=1e-13, atol=1e-12)


@pytest.mark.parametrize("kind", WRITES)
@pytest.mark.parametrize(("rule", "model"), RULES, ids=lambda value: value.__name__)
def test_a_write_between_the_two_calls_stops_the_rule(rule: Callable[[], RewriteRule], model: type[Tables], kind: str) -> None:
    facts = traced(model())
    nodes = list(facts.module.graph.nodes)
    last = next(node for node in reversed(nodes) if node.target in (PERMUTE, STRUCTURED_LINEAR, operator.add))
    first = last if rule is CancelPermutations else last.args[0]
    source = last.args[0] if rule is CancelPermutations else first.args[0]
    insert_write(facts.module.graph, first, source, kind)
    report = rule().run(facts)
    assert report.rewritten == 0
    assert [r.reason for r in report.refusals if "writes in place" in r.reason], report.refusals


@pytest.mark.parametrize("rule", [ComposePermutations, FuseInputPermutation, FuseOutputPermutation, FoldIntoNorm, AbsorbBias])
@pytest.mark.parametrize("switch", [torch._C._set_grad_enabled, torch.amp.autocast_mode._enter_autocast])
def test_a_call_is_not_moved_over_a_switch_of_autograd_or_autocast(rule: type[RewriteRule], switch: Any) -> None:
    facts = traced(dict(RULES)[rule]())
    last = next(n for n in reversed(facts.module.graph.nodes) if n.target in (PERMUTE, STRUCTURED_LINEAR, operator.add))
    with facts.module.graph.inserting_after(last.args[0]):
        facts.module.graph.call_function(switch, (True,))
    report = rule().run(facts)
    assert report.rewritten == 0
    assert "switches autograd or autocast" in report.refusals[-1].reason


@every_rule
def test_the_rewritten_result_keeps_its_meta(rule: Callable[[], RewriteRule], model: type[Tables]) -> None:
    facts = traced(model())
    stack = {"key": ("L['self'].blocks[0].fc1", nn.Module)}
    for node in facts.module.graph.nodes:
        if node.op == "call_function":
            node.meta["nn_module_stack"] = stack
            node.meta["example_value"] = torch.empty(3, SIZE, dtype=torch.float64)
    rule().run(facts)
    result = next(iter(facts.module.graph.find_nodes(op="output"))).args[0].args[0]
    assert result.meta["nn_module_stack"] == stack
    assert result.meta["example_value"].shape == (3, SIZE)


@every_rule
def test_refusals_name_the_layer(rule: Callable[[], RewriteRule], model: type[Tables]) -> None:
    facts = traced(model())
    nodes = list(facts.module.graph.nodes)
    last = next(node for node in reversed(nodes) if node.target in (PERMUTE, STRUCTURED_LINEAR, operator.add))
    last.meta["nn_module_stack"] = {"key": ("L['self']._modules['blocks']._modules['0'].fc1", nn.Module)}
    with facts.module.graph.inserting_after(last):
        facts.module.graph.call_method("add_", (last.args[0], 1.0))
    if rule is FuseInputPermutation or rule is ComposePermutations or rule is FoldIntoNorm:
        with facts.module.graph.inserting_before(last):
            facts.module.graph.call_method("add_", (last.args[0], 1.0))
    report = rule().run(facts)
    refusal = next(r for r in report.refusals if r.node == last.name)
    assert (refusal.layer, refusal.rule) == ("blocks.0.fc1", rule.__name__)  # type: ignore[attr-defined]  # classes


def test_a_table_computed_from_the_input_moves_but_is_not_made_a_constant() -> None:
    class Sorting(Tables):
        def forward(self, x: Any) -> Any:
            return self.product(PERMUTE(PERMUTE(x, torch.argsort(x[0])), self.p)) * 2

    facts, x = traced(Sorting()), sample()
    expected = facts.module(x)
    Pipeline(kernels=None).run(facts)
    assert facts.module.graph.find_nodes(op="call_function", target=PERMUTE) == []
    assert torch.equal(facts.module(x), expected)
    assert not any(node.meta.get("padst_hoisted") for node in facts.module.graph.nodes)


def test_uuids_differ_between_rules_and_between_policies() -> None:
    uuids = [rule().uuid() for rule, _ in RULES] + [ChooseKernels(p).uuid() for p in ("measure", "sparse", "dense")]
    assert len(set(uuids)) == len(uuids)
    assert Pipeline(kernels="sparse").uuid() != Pipeline(kernels="dense").uuid()
    assert Pipeline(disabled=["AbsorbBias"]).uuid() != Pipeline().uuid()


def test_uuids_are_the_same_in_every_process() -> None:
    code = "from padst_compile.passes import Pipeline; print(Pipeline().uuid())"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert there.stdout.split()[-1] == Pipeline().uuid()
