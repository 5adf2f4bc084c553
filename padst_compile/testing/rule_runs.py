"""One rule on a function that Dynamo captures, and a small product for it to find."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from padst_compile.passes.base import RewriteRule, RuleReport
from padst_compile.passes.context import Context


def run_rule(
    make: Callable[[], RewriteRule], function: Callable[..., Any], *inputs: torch.Tensor
) -> tuple[RuleReport, fx.GraphModule, Any]:
    """What a rule reports, the graph it leaves, and what that computes; fails if the rule finds more the second time."""
    found: list[Any] = []

    def capture(module: fx.GraphModule, _inputs: list[Any]) -> Any:
        rule = make()
        report = rule.run(Context(module, {}, inference=True))
        if rule.run(Context(module, {}, inference=True)).rewritten:
            raise AssertionError("the rule is not done after one run")
        module.graph.lint()
        module.recompile()
        found.extend([report, module])
        return module.forward

    with torch.no_grad():
        result = torch.compile(function, backend=capture, fullgraph=True)(*inputs)
    return found[0], found[1], result


def diagonals(x: torch.Tensor, bias: torch.Tensor | None = None, **epilogue: Any) -> torch.Tensor:
    """Two diagonals of whole numbers for `x` `[..., 8]`, on which float32 is exact, by the C++ op."""
    offsets, values = torch.tensor([0, 3], dtype=torch.int32), torch.tensor([[1.0, -2.0, 3.0, 1.0] * 2, [2.0, 0.0] * 4])
    result: torch.Tensor = torch.ops.padst_native.diagonal_linear.default(
        x, values.to(x.dtype), offsets, bias, None, None, 8, **epilogue
    )
    return result
