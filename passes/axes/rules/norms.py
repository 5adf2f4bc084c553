"""norm(permute(x, p), w[p], b[p])  ==  permute(norm(x, w, b), p)

Mean, variance and root mean square over an axis do not depend on its order; a norm's weights are reordered with it.
"""

from __future__ import annotations

import torch

from padst_compile.passes.axes.axis import unify
from padst_compile.passes.axes.registry import rule
from padst_compile.passes.axes.rules.pointwise import broadcast
from padst_compile.passes.axes.trace import Call, axis_of_size

aten = torch.ops.aten


@rule(aten.native_layer_norm, aten.layer_norm, aten.rms_norm, aten._fused_rms_norm)
def layer_norm(call: Call) -> None:
    """Over the last axes; weights belong to these."""
    axes = call.axes(call.argument("input"))
    normalised = axes[len(axes) - len(call.argument("normalized_shape")) :]
    for name in ("weight", "bias"):
        parameter = _optional(call, name)
        if parameter is not None:
            broadcast(call.axes(parameter), normalised)
    call.graph.mixed += normalised
    result, *statistics = call.results
    call.define(result, axes)
    for statistic in statistics:
        sizes = [axis_of_size(size) for size in statistic.shape]
        call.define(statistic, [size if size.size == 1 else axis for axis, size in zip(axes, sizes, strict=True)])


@rule(
    aten.native_batch_norm, aten.batch_norm, aten.cudnn_batch_norm, aten._native_batch_norm_legit_no_training,
    aten._native_batch_norm_legit, aten._batch_norm_no_update, aten.miopen_batch_norm,
)  # fmt: skip
def batch_norm(call: Call) -> None:
    """Per channel, the second axis; weights and statistics belong to it."""
    source = call.argument("input")
    axes = call.axes(source)
    call.graph.mixed += [axes[0], *axes[2:]]
    for tensor in call.tensors:
        if tensor is not source and tensor.dim() == 1:
            unify(call.axes(tensor)[0], axes[1])
    result, *statistics = call.results
    call.define(result, axes)
    for statistic in statistics:
        call.fresh(statistic, "statistics of a batch norm")


@rule(aten._softmax, aten.softmax, aten._log_softmax, aten.log_softmax, aten._safe_softmax)
def softmax(call: Call) -> None:
    """Along any axis: exponentials over their sum."""
    source = call.argument("self")
    axes = call.axes(source)
    call.graph.mixed.append(axes[call.argument("dim")])
    for result in call.results:
        call.define(result, axes)


def _optional(call: Call, name: str) -> torch.Tensor | None:
    try:
        value = call.argument(name)
    except KeyError:
        return None
    return value if isinstance(value, torch.Tensor) else None
