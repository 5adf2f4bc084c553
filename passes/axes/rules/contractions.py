"""permute(x, p) @ permute(w, p).T  ==  x @ w.T      and      permute(x @ w.T + b, q)  ==  x @ w[q].T + b[q]

The summed axis of a product may have any order that both operands share; the others keep theirs. So a dense linear layer
absorbs any order on either side: its weight's columns and rows, and its bias, take it on.
"""

from __future__ import annotations

import torch

from padst_compile.passes.axes.axis import Axis, unify
from padst_compile.passes.axes.registry import rule
from padst_compile.passes.axes.rules.pointwise import broadcast
from padst_compile.passes.axes.trace import Call

aten = torch.ops.aten


@rule(aten.mm, aten.bmm)
def multiply(call: Call) -> None:
    """Batches of [m, k] @ [k, n]."""
    _define(call, product(call, call.argument("self"), call.argument("mat2")))


@rule(aten.addmm, aten.baddbmm, aten.addbmm)
def multiply_add(call: Call) -> None:
    """A matrix product plus whatever broadcasts to it."""
    names = [argument.name for argument in call.target._schema.arguments]
    left, right = (call.argument(name) for name in names[1:3])
    axes = product(call, left, right)
    broadcast(call.axes(call.argument("self")), axes)
    _define(call, axes)


@rule(aten.linear)
def linear(call: Call) -> None:
    """Weight [out, in]: the product of `x` with its transpose, plus a bias."""
    *batch, summed = call.axes(call.argument("input"))
    rows, columns = call.axes(call.argument("weight"))
    unify(summed, columns)
    if call.argument("bias") is not None:
        unify(call.axes(call.argument("bias"))[0], rows)
    _define(call, [*batch, rows])


@rule(aten.mv)
def matrix_vector(call: Call) -> None:
    """A matrix [m, k] times a vector [k]."""
    rows, columns = call.axes(call.argument("self"))
    unify(columns, call.axes(call.argument("vec"))[0])
    _define(call, [rows])


@rule(aten.dot, aten.vdot)
def dot(call: Call) -> None:
    """Two vectors [k]."""
    left, right = (call.axes(tensor)[0] for tensor in call.tensors)
    unify(left, right)
    _define(call, [])


def product(call: Call, left: torch.Tensor, right: torch.Tensor) -> list[Axis]:
    """The axes of a (batched) matrix product."""
    *batch, rows, summed = call.axes(left)
    *other_batch, other_summed, columns = call.axes(right)
    for axis, other in zip(batch, other_batch, strict=True):
        unify(axis, other)
    unify(summed, other_summed)
    return [*batch, rows, columns]


def _define(call: Call, axes: list[Axis]) -> None:
    for result in call.results:
        call.define(result, axes)
