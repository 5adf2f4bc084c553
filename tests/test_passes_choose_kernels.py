"""structured_linear(x, S, …)  ==  native kernel of S   or   F.linear(x, dense(S), b)"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from padst_compile.autotune import search
from padst_compile.equivalence import verify
from padst_compile.kernels import dispatch
from padst_compile.kernels.launch import Tile
from padst_compile.passes.choose_kernels import ChooseKernels
from padst_compile.passes.context import Context
from padst_compile.passes.graph import STRUCTURED_LINEAR, TO_DENSE
from padst_compile.structures import Structure, parse

OUT, IN = 32, 64
STRUCTURES = ("block:16", "nm:1:4", "nm:2:4:4", "diagonal", "diagonal:8", "unstructured")


class Product(nn.Module):
    """One structured product with bias and both tables."""

    def __init__(self, structure: str, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        parsed: Structure = parse(structure)
        weight = torch.randint(-3, 4, (OUT, IN), generator=generator).to(dtype)
        topology = parsed.choose(weight.abs(), parsed.natural_sparsity() or 0.5)
        self.structure, self.count = parsed.to_string(), len(topology)
        self.values = nn.Parameter(parsed.pack(weight, topology))
        for number, index in enumerate(topology):
            self.register_buffer(f"index{number}", index)
        self.bias = nn.Parameter(torch.arange(OUT).to(dtype))
        self.register_buffer("p", torch.randperm(IN, generator=generator).int())
        self.register_buffer("q", torch.randperm(OUT, generator=generator).int())

    def forward(self, x: Any) -> Any:
        topology = [getattr(self, f"index{number}") for number in range(self.count)]
        return STRUCTURED_LINEAR(x, self.values, topology, self.bias, self.p, self.q, OUT, self.structure)


def facts_of(model: Product, *, inference: bool = True, shapes: bool = True) -> Context:
    facts = Context(fx.symbolic_trace(model), {}, inference)
    for node in facts.module.graph.nodes:
        if shapes and node.op == "placeholder":
            node.meta["example_value"] = torch.empty(3, IN, dtype=model.values.dtype)
        if shapes and node.target is STRUCTURED_LINEAR:
            node.meta["example_value"] = torch.empty(3, OUT, dtype=model.values.dtype)
    return facts


def sample(dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(-5, 6, (3, IN), generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # whole numbers below 2 ** 24 are exact in both
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("policy", ["sparse", "dense", "measure"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_function_is_the_same(structure: str, policy: Any, inference: bool, dtype: torch.dtype) -> None:
    model = Product(structure, dtype)
    facts = facts_of(model, inference=inference)
    rule = ChooseKernels(policy)
    assert rule.run(facts).rewritten == 1
    facts.module.graph.lint()
    facts.module.recompile()
    assert torch.equal(facts.module(sample(dtype)), model(sample(dtype)))
    (decision,) = rule.decisions
    assert (decision.tokens, decision.shape.out_features, decision.dtype) == (4, OUT, str(dtype).removeprefix("torch."))
    assert decision.fused == ("bias", "input_permutation", "output_permutation")
    assert decision.active == int(model.values.count_nonzero()) or decision.active <= OUT * IN // 2 + OUT


@pytest.mark.parametrize("inference", [False, True])
def test_dense_is_a_plain_product_with_a_weight_made_once(inference: bool) -> None:
    facts = facts_of(Product("block:16", torch.float64), inference=inference)
    rule = ChooseKernels("dense")
    rule.run(facts)
    (dense,) = facts.module.graph.find_nodes(op="call_function", target=F.linear)
    (weight,) = facts.module.graph.find_nodes(op="call_function", target=TO_DENSE)
    assert facts.is_static(weight)
    assert facts.is_static(dense.args[1])
    assert rule.decisions[0].choice.reason == "asked for by options={'kernels': 'dense'}"
    assert ChooseKernels("dense").run(facts).rewritten == 0


@pytest.mark.parametrize("structure", ["block:16", "nm:1:4", "diagonal"])
def test_sparse_calls_the_native_kernel_in_inference_alone(structure: str) -> None:
    model = Product(structure, torch.float32)
    has_native = dispatch.has_native_kernel(parse(structure), torch.device("cpu"), torch.float32)
    for inference in (False, True):
        facts = facts_of(model, inference=inference)
        rule = ChooseKernels("sparse")
        rule.run(facts)
        remaining = len(facts.module.graph.find_nodes(op="call_function", target=STRUCTURED_LINEAR))
        assert remaining == (0 if inference and has_native else 1)
        assert rule.decisions[0].choice.kernel == ("native" if has_native else "aten")


@pytest.mark.parametrize("policy", ["sparse", "dense", "measure"])
def test_unstructured_layers_are_dense_whatever_is_asked(policy: Any) -> None:
    rule = ChooseKernels(policy)
    rule.run(facts_of(Product("unstructured", torch.float32)))
    assert rule.decisions[0].choice.kernel == "dense"
    assert "accuracy baseline" in rule.decisions[0].choice.reason


@pytest.mark.parametrize(("sparse", "kernel"), [(1.0, "sparse"), (4.0, "dense")])
def test_measuring_takes_the_faster_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sparse: float, kernel: str) -> None:
    monkeypatch.setenv("PADST_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(
        search, "raced_seconds", lambda runs, device, budget: {c: 2.0 if c.kernel == "dense" else sparse for c in runs}
    )
    monkeypatch.setattr(dispatch, "has_native_kernel", lambda structure, device, dtype: False)
    rule = ChooseKernels("measure")
    rule.run(facts_of(Product("block:16", torch.float32)))
    assert rule.decisions[0].choice.kernel == {"sparse": "aten", "dense": "dense"}[kernel]


def test_without_shapes_nothing_is_chosen() -> None:
    report = ChooseKernels().run(facts_of(Product("block:16", torch.float32), shapes=False))
    assert [r.reason for r in report.refusals] == ["capture recorded no shapes"]


def test_weights_computed_from_the_inputs_are_left_alone() -> None:
    class Computed(Product):
        def forward(self, x: Any) -> Any:
            return STRUCTURED_LINEAR(
                x, x.sum() * self.values, [self.index0, self.index1], None, None, None, OUT, self.structure
            )

    report = ChooseKernels("dense").run(facts_of(Computed("block:16", torch.float32)))
    assert [r.reason for r in report.refusals] == ["the weights are computed from the inputs"]


@pytest.mark.parametrize(("tokens", "argument"), [(0, {}), (16, {"token_tile": 16})])
def test_the_best_token_tile_becomes_an_argument_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokens: int, argument: dict[str, int]
) -> None:
    if not dispatch.has_native_kernel(parse("block:16"), torch.device("cpu"), torch.float32):
        pytest.skip("needs the native block kernel")
    monkeypatch.setenv("PADST_CACHE_DIR", str(tmp_path))
    wanted = Tile(tokens, 0, 0) if tokens else None
    monkeypatch.setattr(
        search, "raced_seconds", lambda runs, device, budget: {c: 1.0 if c.tile == wanted else 2.0 for c in runs}
    )
    model = Product("block:16", torch.float32)
    facts = facts_of(model)
    rule = ChooseKernels("measure", "full")
    rule.run(facts)
    facts.module.recompile()
    (native,) = (node for node in facts.module.graph.nodes if node.target is torch.ops.padst_native.block_linear.default)
    assert native.kwargs == argument
    assert rule.decisions[0].choice.tile == wanted
    assert verify(model, facts.module, sample(torch.float32)).equal
    assert torch.equal(facts.module(sample(torch.float32)), model(sample(torch.float32)))
