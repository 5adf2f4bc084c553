"""A convolution over patches that tile the image is a linear layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from padst_compile.passes.base import RuleReport
from padst_compile.passes.context import Context
from padst_compile.passes.unfold_patches import UnfoldPatches


class Embed(nn.Module):
    """A patch embedding in float64 with whole-number weights, so that sums are exact in any order."""

    def __init__(
        self, kernel: Any = (2, 3), read: Callable[[torch.Tensor], torch.Tensor] | None = None, **settings: Any
    ) -> None:
        super().__init__()
        settings = {"stride": kernel, **settings}
        self.conv = nn.Conv2d(3, 5, kernel, **settings).double()
        self.read = read or (lambda y: y.flatten(2).transpose(1, 2))
        with torch.no_grad():
            for parameter in self.conv.parameters():
                parameter.copy_(torch.randint(-4, 5, parameter.shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.read(self.conv(x))


def images(*shape: int) -> torch.Tensor:
    return torch.randint(-4, 5, shape).double()


def captured(model: nn.Module, x: torch.Tensor) -> tuple[fx.GraphModule, list[Any]]:
    """The graph that Dynamo hands to a backend."""
    found: list[tuple[fx.GraphModule, list[Any]]] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        found.append((gm, inputs))
        return gm.forward

    torch.compile(model, backend=backend, fullgraph=True)(x)
    return found[0]


def apply(model: nn.Module, x: torch.Tensor) -> tuple[RuleReport, torch.Tensor, fx.GraphModule]:
    gm, inputs = captured(model, x)
    report = UnfoldPatches().run(Context(gm, {}, inference=False))
    gm.graph.lint()
    gm.recompile()
    (result,) = gm(*inputs)
    return report, result, gm


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [0, 1, 2])
def test_the_function_is_exactly_the_same(batch: int, bias: bool) -> None:
    model, x = Embed(bias=bias), images(batch, 3, 4, 9)
    report, result, gm = apply(model, x)
    assert report.rewritten == 1
    assert not any(node.target in (F.conv2d, torch.conv2d) for node in gm.graph.nodes)
    assert torch.equal(result, model(x))


def test_gradients_reach_the_weight_as_before() -> None:
    model, x = Embed(), images(2, 3, 4, 9)
    model(x).square().sum().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    _, result, _ = apply(model, x)
    result.square().sum().backward()
    assert all(torch.equal(parameter.grad, wanted) for parameter, wanted in zip(model.parameters(), expected, strict=True))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"kernel": 3, "stride": 2}, "overlap"),
        ({"kernel": 2, "stride": 3}, "gaps"),
        ({"kernel": 2, "padding": 1}, "pads"),
        ({"kernel": 2, "dilation": 2}, "dilated"),
        ({"kernel": 5}, "tile the image"),
        ({"kernel": 2, "read": lambda y: y.view(y.shape[0], 5, -1)}, "memory order"),
    ],
)
def test_other_convolutions_stay_with_a_reason(settings: dict[str, Any], reason: str) -> None:
    model, x = Embed(**settings), images(2, 3, 12, 12)
    report, result, _ = apply(model, x)
    assert report.rewritten == 0
    assert reason in report.refusals[0].reason
    assert torch.equal(result, model(x))


def test_a_pointwise_convolution_is_no_patch_embedding() -> None:
    report, _, _ = apply(Embed(kernel=1), images(1, 3, 4, 4))
    assert (report.rewritten, report.refusals) == (0, [])
