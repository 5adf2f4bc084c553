"""sum(permute(x, p))  ==  sum(x)

A sum, mean or maximum over an axis does not depend on its order. The other axes keep theirs.
"""

from __future__ import annotations

import torch

from padst_compile.passes.axes.axis import Axis, product
from padst_compile.passes.axes.registry import rule
from padst_compile.passes.axes.trace import Call

aten = torch.ops.aten


@rule(
    aten.sum, aten.mean, aten.amax, aten.amin, aten.var, aten.std, aten.var_mean, aten.std_mean, aten.prod, aten.any, aten.all,
    aten.linalg_vector_norm, aten.norm, aten.logsumexp,
)  # fmt: skip
def reduce(call: Call) -> None:
    """Reduced axes vanish, or stay with size 1."""
    source = call.tensors[0]
    axes = call.axes(source)
    for result in call.results:
        call.define(result, _remaining(call, axes, result))


def _remaining(call: Call, axes: list[Axis], result: torch.Tensor) -> list[Axis]:
    dims = next((call.argument(p.name) for p in call.target._schema.arguments if p.name in ("dim", "dims")), None)
    given = [dims] if isinstance(dims, int) else list(dims or range(len(axes)))
    reduced = {dim % len(axes) for dim in given} if axes else set()
    if result.dim() == len(axes):
        return [product(()) if position in reduced else axis for position, axis in enumerate(axes)]
    return [axis for position, axis in enumerate(axes) if position not in reduced]


@rule(aten.cumsum, aten.cumprod, aten.logcumsumexp)
def accumulate(call: Call) -> None:
    """Running sums depend on the order of their axis."""
    axes = call.axes(call.argument("self"))
    axis = axes[call.argument("dim")] if axes else None
    if axis is not None:
        axis.pin("a running sum goes along it")
        call.graph.mixed.append(axis)
    for result in call.results:
        call.define(result, axes)
