"""Finding the dense linear layers of a graph, and making them sparse exactly as `padst.sparsify` does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import padst_compile as padst
from padst_compile import passes
from padst_compile.errors import MetaDeviceError, NothingToSparsifyError
from padst_compile.passes.context import Context
from padst_compile.passes.find_linears import find_linears
from padst_compile.passes.graph import STRUCTURED_LINEAR
from padst_compile.passes.sparsify_linears import SparsifyLinears

SPEC = padst.SparsitySpec(structure="block:4", sparsity=0.5, permutation="random")
STRUCTURES = ("block:4", "nm:1:4", "nm:2:4:4", "diagonal", "diagonal:4", "unstructured")


def whole(model: nn.Module) -> nn.Module:
    """The model in float64 with small whole numbers as parameters: sums and products are exact."""
    generator = torch.Generator().manual_seed(0)
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-4, 5, parameter.shape, generator=generator))
    return model.eval()


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 16), nn.Linear(16, 8, bias=False)])
        self.head = nn.Linear(8, 4)

    def forward(self, x: Any) -> Any:
        return self.head(F.relu(self.blocks[1](F.relu(self.blocks[0](x)))))


def by_symbolic_trace(model: nn.Module, x: torch.Tensor) -> fx.GraphModule:
    return fx.symbolic_trace(model)


def by_export(model: nn.Module, x: torch.Tensor) -> Any:
    return torch.export.export(model, (x,), strict=False).module()


def by_strict_export(model: nn.Module, x: torch.Tensor) -> Any:
    return torch.export.export(model, (x,), strict=True).module()


def by_decomposed_export(model: nn.Module, x: torch.Tensor) -> Any:
    return torch.export.export(model, (x,), strict=False).run_decompositions().module()


captures = pytest.mark.parametrize("capture", [by_symbolic_trace, by_export, by_strict_export, by_decomposed_export])


def sample(*shape: int) -> torch.Tensor:
    return torch.randint(-5, 6, shape, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("structure", STRUCTURES)
@captures
def test_the_result_is_what_sparsify_makes(capture: Callable[..., Any], structure: str, side: Any) -> None:
    sparsity = None if structure.startswith("nm") else 0.5
    spec = padst.SparsitySpec(structure=structure, sparsity=sparsity, permutation="random", permutation_side=side, seed=3)
    model, x = whole(Mlp()), sample(2, 3, 8)
    expected = padst.sparsify(copy.deepcopy(model), spec)(x)
    graph = capture(model, x)
    passes.run(graph, spec)
    assert len(graph.graph.find_nodes(op="call_function", target=STRUCTURED_LINEAR)) == 2
    assert torch.equal(graph(x), expected)


@pytest.mark.parametrize("capture", [by_export, by_decomposed_export])
def test_conv1d_of_transformers_is_found_by_its_transposed_weight(capture: Callable[..., Any]) -> None:
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model, x = whole(nn.Sequential(Conv1D(16, 8), nn.ReLU(), Conv1D(8, 16))), sample(2, 3, 8)
    expected = padst.sparsify(copy.deepcopy(model), SPEC)(x)
    graph = capture(model, x)
    passes.run(graph, SPEC)
    assert torch.equal(graph(x), expected)


def test_conv1d_is_found_by_symbolic_trace_too() -> None:
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model, x = whole(nn.Sequential(Conv1D(16, 8))), sample(2, 3, 8)
    expected = padst.sparsify(copy.deepcopy(model), SPEC)(x)
    graph = fx.GraphModule(model, _Through().trace(model))
    passes.run(graph, SPEC)
    assert torch.equal(graph(x), expected)


class _Through(fx.Tracer):
    """Traces into every module but nn.Linear."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Linear)


def test_dynamo_graphs_are_found_by_their_example_inputs() -> None:
    model, x = whole(Mlp()), sample(2, 3, 8)
    expected = padst.sparsify(copy.deepcopy(model), SPEC)(x)

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        passes.run(gm, SPEC, inputs)
        assert len(gm.graph.find_nodes(op="call_function", target=STRUCTURED_LINEAR)) == 2
        return gm

    assert torch.equal(torch.compile(model, backend=backend, fullgraph=True)(x), expected)


def test_a_single_linear_layer_is_a_model_too() -> None:
    model, x = whole(nn.Linear(8, 8)), sample(3, 8)
    expected = padst.sparsify(copy.deepcopy(model), SPEC)(x)
    graph = by_export(model, x)
    passes.run(graph, SPEC)
    assert torch.equal(graph(x), expected)


@pytest.mark.parametrize("capture", [by_symbolic_trace, by_export])
def test_a_layer_called_twice_becomes_one_sparse_layer(capture: Callable[..., Any]) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1 = nn.Linear(8, 8)

        def forward(self, x: Any) -> Any:
            return self.fc1(F.relu(self.fc1(x)))

    model, x = whole(Twice()), sample(3, 8)
    expected = padst.sparsify(copy.deepcopy(model), SPEC)(x)
    graph = capture(model, x)
    passes.run(graph, SPEC)
    assert torch.equal(graph(x), expected)
    assert len(list(padst.sparse_layers(graph))) == 1


