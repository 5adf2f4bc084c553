"""split(permute(x, p))  ==  permute(split(x), p₁), permute(split(x), p₂), …   where p keeps to the pieces

Chunks of an axis, and tensors joined along one, have orders of their own: the fused projection of queries, keys and values
can be reordered within each of them.
"""

from __future__ import annotations

from typing import Any

import torch

from padst_compile.passes.axes.axis import Axis, align, cut, product, sum_of, unify
from padst_compile.passes.axes.registry import rule
from padst_compile.passes.axes.trace import Call, axis_of_size

aten = torch.ops.aten
_MOST_INSTANCES = 16  # selecting one of a few (query, key or value), not a token from a sequence


@rule(aten.split, aten.split_with_sizes, aten.chunk, aten.tensor_split, aten.unsafe_split, aten.unsafe_chunk)
def split(call: Call) -> None:
    """Pieces of one axis, the others as they are."""
    axes = call.axes(call.argument("self"))
    dim = call.argument("dim")
    pieces = _cut(axes[dim], [result.shape[dim] for result in call.results])
    for result, piece in zip(call.results, pieces, strict=True):
        call.define(result, _replaced(axes, dim, piece))


@rule(aten.slice, aten.narrow)
def slice_(call: Call) -> None:
    """A piece of one axis; what is left out keeps its place."""
    (result,) = call.results
    axes = call.axes(call.argument("self"))
    dim, start = call.argument("dim"), call.argument("start") or 0
    whole, size = axes[dim].size, result.shape[dim]
    if isinstance(size, int) and size == whole:
        call.define(result, axes)
        return
    step = call.argument("step") if call.target.overloadpacket is aten.slice else 1
    if not all(isinstance(number, int) for number in (whole, size, start, step)):
        axes[dim].pin("a slice of it is taken that cannot be told at compile time")
        piece = axis_of_size(size, "a slice of it is taken")
    elif step != 1:
        piece = _every(axes[dim], start, size, step)
    else:
        first = min(max(start + whole if start < 0 else start, 0), whole)
        piece = cut(axes[dim], (first, size, whole - first - size))[1]
    call.define(result, _replaced(axes, dim, product(()) if size == 1 else piece))


def _every(axis: Axis, start: int, size: int, step: int) -> Axis:
    """Every `step`-th index: the axis is a product of groups and places in a group, as in rotary embeddings of pairs."""
    if axis.size != size * step or not 0 <= start < step:
        axis.pin("a slice of it is taken that does not divide it")
        return Axis(size, axis.root().pinned)
    groups, places = Axis(size), Axis(step)
    align([axis], [groups, places])
    places.pin("one place of each group is taken")
    return groups


@rule(aten.select, aten.unbind)
def select(call: Call) -> None:
    """One index of an axis; the order of the other axes may depend on which."""
    axes = call.axes(call.argument("self"))
    dim = call.argument("dim")
    dim = dim if dim >= 0 else dim + len(axes)
    chosen = axes[dim].root()
    others = [axis for position, axis in enumerate(axes) if position != dim]
    indices = [call.argument("index")] if call.target.overloadpacket is aten.select else list(range(len(call.results)))
    if not isinstance(chosen.size, int) or not all(isinstance(index, int) for index in indices):
        chosen.pin("one of its indices is taken")
        for result in call.results:
            call.define(result, others)
        return
    few = chosen.size <= _MOST_INSTANCES
    if len(indices) > 1:
        cut(chosen, [1] * chosen.size)
    for result, index in zip(call.results, indices, strict=True):
        first = index + chosen.size if index < 0 else index
        cut(chosen, (first, 1, chosen.size - first - 1))
        call.define(result, [axis.instance(chosen, first, first + 1) for axis in others] if few else others)


@rule(aten.cat, aten.concat)
def cat(call: Call) -> None:
    """The joined axis has the pieces' orders one after the other."""
    (result,) = call.results
    tensors = [tensor for tensor in call.argument("tensors") if tensor.dim() == result.dim()]
    axes = [axis_of_size(size) for size in result.shape]
    dim = call.argument("dim")
    dim = dim if dim >= 0 else dim + len(axes)
    for tensor in tensors:
        for position, axis in enumerate(call.axes(tensor)):
            if position != dim:
                unify(axis, axes[position])
    axes[dim] = sum_of(call.axes(tensor)[dim] for tensor in tensors)
    call.define(result, axes)


@rule(aten.stack)
def stack(call: Call) -> None:
    """A new axis that counts the operands, which share the order of the others."""
    (result,) = call.results
    axes = [axis_of_size(size) for size in result.shape]
    dim = call.argument("dim")
    dim = dim if dim >= 0 else dim + len(axes)
    rest = [axis for position, axis in enumerate(axes) if position != dim]
    axes[dim].pin("it counts what was stacked")
    for tensor in call.argument("tensors"):
        for own, common in zip(call.axes(tensor), rest, strict=True):
            unify(own, common)
    call.define(result, axes)


@rule(aten.constant_pad_nd, aten.roll, aten.flip)
def move(call: Call) -> None:
    """Axes along which elements are moved or added keep their order; the others are free."""
    source, (result,) = call.argument("self"), call.results
    before = call.axes(source)
    axes = [axis_of_size(size) for size in result.shape]
    for position, (old, new) in enumerate(zip(before, axes, strict=True)):
        if position in _moved(call, source.dim()):
            for axis in (old, new):
                axis.pin("elements are moved along it")
            call.graph.mixed += [old, new]
        else:
            unify(old, new)
    call.define(result, axes)


def _moved(call: Call, rank: int) -> set[int]:
    if call.target.overloadpacket is aten.constant_pad_nd:
        pad = list(call.argument("pad"))
        return {rank - 1 - i // 2 for i, amount in enumerate(pad) if not isinstance(amount, int) or amount != 0}
    dims = list(call.argument("dims"))
    return {dim % rank for dim in dims} if dims else set(range(rank))


def _cut(axis: Axis, sizes: list[Any]) -> list[Axis]:
    if isinstance(axis.size, int) and all(isinstance(size, int) for size in sizes):
        return [product(()) if size == 1 else piece for size, piece in zip(sizes, cut(axis, sizes), strict=True)]
    axis.pin("it is split in pieces whose sizes are known at run time only")
    return [axis_of_size(size, "it is a piece of another axis") for size in sizes]


def _replaced(axes: list[Axis], dim: int, axis: Axis) -> list[Axis]:
    new = list(axes)
    new[dim] = axis
    return new
