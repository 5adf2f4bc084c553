"""view(permute(x, p))  ==  permute(view(x), p)   where p keeps to the factors that the view makes

A reshape renames the index of an axis: 768 channels become 12 heads of 64. Orders that move whole heads, and channels within
a head, pass; others do not. Transposing an axis moves its order along.
"""

from __future__ import annotations

import torch

from padst_compile.passes.axes.axis import Axis, align, product
from padst_compile.passes.axes.registry import rule
from padst_compile.passes.axes.trace import Call, axis_of_size

aten = torch.ops.aten


@rule(aten.view.default, aten._unsafe_view, aten.reshape, aten._reshape_alias, aten.view_copy.default, aten._reshape_copy)
def view(call: Call) -> None:
    """Both shapes number the same elements, major first."""
    (result,) = call.results
    axes = [axis_of_size(size) for size in result.shape]
    align(call.axes(call.argument("self")), axes)
    call.define(result, axes)


@rule(aten.view.dtype)
def reinterpret(call: Call) -> None:
    """Another dtype over the same memory: of the same width, the axes stay."""
    source, (result,) = call.argument("self"), call.results
    if source.element_size() == result.element_size():
        call.define(result, call.axes(source))
    else:
        call.pin_all("elements are reinterpreted")


@rule(aten.transpose, aten.transpose_, aten.swapaxes)
def transpose(call: Call) -> None:
    """Two axes change places."""
    axes = list(call.axes(call.argument("self")))
    first, second = call.argument("dim0"), call.argument("dim1")
    if axes:
        axes[first], axes[second] = axes[second], axes[first]
    _define(call, axes)


@rule(aten.t, aten.t_, aten.numpy_T, aten.mT)
def matrix_transpose(call: Call) -> None:
    """The last two axes change places."""
    _define(call, list(call.axes(call.argument("self")))[::-1])


@rule(aten.permute)
def permute(call: Call) -> None:
    """Axes in another sequence."""
    axes = call.axes(call.argument("self"))
    _define(call, [axes[dim] for dim in call.argument("dims")])


@rule(aten.unsqueeze, aten.unsqueeze_)
def unsqueeze(call: Call) -> None:
    """One more axis of size 1."""
    axes = list(call.axes(call.argument("self")))
    dim = call.argument("dim")
    axes.insert(dim if dim >= 0 else dim + len(axes) + 1, product(()))
    _define(call, axes)


@rule(aten.squeeze, aten.squeeze_)
def squeeze(call: Call) -> None:
    """Some axes of size 1 vanish."""
    (result,) = call.results
    kept = [axis for axis in call.axes(call.argument("self")) if axis.size != 1]
    sizes = [axis_of_size(size) for size in result.shape]
    remaining = iter(kept)
    _define(call, [axis if axis.size == 1 else next(remaining) for axis in sizes])


@rule(aten.expand, aten.expand_as)
def expand(call: Call) -> None:
    """An axis of size 1 is repeated: all its copies are the same, in any order."""
    (result,) = call.results
    axes = call.axes(call.argument("self"))
    new = [axis_of_size(size) for size in result.shape]
    for position, axis in enumerate(reversed(axes)):
        if axis.size != 1:
            new[-1 - position] = axis
    call.define(result, new)


@rule(aten.repeat)
def repeat(call: Call) -> None:
    """Copies one after the other: an axis becomes a product of the number of the copy and itself."""
    (result,) = call.results
    axes, times = call.axes(call.argument("self")), list(call.argument("repeats"))
    padded = [product(())] * (len(times) - len(axes)) + list(axes)
    new = [axis_of_size(size) for size in result.shape]
    for axis, count, whole in zip(padded, times, new, strict=True):
        align([axis_of_size(count), axis], [whole])
    call.define(result, new)


def _define(call: Call, axes: list[Axis]) -> None:
    for result in call.results:
        call.define(result, axes)
