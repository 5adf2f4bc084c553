"""f(permute(x, p), permute(y, p), …)  ==  permute(f(x, y, …), p)   for any pointwise f

All operands share one order along every axis; an operand of size 1 is broadcast and has none. So activations, gates, residual
sums, scalars, per-channel biases and layer scales let any order through, and those of them that are
parameters take it on.
"""

from __future__ import annotations

import torch

from padst_compile.passes.axes.axis import Axis, unify
from padst_compile.passes.axes.registry import rule
from padst_compile.passes.axes.trace import Call, axis_of_size

aten = torch.ops.aten


@rule(
    torch.Tag.pointwise,
    aten.clone, aten.alias, aten.detach, aten._to_copy, aten.to, aten.lift_fresh, aten.lift_fresh_copy, aten.lift,
    aten.contiguous, aten.copy_, aten.copy, aten.where, aten.clamp, aten.type_as,
    aten.masked_fill, aten.masked_fill_, aten.fill_, aten.zero_, aten.view_as_real_copy, aten.positive,
)  # fmt: skip
def pointwise(call: Call) -> None:
    """All tensors agree along every axis, counted from the last."""
    for result in call.results:
        axes = [axis_of_size(size) for size in result.shape]
        for tensor in call.tensors:
            broadcast(call.axes(tensor), axes)
        call.define(result, axes)


def broadcast(operand: list[Axis], result: list[Axis]) -> None:
    """Tie the axes of an operand to those of the result that they meet."""
    for own, common in zip(reversed(operand), reversed(result), strict=False):
        if own.size != 1:
            unify(own, common)


@rule(
    aten.full, aten.zeros, aten.ones, aten.empty, aten.empty_strided, aten.new_zeros, aten.new_ones, aten.new_full,
    aten.new_empty, aten.new_empty_strided, aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like,
)  # fmt: skip
def constant(call: Call) -> None:
    """The same everywhere, in any order."""
    for result in call.results:
        call.fresh(result)


@rule(aten.arange, aten.linspace, aten.scalar_tensor, aten.eye, aten.tril_indices, aten.triu_indices)
def enumeration(call: Call) -> None:
    """Values that tell the position: no other order."""
    for result in call.results:
        call.fresh(result, "its values count positions")
