"""linear(x, diagonals, in=p, out=q)  ==  linear(x, blocks, in=p[s], out=t[q])"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import fx, nn

import padst_compile as padst
from padst_compile.backend import padst as backend
from padst_compile.kernels import dispatch, native
from padst_compile.passes.context import Context
from padst_compile.passes.fold_diagonals import FoldDiagonals
from padst_compile.passes.graph import STRUCTURED_LINEAR, argument
from padst_compile.structures import Diagonal, parse

needs_native = pytest.mark.skipif(not native.load(), reason=f"no native kernels: {native.unavailable_reason()}")


class Product(nn.Module):
    """One product of diagonals, whole numbers, with tables of its own where asked for."""

    def __init__(self, structure: str, sizes: tuple[int, int], *, into: bool = False, out: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        parsed = parse(structure)
        weight = torch.randint(-4, 5, sizes, generator=generator).float()
        topology = parsed.choose(weight.abs(), 0.5)
        self.structure, self.sizes = structure, sizes
        self.values = nn.Parameter(parsed.pack(weight, topology))
        self.register_buffer("offsets", topology[0])
        self.bias = nn.Parameter(torch.arange(sizes[0]).float())
        self.register_buffer("p", torch.randperm(sizes[1], generator=generator).int() if into else None)
        self.register_buffer("q", torch.randperm(sizes[0], generator=generator).int() if out else None)

    def forward(self, x: Any) -> Any:
        return STRUCTURED_LINEAR(x, self.values, [self.offsets], self.bias, self.p, self.q, self.sizes[0], self.structure)

    def facts(self, *, inference: bool = True, shapes: bool = True) -> Context:
        facts = Context(fx.symbolic_trace(self), {}, inference)
        for node in facts.module.graph.nodes:
            if shapes and node.op == "placeholder":
                node.meta["example_value"] = torch.empty(3, self.sizes[1])
            if shapes and node.target is STRUCTURED_LINEAR:
                node.meta["example_value"] = torch.empty(3, self.sizes[0])
        return facts

    def sample(self) -> torch.Tensor:
        return torch.randint(-5, 6, (3, self.sizes[1]), generator=torch.Generator().manual_seed(1)).float()


@needs_native
@pytest.mark.parametrize(("into", "out"), list(itertools.product((False, True), repeat=2)))
@pytest.mark.parametrize("sizes", [(64, 64), (32, 96), (96, 32)], ids=str)
def test_the_function_is_the_same(sizes: tuple[int, int], into: bool, out: bool) -> None:
    model = Product("diagonal:16", sizes, into=into, out=out)
    facts, rule = model.facts(), FoldDiagonals()
    assert rule.run(facts).rewritten == 1
    facts.module.graph.lint()
    facts.module.recompile()
    assert torch.equal(facts.module(model.sample()), model(model.sample()))
    (product,) = facts.module.graph.find_nodes(op="call_function", target=STRUCTURED_LINEAR)
    assert parse(argument(product, "structure")).kind == "block"
    made = [node for node in product.all_input_nodes if node.op == "call_function"]
    assert made
    assert all(map(facts.is_static, made))  # computed once, before any input is known
    assert FoldDiagonals().run(facts).rewritten == 0


@needs_native
def test_new_weights_and_offsets_are_followed() -> None:
    model = Product("diagonal:16", (64, 64))
    facts = model.facts()
    FoldDiagonals().run(facts)
    facts.module.recompile()
    with torch.no_grad():
        model.values.add_(1)
        others = [offset for offset in range(64) if offset not in model.offsets.tolist()]
        model.offsets.copy_(torch.tensor(others))
    assert torch.equal(facts.module(model.sample()), model(model.sample()))


def refusals(facts: Context) -> list[str]:
    report = FoldDiagonals().run(facts)
    assert report.rewritten == 0
    return [refusal.reason for refusal in report.refusals]


def test_only_in_inference() -> None:
    assert refusals(Product("diagonal:16", (64, 64)).facts(inference=False)) == ["training: each call folds them by itself"]


def test_without_shapes_nothing_is_folded() -> None:
    assert refusals(Product("diagonal:16", (64, 64)).facts(shapes=False)) == ["capture recorded no shapes"]


def test_small_blocks_stay_diagonals() -> None:
    assert refusals(Product("diagonal:4", (64, 32)).facts()) == ["no kernel is faster with block:8x4"]


def test_without_a_kernel_for_blocks_diagonals_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "has_native_kernel", lambda structure, device, dtype: structure.kind == "diagonal")
    assert refusals(Product("diagonal:16", (64, 64)).facts()) == ["no kernel is faster with block:16x16"]


def test_weights_computed_from_the_inputs_are_left_alone() -> None:
    class Computed(Product):
        def forward(self, x: Any) -> Any:
            return STRUCTURED_LINEAR(x, x.sum() * self.values, [self.offsets], None, None, None, 64, self.structure)

    assert refusals(Computed("diagonal:16", (64, 64)).facts()) == ["the weights are computed from the inputs"]


def test_free_diagonals_do_not_match() -> None:
    assert refusals(Product("diagonal", (64, 64)).facts()) == []


def two_layers(permutation: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 96), nn.GELU(), nn.Linear(96, 32)).eval()
    padst.sparsify(model, padst.SparsitySpec(structure=Diagonal(16), sparsity=0.5, permutation=permutation))
    return model


@needs_native
def test_tables_between_two_layers_cancel() -> None:
    """768 -> 3072 -> 768 in small: no table is left over the hidden features."""
    with torch.no_grad():
        explanation = padst.explain(two_layers("none"), torch.randn(5, 32), options={"kernels": "sparse"})
    first, second = explanation.layers
    assert first.structure == "diagonal:16 as block:48x16"
    assert second.structure == "diagonal:16 as block:16x48"
    assert "output_permutation" not in first.fused
    assert "input_permutation" not in second.fused


@needs_native
@pytest.mark.parametrize("permutation", ["none", "random"])
def test_compiled_layers_give_the_same(permutation: str) -> None:
    model, x = two_layers(permutation), torch.randn(5, 32)
    with torch.no_grad():
        compiled = torch.compile(model, backend=backend, options={"kernels": "sparse", "verify": True})
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
        model[3].values.mul_(2)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)


@needs_native
def test_permutations_that_the_model_has_are_accounted_for() -> None:
    with torch.no_grad():
        explanation = padst.explain(two_layers("random"), torch.randn(5, 32), options={"kernels": "sparse"})
    assert explanation.permutations.total == 2
    assert {fate.layer for fate in explanation.fates} == {"1", "3"}
    assert {fate.outcome for fate in explanation.fates} == {"read by the kernel", "written by the kernel"}
