"""permute(table[i], p)  ==  permute(table, p)[i]

Looking up rows leaves their features alone: the embedding's columns take on any order. The axis that is looked up along
keeps its own, because the indices point into it.
"""

from __future__ import annotations

import torch

from padst_compile.passes.axes.registry import rule
from padst_compile.passes.axes.trace import Call, axis_of_size

aten = torch.ops.aten
_REASON = "indices point into it"


@rule(aten.embedding)
def embedding(call: Call) -> None:
    """Weight [entries, features], indices […] -> […, features]."""
    entries, features = call.axes(call.argument("weight"))
    entries.pin(_REASON)
    (result,) = call.results
    call.define(result, [*call.axes(call.argument("indices")), features])


@rule(aten.index_select)
def index_select(call: Call) -> None:
    """One axis is replaced by a list of its indices."""
    axes = list(call.axes(call.argument("self")))
    dim = call.argument("dim")
    axes[dim].pin(_REASON)
    (result,) = call.results
    axes[dim] = axis_of_size(result.shape[dim], _REASON)
    call.define(result, axes)


@rule(aten.index.Tensor)
def index(call: Call) -> None:
    """Adjacent index tensors replace their axes by their own shape; behind and before them nothing changes."""
    source, (result,) = call.argument("self"), call.results
    axes, indices = call.axes(source), call.argument("indices")
    given = [position for position, tensor in enumerate(indices) if tensor is not None]
    for tensor in call.tensors[1:]:
        for axis in call.axes(tensor):
            axis.pin("it holds indices")
    for position in given:
        axes[position].pin(_REASON)
    first, last = given[0], given[-1]
    boolean = any(indices[position].dtype in (torch.bool, torch.uint8) for position in given)
    if boolean or last - first + 1 != len(given):
        call.pin_all("indexing in a way that moves axes")
        return
    kept = [*axes[:first], *axes[last + 1 :]]
    looked_up = result.dim() - len(kept)
    new = [axis_of_size(size, _REASON) for size in result.shape[first : first + looked_up]]
    call.define(result, [*axes[:first], *new, *axes[last + 1 :]])


@rule(aten.gather, aten.argmax, aten.argmin, aten.sort, aten.topk)
def along(call: Call) -> None:
    """Positions along an axis become values: all of it keeps its order."""
    call.pin_all("its positions are used as values")
