"""dropout(x, p, training=False)  ==  x"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx
from torch.nn import functional as F

from padst_compile.passes.context import Context
from padst_compile.passes.remove_dropout import RemoveDropout

Function = Callable[[torch.Tensor], torch.Tensor]


def run(function: Function) -> tuple[int, fx.GraphModule]:
    module = fx.symbolic_trace(function)
    rewritten = RemoveDropout().run(Context(module, {}, inference=False)).rewritten
    module.graph.lint()
    module.recompile()
    return rewritten, module


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.dropout(x, 0.3, False),
        lambda x: F.dropout(x, 0.3, False, True) + 1,
        lambda x: F.dropout(x, training=False),
        lambda x: F.dropout(x, p=0.0),
        lambda x: torch.ops.aten.dropout.default(x, 0.3, False),
    ],
)
def test_what_does_nothing_goes(function: Function) -> None:
    rewritten, module = run(function)
    x = torch.arange(6.0)
    assert rewritten == 1 and not module.graph.find_nodes(op="call_function", target=F.dropout)
    assert torch.equal(module(x), function(x))


def test_a_write_to_the_result_still_reaches_the_input() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        F.dropout(x, 0.3, False).add_(1)
        return x * 2

    rewritten, module = run(function)
    assert rewritten == 1 and torch.equal(module(torch.arange(6.0)), function(torch.arange(6.0)))


@pytest.mark.parametrize("function", [F.dropout, lambda x: F.dropout(x, 0.3, True), lambda x: F.dropout1d(x, 0.3, False)])
def test_what_may_draw_stays(function: Function) -> None:
    assert run(function)[0] == 0
