"""linear(permute(x, p), S, in=q)  ==  linear(x, S, in=p[q])

    permute(linear(x, S, b, out=q), p)  ==  linear(x, S, b[p], out=q[p])

A structured product reads its inputs and writes its outputs through index tables, so it puts up with any order on either
side, at the price of a table. A permutation that stands in the graph ties nothing: it vanishes where the orders on its two
sides differ by just its table.
"""

from __future__ import annotations

import torch

from padst_compile.passes.axes.axis import unify
from padst_compile.passes.axes.registry import rule
from padst_compile.passes.axes.trace import Call, Permute, Product, axis_of_size
from padst_compile.passes.graph import PERMUTE, STRUCTURED_LINEAR


@rule(torch.ops.padst.structured_linear)
def structured_linear(call: Call) -> None:
    """Inputs and outputs have orders of their own; the bias has that of the outputs."""
    *batch, inputs = call.axes(call.argument("x"))
    (result,) = call.results
    outputs = axis_of_size(result.shape[-1])
    bias = call.argument("bias")
    if bias is not None:
        unify(call.axes(bias)[0], outputs)
    call.define(result, [*batch, outputs])
    call.graph.seen += [(inputs,), (outputs,)]
    if call.node is not None and call.node.target is STRUCTURED_LINEAR:
        call.graph.products.append(Product(call.node, inputs, outputs))
    else:
        call.pin_all("a structured product inside of another call")


@rule(torch.ops.padst.permute)
def permute(call: Call) -> None:
    """The permuted axis changes its order; the others do not."""
    source = call.tensors[0]
    *batch, inputs = call.axes(source)
    (result,) = call.results
    outputs = axis_of_size(result.shape[-1])
    call.define(result, [*batch, outputs])
    call.graph.seen += [(inputs,), (outputs,)]
    if call.node is not None and call.node.target is PERMUTE:
        call.graph.permutes.append(Permute(call.node, inputs, outputs))
    else:
        call.pin_all("a permutation inside of another call")


@rule(torch.ops.padst.to_dense)
def to_dense(call: Call) -> None:
    """The dense weight of packed values is made, not reordered, here."""
    call.pin_all("it is unpacked from a sparse weight")
