"""conv(permute(x, p), permute(w, p))  ==  conv(x, w)   over input channels;   permute(conv(x, w), q)  ==  conv(x, w[q])

Channels of a convolution behave like the features of a linear layer; positions keep their places. A depthwise convolution
carries the order of its channels through.
"""

from __future__ import annotations

import torch

from padst_compile.passes.axes.axis import unify
from padst_compile.passes.axes.registry import rule
from padst_compile.passes.axes.trace import Call, axis_of_size

aten = torch.ops.aten


@rule(aten.convolution, aten._convolution)
def convolution(call: Call) -> None:
    """Input [batch, in, …], weight [out, in / groups, …]."""
    source, weight, bias = (call.argument(name) for name in ("input", "weight", "bias"))
    inputs, kernel, (result,) = call.axes(source), call.axes(weight), call.results
    batch, channels, *positions = inputs
    for axis in (*positions, *kernel[2:]):
        axis.pin("a convolution goes along it")
    call.graph.mixed += positions
    outputs = kernel[0]
    groups = call.argument("groups")
    if call.argument("transposed"):
        call.pin_all("a transposed convolution")
        return
    if groups == 1:
        unify(channels, kernel[1])
    elif groups == source.shape[1] == result.shape[1]:
        unify(channels, outputs)
    else:
        channels.pin("a grouped convolution divides it")
        outputs.pin("a grouped convolution divides it")
        kernel[1].pin("a grouped convolution divides it")
    if bias is not None:
        unify(call.axes(bias)[0], outputs)
    call.define(result, [batch, outputs, *(axis_of_size(size, "a convolution made it") for size in result.shape[2:])])


@rule(
    aten.max_pool2d_with_indices, aten.avg_pool2d, aten._adaptive_avg_pool2d, aten.adaptive_avg_pool2d, aten.avg_pool1d,
    aten._upsample_bicubic2d_aa, aten.upsample_bicubic2d, aten.upsample_bilinear2d, aten.upsample_nearest2d,
)  # fmt: skip
def pool(call: Call) -> None:
    """Positions are combined; channels are left alone."""
    source = call.tensors[0]
    axes = call.axes(source)
    spatial = axes[2:] if source.dim() > 3 else axes[1:]  # [batch, channels, height, width]
    for axis in spatial:
        axis.pin("positions are pooled along it")
    call.graph.mixed += spatial
    for result in call.results:
        kept = axes[: source.dim() - len(spatial)]
        sizes = result.shape[len(kept) :]
        call.define(result, [*kept, *(axis_of_size(size, "pooling made it") for size in sizes)])