@pytest.mark.parametrize("capture", [by_symbolic_trace, by_export])
def test_tied_layers_share_their_values(capture: Callable[..., Any]) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
            self.two.weight = self.one.weight

        def forward(self, x: Any) -> Any:
            return self.two(F.relu(self.one(x)))

    model, x = whole(Tied()), sample(3, 8)
    expected = padst.sparsify(copy.deepcopy(model), SPEC)(x)
    graph = capture(model, x)
    passes.run(graph, SPEC)
    assert torch.equal(graph(x), expected)
    assert len({id(layer.values) for _, layer in padst.sparse_layers(graph)}) == 1


class Language(nn.Module):
    """An embedding whose weight is also the output layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc1, self.out = nn.Embedding(16, 8), nn.Linear(8, 8), nn.Linear(8, 16, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: Any) -> Any:
        return self.out(self.fc1(self.embed(x)))


@pytest.mark.parametrize("capture", [by_symbolic_trace, by_export])
def test_a_weight_tied_to_an_embedding_stays_dense(capture: Callable[..., Any]) -> None:
    graph = capture(whole(Language()), torch.arange(4))
    report = passes.run(graph, SPEC)
    assert report.rules[0].rewritten == 1
    assert ["and making it sparse would untie them" in r.reason for r in report.rules[0].refusals] == [True]


def test_half_tied_layers_stay_dense() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.two.weight = self.one.weight

        def forward(self, x: Any) -> Any:
            return self.three(self.two(self.one(x)))

    graph = fx.symbolic_trace(whole(Half()))
    report = passes.run(graph, {"two": None, "*": SPEC})
    reasons = {r.layer: r.reason for r in report.rules[0].refusals}
    assert reasons == {"one": "its weight is shared with 'two', which stays dense", "two": "left dense by the specification"}


def test_a_layer_with_hooks_stays_dense() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    report = passes.run(fx.symbolic_trace(model), SPEC)
    assert [r.reason for r in report.rules[0].refusals] == ["it has hooks, which would be lost; remove them first"]


def test_a_model_of_embeddings_alone_is_refused() -> None:
    with pytest.raises(NothingToSparsifyError, match="no linear layer"):
        passes.run(fx.symbolic_trace(nn.Embedding(4, 8)), SPEC)


def test_meta_weights_are_refused() -> None:
    with pytest.raises(MetaDeviceError, match="materialise"):
        passes.run(fx.symbolic_trace(nn.Sequential(nn.Linear(8, 8, device="meta"))), SPEC)


def test_frozen_weights_stay_frozen() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].weight.requires_grad_(False)
    graph = fx.symbolic_trace(model)
    passes.run(graph, SPEC)
    assert {name.rsplit(".")[-1]: p.requires_grad for name, p in graph.named_parameters()} == {"values": False, "bias": True}


@pytest.mark.parametrize(
    ("call", "found"),
    [
        (lambda m, x: F.linear(x, m.weight, m.bias), 1),
        (lambda m, x: F.linear(input=x, weight=m.weight, bias=m.bias), 1),
        (lambda m, x: F.linear(x, m.weight), 1),
        (lambda m, x: torch.addmm(m.bias, x, m.weight), 1),
        (lambda m, x: torch.ops.aten.mm.default(x, torch.ops.aten.permute.default(m.weight, [1, 0])), 1),
        (lambda m, x: m.layer(input=x), 1),
        (lambda m, x: torch.addmm(m.bias, x, m.weight, beta=2), 0),
        (lambda m, x: F.linear(x, x), 0),
        (lambda m, x: F.linear(x, m.weight, x[0]), 0),
        (lambda m, x: F.linear(x, m.weight * 2), 0),
        (lambda m, x: F.linear(x, m.bias), 0),
    ],
)
def test_what_counts_as_a_linear_layer(call: Callable[[Any, Any], Any], found: int) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)
            self.weight, self.bias = nn.Parameter(torch.ones(8, 8)), nn.Parameter(torch.ones(8))

        def forward(self, x: Any) -> Any:
            return call(self, x)

    assert len(find_linears(Context(fx.symbolic_trace(Model()), {}, inference=False))) == found


def test_meta_of_the_graph_follows_the_new_nodes() -> None:
    graph = by_export(whole(Mlp()), sample(2, 3, 8))
    facts = Context(graph, {}, inference=False)
    SparsifyLinears(SPEC, facts).run(facts)
    graph.graph.lint()
    shapes = [tuple(n.meta["val"].shape) for n in graph.graph.find_nodes(op="call_function", target=STRUCTURED_LINEAR)]
    assert shapes == [(2, 3, 16), (2, 3, 8)]
