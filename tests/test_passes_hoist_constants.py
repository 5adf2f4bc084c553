"""What depends on parameters alone is computed once, outside the main graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from padst_compile.passes.context import HOISTED, Context
from padst_compile.passes.graph import PERMUTE
from padst_compile.passes.hoist_constants import evaluate, hoist_constants

aten = torch.ops.aten


def ordered_weight(x: Any, weight: Any, p: Any, q: Any) -> Any:
    table = aten.index_select.default(p, 0, q)
    return x @ aten.index_select.default(weight, 0, table)


def facts_of(function: Any, **inputs: torch.Tensor) -> Context:
    facts = Context(fx.symbolic_trace(function), inputs, inference=True)
    for node in facts.module.graph.find_nodes(op="call_function", target=aten.index_select.default):
        facts.hoist(node)
    return facts


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randperm(5, generator=generator) for _ in "pq")
    return {"weight": nn.Parameter(torch.arange(15.0).reshape(5, 3)), "p": p, "q": q}


def test_the_split_computes_the_same() -> None:
    inputs, x = tensors(), torch.arange(10.0).reshape(2, 5)
    split = hoist_constants(facts_of(ordered_weight, **inputs))
    args = [x, *inputs.values()]
    constants = evaluate(split.prepare, [args[i] for i in split.sources])
    assert torch.equal(split.main(*args, *constants), ordered_weight(*args))
    split.main.graph.lint()
    split.prepare.graph.lint()


def test_only_what_the_main_graph_reads_becomes_a_constant() -> None:
    split = hoist_constants(facts_of(ordered_weight, **tensors()))
    assert [node.name for node in split.main.graph.find_nodes(op="placeholder")][4:] == ["padst_constant_0"]
    assert split.main.graph.find_nodes(op="call_function", target=aten.index_select.default) == []
    assert sorted(split.sources) == [1, 2, 3]
    assert split.attributes == ()


def test_what_depends_on_an_input_stays() -> None:
    facts = facts_of(lambda x, p: aten.index_select.default(x, 0, p), p=torch.arange(3))
    assert not any(node.meta.get(HOISTED) for node in facts.module.graph.nodes)
    split = hoist_constants(facts)
    assert (split.sources, evaluate(split.prepare, [])) == ((), [])


def test_a_graph_without_inputs_holds_its_tensors_as_attributes() -> None:
    class Closed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.arange(3.0))
            self.register_buffer("table", torch.tensor([2, 0, 1]))

        def forward(self) -> Any:
            return aten.index_select.default(self.weight, 0, self.table) + 1

    model = Closed()
    split = hoist_constants(facts_of(model))
    assert {id(tensor) for tensor in split.attributes} == {id(model.weight), id(model.table)}
    assert torch.equal(split.main(*evaluate(split.prepare, [])), model())


def test_constants_are_tensors_of_their_own_without_gradients() -> None:
    inputs = tensors()
    split = hoist_constants(facts_of(ordered_weight, **inputs))
    with torch.inference_mode():
        (constant,) = evaluate(split.prepare, [list(inputs.values())[i - 1] for i in split.sources])
    assert not constant.requires_grad
    assert not constant.is_inference()
    assert constant.is_contiguous()


def test_assumed_values_can_be_computed_again() -> None:
    def function(x: Any, p: Any, q: Any) -> Any:
        return PERMUTE(x, aten.index_select.default(p, 0, q)) + 1

    p = torch.tensor([1, 2, 0])
    facts = facts_of(function, p=p, q=p.argsort())
    (table,) = facts.module.graph.find_nodes(op="call_function", target=aten.index_select.default)
    facts.assume(table)
    split = hoist_constants(facts)
    args = [torch.zeros(3), p, p.argsort()]
    (value,) = evaluate(split.relied_on, [args[i] for i in split.relied_sources])
    assert torch.equal(value, split.expected[0])
    assert torch.equal(value, torch.arange(3))
