"""native_linear(x, S, b).chunk(2)  ==  native_linear(x, S[:h], b[:h]), native_linear(x, S[h:], b[h:])"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import padst_compile as padst
from padst_compile import permutation
from padst_compile.backend import padst as backend
from padst_compile.kernels import native
from padst_compile.layers import PermutedSparseLinear
from padst_compile.passes.absorb_bias import AbsorbBias
from padst_compile.passes.base import RuleReport
from padst_compile.passes.choose_kernels import ChooseKernels
from padst_compile.passes.fuse_activation import FuseActivation
from padst_compile.passes.fuse_gate import FuseGate
from padst_compile.passes.fuse_output_permutation import FuseOutputPermutation
from padst_compile.passes.native_calls import epilogue, is_native_linear
from padst_compile.passes.split_gates import SplitGates
from padst_compile.testing.capture import capture

pytestmark = pytest.mark.skipif(not native.load(), reason=f"no native kernels: {native.unavailable_reason()}")

INPUTS, HALF = 12, 16
BLOCKS = pytest.param(
    "block:4", marks=pytest.mark.skipif(not native.supports("block", torch.float32), reason="no kernel for blocks here")
)
Function = Callable[[Any, torch.Tensor], Any]


class Gated(nn.Module):
    """What `function` makes of a sparse layer's outputs and of this module."""

    def __init__(self, function: Function, structure: str = "nm:1:4", side: Any = "input", **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        spec = padst.SparsitySpec(
            structure, 0.5 if "nm" not in structure else None, permutation="random", permutation_side=side
        )
        outputs = options.pop("outputs", 2 * HALF)
        (self.proj,) = padst.sparsify(nn.Sequential(nn.Linear(INPUTS, outputs, **options)).eval(), spec)
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, self.proj(x))


def within_halves() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.cat([offset + permutation.random(HALF, generator) for offset in (0, HALF)])


def geglu(_: Any, y: torch.Tensor) -> torch.Tensor:
    a, b = y.chunk(2, dim=-1)
    return a * F.gelu(b)


def swiglu(_: Any, y: torch.Tensor) -> torch.Tensor:
    a, b = torch.split(y, HALF, -1)
    return F.silu(a) * b


def sizes_given(_: Any, y: torch.Tensor) -> torch.Tensor:
    a, b = y.split([HALF, HALF], dim=-1)
    return b * a


def unknown_function(_: Any, y: torch.Tensor) -> torch.Tensor:
    a, b = torch.chunk(y, 2, -1)
    return a * torch.sigmoid(b)


def split(model: nn.Module, *shape: int) -> tuple[RuleReport, list[tuple[str, ...]]]:
    """What the pass reports, and what the native calls do once gates are fused; fails if anything is computed otherwise."""
    with torch.no_grad():
        before = capture(model, torch.randn(*(shape or (2, 35, INPUTS))))
        facts = before.context(inference=True)
        for before_it in (FuseOutputPermutation(), AbsorbBias(), ChooseKernels("sparse")):
            before_it.run(facts)
        report = SplitGates().run(facts)
        assert SplitGates().run(facts).rewritten == 0
        for behind_it in (FuseActivation(), FuseGate()):
            behind_it.run(facts)
        facts.module.graph.lint()
        facts.module.recompile()
        assert padst.verify(before.graph, facts.module, *before.inputs)
        for found, expected in zip(facts.module(*before.inputs), before.graph(*before.inputs), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    return report, [epilogue(node) for node in facts.module.graph.nodes if is_native_linear(node)]


@pytest.mark.parametrize(
    ("function", "calls"),
    [
        (geglu, [(), ("activation", "gate")]),
        (swiglu, [("activation",), ("gate",)]),
        (sizes_given, [(), ("gate",)]),
        (unknown_function, [(), ("gate",)]),
    ],
)
@pytest.mark.parametrize("structure", ["nm:1:4", "nm:2:3:8", BLOCKS])
def test_each_half_is_a_product_and_one_applies_the_other(function: Function, calls: Any, structure: str) -> None:
    report, found = split(Gated(function, structure))
    assert (report.rewritten, report.refusals) == (1, [])
    assert sorted(found) == sorted(calls)


@pytest.mark.parametrize("structure", ["nm:1:4:16", BLOCKS])
def test_outputs_that_are_reordered_within_each_half(structure: str) -> None:
    model = Gated(geglu, structure, "output")
    model.proj.permutation.copy_(within_halves())
    report, found = split(model, 67, INPUTS)
    assert (report.rewritten, len(found)) == (1, 2)


@pytest.mark.parametrize("first_half", [True, False])
def test_a_half_without_any_block(first_half: bool) -> None:
    if not native.supports("block", torch.float32):
        pytest.skip("no kernel for blocks here")
    model = Gated(geglu, "block:4")
    layer = model.proj
    assert isinstance(layer, PermutedSparseLinear)
    active = torch.zeros(8, 3, dtype=torch.bool)
    active[(slice(0, 4) if first_half else slice(4, 8))] = True
    for tensor, new in zip(layer.topology, padst.Block(4).topology_of(active.reshape(1, -1), layer.config.shape), strict=True):
        tensor.copy_(new)
    report, _ = split(model)
    assert report.rewritten == 1


def other_reader(_: Any, y: torch.Tensor) -> torch.Tensor:
    return geglu(_, y) + y.sum()


def two_of_three(_: Any, y: torch.Tensor) -> torch.Tensor:
    a, b, _ = y.chunk(3, dim=-1)
    return a * b


def in_thirds(_: Any, y: torch.Tensor) -> torch.Tensor:
    a, b, c = y.chunk(3, dim=-1)
    return a * b * c


def unevenly(_: Any, y: torch.Tensor) -> torch.Tensor:
    a, b = y.split([4, 2 * HALF - 4], dim=-1)
    return a * b[..., :4]


def tokens_divided(_: Any, y: torch.Tensor) -> torch.Tensor:
    a, b = y.chunk(2, dim=0)
    return a * b


def added(_: Any, y: torch.Tensor) -> torch.Tensor:
    a, b = y.chunk(2, dim=-1)
    return F.gelu(a) + b


def squared(_: Any, y: torch.Tensor) -> torch.Tensor:
    a, b = y.chunk(2, dim=-1)
    return a * a + b


def scaled(_: Any, y: torch.Tensor) -> torch.Tensor:
    a, b = y.chunk(2, dim=-1)
    return a * 2 + b * b[0]


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: Gated(other_reader), "2 readers"),
        (lambda: Gated(two_of_three, outputs=36), "not divided in the middle"),
        (lambda: Gated(unevenly), "not divided in the middle"),
        (lambda: Gated(tokens_divided), "not divided in the middle"),
        (lambda: Gated(added), "multiplied by another tensor right away"),
        (lambda: Gated(squared), "multiplied by another tensor right away"),
        (lambda: Gated(scaled), "multiplied by another tensor right away"),
        (lambda: Gated(geglu, "nm:1:4:32"), "32 outputs that belong together lie in both halves"),
        (lambda: Gated(geglu, "nm:1:4:4", outputs=36), "4 outputs that belong together lie in both halves"),
        (lambda: Gated(geglu, "diagonal"), "diagonals run through both halves"),
        (lambda: Gated(geglu, side="output"), "the order of its outputs mixes the halves"),
    ],
)
def test_what_has_no_two_halves_is_refused(model: Callable[[], nn.Module], reason: str) -> None:
    report, calls = split(model(), 2, 35, INPUTS)
    assert report.rewritten == 0
    assert reason in report.refusals[0].reason
    assert len(calls) == 1


