"""block_linear(block_linear(x, S, activation), T, residual)  ==  block_mlp(x, S, T, activation, residual)"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import padst_compile as padst
from padst_compile.autotune import lookup, search
from padst_compile.autotune.effort import Effort
from padst_compile.autotune.space import Candidate
from padst_compile.kernels import native
from padst_compile.passes.absorb_bias import AbsorbBias
from padst_compile.passes.choose_kernels import ChooseKernels, Policy
from padst_compile.passes.context import Context
from padst_compile.passes.fuse_activation import FuseActivation
from padst_compile.passes.fuse_input_permutation import FuseInputPermutation
from padst_compile.passes.fuse_mlp import FuseMlp
from padst_compile.passes.fuse_output_permutation import FuseOutputPermutation
from padst_compile.passes.fuse_residual import FuseResidual
from padst_compile.passes.graph import argument
from padst_compile.passes.interleave_blocks import InterleaveBlocks
from padst_compile.spec import PermutationSide
from padst_compile.testing.capture import capture

pytestmark = pytest.mark.skipif(
    not (native.load() and native.supports("block", torch.float32)), reason="no native kernel for blocks here"
)

Meet = Callable[[Any, torch.Tensor], torch.Tensor]


class Mlp(nn.Module):
    """Two layers that meet as `meet` says."""

    def __init__(self, meet: Meet) -> None:
        super().__init__()
        self.up, self.down, self.meet = nn.Linear(32, 96), nn.Linear(96, 32), meet

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.meet(self, x)


def plain(m: Any, x: torch.Tensor) -> torch.Tensor:
    return x + m.down(F.gelu(m.up(x)))  # type: ignore[no-any-return]


def sparse(
    meet: Meet, structure: str = "block:16", dtype: torch.dtype = torch.float32, side: PermutationSide = "input"
) -> nn.Module:
    torch.manual_seed(0)
    spec = padst.SparsitySpec(structure, 0.5, permutation="random", permutation_side=side)
    return padst.sparsify(Mlp(meet), spec).to(dtype).eval()


def lowered(model: nn.Module, x: torch.Tensor, policy: Policy = "sparse", effort: Effort = "quick") -> Any:
    """The reports, the decisions and the graph before and after."""
    with torch.no_grad():
        captured = capture(model, x)
        facts: Context = captured.context(inference=True)
        choose, fuse = ChooseKernels("sparse"), FuseMlp(policy, effort)
        for rule in (
            FuseInputPermutation(),
            FuseOutputPermutation(),
            AbsorbBias(),
            choose,
            FuseActivation(),
            FuseResidual(),
            InterleaveBlocks(),
        ):
            rule.run(facts)
        report = fuse.run(facts)
        assert fuse.run(facts).rewritten == 0
        facts.module.graph.lint()
        facts.module.recompile()
        assert padst.verify(captured.graph, facts.module, *captured.inputs)
        result = torch.compile(model, backend=lambda graph, inputs: facts.module.forward)(x)
    return report, choose.decisions, facts.module, result


def calls(module: Any) -> list[Any]:
    return [node for node in module.graph.nodes if node.target is torch.ops.padst_native.block_mlp.default]


@pytest.mark.parametrize(
    ("meet", "dtype", "tolerance"),
    [
        (plain, torch.float32, 1e-5),
        (plain, torch.bfloat16, 3e-2),
        (lambda m, x: m.down(F.silu(m.up(x))).relu(), torch.float32, 1e-5),
    ],
)
def test_two_layers_become_one_kernel(meet: Meet, dtype: torch.dtype, tolerance: float) -> None:
    model, x = sparse(meet, dtype=dtype), torch.randn(2, 35, 32).to(dtype)
    joins = meet is plain
    report, decisions, module, result = lowered(model, x)
    assert (report.rewritten, len(calls(module))) == ((1, 1) if joins else (0, 0))
    with torch.no_grad():
        torch.testing.assert_close(result, model(x), rtol=tolerance, atol=tolerance)
    if joins:
        fused = {decision.layer: decision.fused[-2:] for decision in decisions}
        assert fused == {"up": ("activation", "mlp"), "down": ("residual", "mlp")}
        assert decisions[0].choice.reason.endswith("; in one kernel with the next layer")
        assert argument(calls(module)[0], "activation") == "gelu"
    else:
        assert "no place for the activation" in report.refusals[0].reason


def test_permuted_outputs_of_the_first_layer_become_the_order_that_the_second_reads() -> None:
    model, x = sparse(plain, side="output"), torch.randn(2, 35, 32)
    report, _, module, result = lowered(model, x)
    assert report.rewritten == 1
    assert argument(calls(module)[0], "second_input_permutation") is not None
    with torch.no_grad():
        torch.testing.assert_close(result, model(x), rtol=1e-5, atol=1e-5)


def read_twice(m: Any, x: torch.Tensor) -> torch.Tensor:
    h = m.up(x)
    return m.down(h).sum() + h  # type: ignore[no-any-return]


def square(m: Any, x: torch.Tensor) -> torch.Tensor:
    h = m.up(x)[..., :32]
    return m.down(F.pad(h, (0, 64)))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("meet", "reason"),
    [
        (read_twice, "read by more than the next product"),
        (lambda m, x: m.down(m.up(x) + F.pad(x, (0, 64))), "no place for the residual"),
    ],
)
def test_what_one_kernel_cannot_do_is_refused(meet: Meet, reason: str) -> None:
    report, _, module, _ = lowered(sparse(meet), torch.randn(5, 32))
    assert (report.rewritten, calls(module)) == (0, [])
    assert reason in report.refusals[0].reason


@pytest.mark.parametrize(
    ("meet", "structure"), [(square, "block:16"), (plain, "nm:1:4"), (lambda m, x: m.down(m.up(x).tanh()), "block:16")]
)
def test_other_pairs_do_not_match(meet: Meet, structure: str) -> None:
    model = padst.sparsify(Mlp(meet), padst.SparsitySpec(structure, None if structure != "block:16" else 0.5)).eval()
    report, _, module, _ = lowered(model, torch.randn(5, 32))
    assert (report.rewritten, report.refusals, calls(module)) == (0, [], [])


def write_between(m: Any, x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    h = m.up(x)
    x.add_(1)
    return m.down(h)  # type: ignore[no-any-return]


def test_a_write_between_the_products_is_an_obstacle() -> None:
    model, x = sparse(write_between), torch.randn(5, 32)
    report, _, _, result = lowered(model, x)
    assert "writes in place between the products" in report.refusals[0].reason
    with torch.no_grad():
        torch.testing.assert_close(result, model(x), rtol=1e-5, atol=1e-5)


def computed_bias(m: Any, x: torch.Tensor) -> torch.Tensor:
    up = m.up
    h = torch.ops.padst.structured_linear.default(
        x, up.values, [up.row_pointers, up.columns], up.bias * x.mean(), up.permutation, None, 96, "block:16x16"
    )
    return m.down(h)  # type: ignore[no-any-return]


def test_operands_must_be_parameters_and_shapes_known() -> None:
    report, _, _, _ = lowered(sparse(computed_bias), torch.randn(5, 32))
    assert [refusal.reason for refusal in report.refusals] == ["the weights are computed from the inputs"]
    with torch.no_grad():
        facts = capture(sparse(plain), torch.randn(5, 32)).context(inference=True)
        for rule in (FuseInputPermutation(), ChooseKernels("sparse"), FuseActivation(), FuseResidual()):
            rule.run(facts)
        for node in facts.module.graph.nodes:
            node.meta.pop("example_value", None)
            node.meta.pop("val", None)
        assert [refusal.reason for refusal in FuseMlp("sparse").run(facts).refusals] == ["capture recorded no shapes"]


@pytest.mark.parametrize(
    ("fused", "tiled", "effort", "reason", "tile"),
    [
        (1.0, 1.0, "quick", "2.00x faster than two", 0),
        (1.0, 0.5, "quick", "4.00x faster than two", 64),
        (1.99, 1.99, "quick", "one kernel takes 0.99 of the time of two", None),
        (4.0, 4.0, "quick", "one kernel takes 2.00 of the time of two", None),
        (1.0, 1.0, "cached", "was not measured", None),
        (1.0, 1.0, "off", "was not measured", None),
    ],
)
def test_one_kernel_must_be_faster_than_two(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fused: float, tiled: float, effort: Effort, reason: str, tile: int | None
) -> None:
    monkeypatch.setenv("PADST_CACHE_DIR", str(tmp_path))
    seconds = {"apart": 2.0, "fused": fused}
    measured: list[set[Candidate]] = []

    def race(runs: dict[Candidate, Callable[[], Any]], device: str, budget: Any) -> dict[Candidate, float]:
        results = [run() for run in runs.values()]
        for other in results[1:]:
            torch.testing.assert_close(other, results[0])
        measured.append(set(runs))
        return {c: tiled if c.tile is not None and c.tile.tokens == 64 else seconds[c.kernel] for c in runs}

    monkeypatch.setattr(search, "raced_seconds", race)
    model, x = sparse(plain), torch.randn(70, 32)
    for _ in range(2):  # the second time from the file
        lookup._library.cache_clear()
        report, decisions, module, _ = lowered(model, x, "measure", effort)
        found = [refusal.reason for refusal in report.refusals] + [decisions[0].choice.reason]
        assert any(reason in sentence for sentence in found), found
        assert [argument(call, "token_tile") for call in calls(module)] == ([] if tile is None else [tile])
    assert len(measured) == (1 if effort == "quick" else 0)


def test_the_pipeline_joins_layers_and_explains_it() -> None:
    model, x = sparse(plain), torch.randn(5, 32)
    with torch.no_grad():
        layers = {layer.name: layer for layer in padst.explain(model, x, options={"kernels": "sparse"}).layers}
    assert "mlp" in layers["up"].fused and "mlp" in layers["down"].fused
    assert "in one kernel with the next layer" in layers["up"].reason


def test_nothing_is_joined_that_needs_a_gradient() -> None:
    fused = [layer.fused for layer in padst.explain(sparse(plain), torch.randn(5, 32), options={"kernels": "sparse"}).layers]
    assert not any("mlp" in parts for parts in fused)
