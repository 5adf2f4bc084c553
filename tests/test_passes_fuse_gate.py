"""native_linear(x, S, b, activation) * g  ==  native_linear(x, S, b, activation, gate=g)"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import padst_compile as padst
from padst_compile.backend import padst as backend
from padst_compile.kernels import native
from padst_compile.passes.base import RuleReport
from padst_compile.passes.fuse_gate import FuseGate
from padst_compile.passes.graph import argument
from padst_compile.passes.native_calls import is_native_linear
from padst_compile.testing.rule_runs import diagonals as product
from padst_compile.testing.rule_runs import run_rule

pytestmark = pytest.mark.skipif(not native.load(), reason=f"no native kernels: {native.unavailable_reason()}")

Function = Callable[..., Any]


def sample() -> tuple[torch.Tensor, torch.Tensor]:
    return (torch.arange(24.0) % 7 - 3).reshape(3, 8), (torch.arange(24.0) % 5 - 1).reshape(3, 8)


def apply(function: Function, *inputs: torch.Tensor) -> tuple[RuleReport, fx.GraphModule, Any]:
    return run_rule(FuseGate, function, *inputs)


def gates(module: fx.GraphModule) -> int:
    return sum(argument(node, "gate") is not None for node in module.graph.nodes if is_native_linear(node))


def gate_made_later(x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    y = product(x)
    return y * (g * 2 + 1)


def read_twice_by_another(x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    z, y = product(g), product(x)
    return (z * y) + y


@pytest.mark.parametrize(
    "function",
    [
        lambda x, g: product(x, activation="relu") * product(x),
        lambda x, g: product(x) * product(x, activation="relu"),
        lambda x, g: product(x) * g,
        lambda x, g: torch.mul(g, product(x)),
        lambda x, g: product(x, activation="relu") * x + g,
        gate_made_later,
        read_twice_by_another,
    ],
)
def test_the_factor_moves_into_the_kernel(function: Function) -> None:
    report, module, result = apply(function, *sample())
    assert (report.rewritten, report.refusals, gates(module)) == (1, [], 1)
    assert torch.equal(result, function(*sample()))


def doubly_read(x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    y = product(x)
    return (y * g) + y


def square(x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    y = product(x)
    return y * y


def input_written_between(x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    y = product(x)
    x.add_(1)
    return y * g


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (doubly_read, "2 readers"),
        (square, "same product"),
        (input_written_between, "writes in place"),
        (lambda x, g: product(x, gate=g) * g, "multiplies by another tensor already"),
        (lambda x, g: product(x, residual=g) * g, "adds another tensor first"),
        (lambda x, g: product(x) * g[0], "differ"),
        (lambda x, g: product(x[0]) * g, "differ"),
        (lambda x, g: product(x.bfloat16()) * g, "differ"),
        (lambda x, g: product(x) * g.T.contiguous().T, "contiguous"),
    ],
)
def test_what_would_change_the_function_is_refused(function: Function, reason: str) -> None:
    report, _, result = apply(function, *sample())
    assert report.rewritten == 0 and reason in report.refusals[0].reason
    assert torch.equal(result, function(*sample()))


@pytest.mark.parametrize(
    "function",
    [
        lambda x, g: x * g,
        lambda x, g: product(x) * 2,
        lambda x, g: product(x) / (g * g + 1),
        lambda x, g: operator.imul(g.clone(), product(x)),
        lambda x, g: product(x).tanh() * g,
    ],
)
def test_other_expressions_do_not_match(function: Function) -> None:
    report, _, result = apply(function, *sample())
    assert (report.rewritten, report.refusals) == (0, [])
    assert torch.equal(result, function(*sample()))


class Gated(nn.Module):
    """The MLP of Llama (SwiGLU) or T5 (GEGLU), with the factors in either order."""

    def __init__(self, activation: Function, gate_first: bool, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(32, 96, bias=bias), nn.Linear(32, 96, bias=bias)
        self.down_proj = nn.Linear(96, 32, bias=bias)
        self.activation, self.gate_first = activation, gate_first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.gate_first:
            hidden = self.activation(self.gate_proj(x)) * self.up_proj(x)
        else:
            hidden = self.up_proj(x) * self.activation(self.gate_proj(x))
        return x + self.down_proj(hidden)  # type: ignore[no-any-return]


def tanh_gelu(x: torch.Tensor) -> torch.Tensor:
    """As T5 writes it."""
    return 0.5 * x * (1.0 + torch.tanh((2.0 / torch.pi) ** 0.5 * (x + 0.044715 * torch.pow(x, 3.0))))


def sparse_mlp(structure: str, activation: Function = F.silu, gate_first: bool = True, bias: bool = False) -> nn.Module:
    torch.manual_seed(0)
    spec = padst.SparsitySpec(structure, 0.75, permutation="random")
    return padst.sparsify(Gated(activation, gate_first, bias).eval(), spec)


@pytest.mark.parametrize(
    ("structure", "activation", "gate_first", "bias"),
    [("nm:1:4", F.silu, True, False), ("diagonal", F.gelu, False, True), ("block:16", tanh_gelu, True, True)],
)
def test_a_gated_mlp_is_three_kernels(structure: str, activation: Function, gate_first: bool, bias: bool) -> None:
    if structure == "block:16" and not native.supports("block", torch.float32):
        pytest.skip("no kernel for blocks here")
    model, x = sparse_mlp(structure, activation, gate_first, bias), torch.randn(2, 70, 32)
    with torch.no_grad():
        fused = {layer.name: layer.fused for layer in padst.explain(model, x, options={"kernels": "sparse"}).layers}
        compiled = torch.compile(model, backend=backend, options={"kernels": "sparse", "verify": True}, fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    panels = ("feature-major output",) if structure != "block:16" else ()
    parts = {"gate_proj": {"activation", *panels}, "up_proj": set(panels), "down_proj": {"residual"}}
    parts["up_proj" if gate_first else "gate_proj"].add("gate")  # whichever is computed later
    parts["down_proj"] |= {part.replace("output", "input") for part in panels}
    own = {"bias", "input_permutation", "output_permutation"}
    assert {name: set(layer) - own for name, layer in fused.items()} == parts


def test_nothing_is_fused_that_needs_a_gradient() -> None:
    fused = {layer.name: layer.fused for layer in padst.explain(sparse_mlp("nm:1:4"), torch.randn(5, 32)).layers}
    assert not any({"activation", "gate", "residual"} & set(parts) for parts in fused.values())