def test_few_tokens_are_left_to_one_kernel() -> None:
    (kept, calls), (cut, _) = split(Gated(geglu), 63, INPUTS), split(Gated(geglu), 64, INPUTS)
    assert kept.refusals[0].reason == "two kernels cost more than they save with fewer than 64 tokens"
    assert (len(calls), cut.rewritten) == (1, 1)


@pytest.mark.parametrize("function", [in_thirds, lambda m, y: y.chunk(2, -1)[1] * 2, lambda m, y: y * F.gelu(y)])
def test_other_expressions_do_not_match(function: Function) -> None:
    report, _ = split(Gated(function, outputs=36 if function is in_thirds else 2 * HALF))
    assert (report.rewritten, report.refusals) == (0, [])


@pytest.mark.parametrize("policy", ["dense", "measure"])
def test_dense_and_trained_layers_stay_whole(policy: Any) -> None:
    torch.manual_seed(0)
    with torch.set_grad_enabled(policy == "measure"):
        before = capture(Gated(geglu), torch.randn(70, INPUTS))
        facts = before.context(inference=policy == "dense")
        ChooseKernels(policy, "off").run(facts)
        report = SplitGates().run(facts)
    assert (report.rewritten, report.refusals) == (0, [])


@pytest.mark.parametrize("change", ["values", "permutation", "topology", "order"])
def test_changed_tensors_are_noticed(change: str) -> None:
    if not native.supports("block", torch.float32):
        pytest.skip("no kernel for blocks here")
    model, x = Gated(swiglu, "block:4", "output" if change == "order" else "input"), torch.randn(70, INPUTS)
    layer = model.proj
    assert isinstance(layer, PermutedSparseLinear)
    if change == "order":
        layer.permutation.copy_(within_halves())
    compiled = torch.compile(model, backend=backend, options={"kernels": "sparse"})
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
        match change:
            case "values":
                layer.values.mul_(-2)
            case "topology":  # as many blocks, most of them in the second half
                active = torch.zeros(24, dtype=torch.bool)
                active[-layer.values.shape[0] :] = True
                for tensor, new in zip(
                    layer.topology, padst.Block(4).topology_of(active[None], layer.config.shape), strict=True
                ):
                    tensor.copy_(new)
            case _:
                layer.permutation.copy_(layer.permutation.roll(1))
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)


def glu_mlp() -> nn.Module:
    layers = pytest.importorskip("timm.layers")
    mlp: nn.Module = layers.GluMlp(32, 64, act_layer=nn.GELU)
    return mlp


def phi3_mlp() -> nn.Module:
    phi3 = pytest.importorskip("transformers.models.phi3.modeling_phi3")
    mlp: nn.Module = phi3.Phi3MLP(phi3.Phi3Config(hidden_size=32, intermediate_size=48, vocab_size=32, pad_token_id=0))
    return mlp


@pytest.mark.parametrize("structure", ["nm:1:4", BLOCKS])
@pytest.mark.parametrize(("make", "name"), [(glu_mlp, "fc1"), (phi3_mlp, "gate_up_proj")])
def test_the_gated_mlps_of_timm_and_transformers_are_three_kernels(
    make: Callable[[], nn.Module], name: str, structure: str
) -> None:
    torch.manual_seed(0)
    sparsity = None if "nm" in structure else 0.5
    model = padst.sparsify(make().eval(), padst.SparsitySpec(structure, sparsity, permutation="random"))
    x = torch.randn(2, 35, 32)
    with torch.no_grad():
        (layer,) = [known for known in padst.explain(model, x, options={"kernels": "sparse"}).layers if known.name == name]
        compiled = torch.compile(model, backend=backend, options={"kernels": "sparse", "verify": True}, fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    assert {"activation", "gate"} <= set(layer.fused)
    assert layer.reason.endswith("one product for each half of its outputs")
