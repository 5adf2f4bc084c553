"""Small questions about FX nodes."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from padst_compile.passes.context import Context
from padst_compile.passes.graph import (
    PERMUTE,
    STRUCTURED_LINEAR,
    argument,
    clean_name,
    layer_name,
    mutates,
    obstacle_between,
    set_arguments,
    switches_mode,
    written_inputs,
)

aten = torch.ops.aten


def last_call(function: Callable[..., Any]) -> fx.Node:
    graph = fx.symbolic_trace(function).graph
    return [node for node in graph.nodes if node.op.startswith("call")][-1]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("L['self'].fc1", "fc1"),
        ("L['self']._modules['blocks']._modules['0']._modules['mlp']", "blocks.0.mlp"),
        ("L['self']._modules['blocks']._modules['0']._parameters['weight']", "blocks.0.weight"),
        ("L['self'].blocks[0].fc1.weight", "blocks.0.fc1.weight"),
        ("G['model'].fc1", "fc1"),
        ("_orig_mod.fc1", "fc1"),
        ("blocks.0.fc1", "blocks.0.fc1"),
        ("L['self']", ""),
    ],
)
def test_dynamo_sources_become_module_names(path: str, name: str) -> None:
    assert clean_name(path) == name


def test_a_node_is_named_after_the_innermost_module_else_itself() -> None:
    node = last_call(lambda x: x + 1)
    assert layer_name(node) == "add"
    node.meta["nn_module_stack"] = {"a": ("L['self']", nn.Module), "b": ("L['self'].fc1", nn.Linear)}
    assert layer_name(node) == "fc1"


def test_arguments_are_found_by_name_wherever_they_are_given() -> None:
    node = last_call(lambda x, p: PERMUTE(x, indices=p))
    assert (str(argument(node, "x")), str(argument(node, "indices"))) == ("x", "p")
    with pytest.raises(KeyError, match="no argument 'axis'"):
        argument(node, "axis")


def test_missing_arguments_have_their_default() -> None:
    assert argument(last_call(lambda x, y: aten.add.Tensor(x, y)), "alpha") == 1  # noqa: PLW0108  # only Python functions can be traced


def test_set_arguments_keeps_the_others() -> None:
    node = last_call(lambda x, v, p: STRUCTURED_LINEAR(x, v, [p], None, None, None, out_features=8, structure="diagonal"))
    set_arguments(node, bias=node.args[1])
    assert (node.kwargs, node.args[3], node.args[6:]) == ({}, node.args[1], (8, "diagonal"))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x.add_(1),
        lambda x: torch.relu_(x),  # noqa: PLW0108  # only Python functions can be traced
        lambda x: F.relu(x, True),
        lambda x: F.relu(x, inplace=True),
        lambda x: F.leaky_relu(x, 0.1, True),
        lambda x: F.mish(x, inplace=True),
        lambda x: F.threshold(x, 0.1, 20, True),
        lambda x: F.dropout(x, 0.1, True, True),
        lambda x: torch.add(x, 1, out=x),
        lambda x: aten.add_.Tensor(x, 1),
        lambda x: aten.add_(x, 1),
        lambda x: nn.init.zeros_(x),  # noqa: PLW0108  # only Python functions can be traced
    ],
)
def test_calls_that_write(call: Callable[[Any], Any]) -> None:
    assert mutates(last_call(call))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x.add(1),
        lambda x: x.__add__(1),
        lambda x: x + 1,
        lambda x: ~x,
        lambda x: F.relu(x),  # noqa: PLW0108  # only Python functions can be traced
        lambda x: F.relu(x, False),
        lambda x: F.dropout(x, 0.1, True),
        lambda x: torch.add(x, 1, out=None),
        lambda x: aten.add.Tensor(x, 1),
    ],
)
def test_calls_that_do_not_write(call: Callable[[Any], Any]) -> None:
    assert not mutates(last_call(call))


@pytest.mark.parametrize(
    ("function", "writes"),
    [(operator.iadd, True), (operator.imul, True), (operator.setitem, True), (operator.add, False), (operator.index, False)],
)
def test_operators_that_write(function: Callable[..., Any], writes: bool) -> None:
    graph = fx.Graph()
    assert mutates(graph.call_function(function, (graph.placeholder("x"), 1))) is writes


@pytest.mark.parametrize("inplace", [False, True])
def test_modules_write_if_they_say_so(inplace: bool) -> None:
    assert mutates(last_call(nn.Sequential(nn.ReLU(inplace)))) is inplace


def test_switches_of_autograd_and_autocast_are_seen() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    switch = graph.call_function(torch._C._set_grad_enabled, (False,))
    y = graph.call_function(torch.neg, (x,))
    assert (switches_mode(switch), switches_mode(y)) == (True, False)
    assert obstacle_between(x, y) == f"{switch.name} switches autograd or autocast"
    assert obstacle_between(switch, y) is None


class Holder(nn.Module):
    def __init__(self, body: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.body = body
        self.weight = nn.Parameter(torch.ones(4, 4))
        self.register_buffer("count", torch.zeros(4))

    def forward(self, x: Any) -> Any:
        return self.body(self, x)


@pytest.mark.parametrize(
    ("body", "written"),
    [
        (lambda m, x: x + m.weight, set()),
        (lambda m, x: aten.add_.Tensor(m.count, x) + m.weight, {"count"}),
        (lambda m, x: m.weight.view(-1).add_(1) + x, {"weight"}),
        (lambda m, x: aten.mul_.Tensor(aten.t.default(m.weight), 2) + x, {"weight"}),
        (lambda m, x: m.weight[0].add_(1) + x, {"weight"}),
        (lambda m, x: (x + m.weight).add_(m.count), set()),
        (lambda m, x: torch.add(x, 1, out=m.count), {"x", "count"}),
        (lambda m, x: torch._foreach_add_([m.weight, m.count], 1.0), {"weight", "count"}),
    ],
)
def test_inputs_that_a_graph_writes(body: Callable[[Any, Any], Any], written: set[str]) -> None:
    module = fx.symbolic_trace(Holder(body))
    assert {str(node.target) for node in written_inputs(module.graph)} == written
    facts = Context(module, {}, inference=True)
    for node in module.graph.find_nodes(op="get_attr"):
        assert facts.is_static(node) is (node.target not in written)
