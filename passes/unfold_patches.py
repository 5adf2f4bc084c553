"""conv2d(x, W, b, stride=kernel)  ==  linear(patches(x), W.flatten(1), b)   without padding, dilation or groups

Patches that do not overlap are a reshape of the image, so the patch embedding of a vision transformer is a linear layer.
On a CPU the matrix product needs no reordered copy of the weight and leaves its result in the order that the next layer
reads. Needs no values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from padst_compile.passes.base import RewriteRule
from padst_compile.passes.context import Context
from padst_compile.passes.graph import fake

_CONVOLUTIONS = (F.conv2d, torch.conv2d, torch.ops.aten.conv2d.default)
_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_ANY_LAYOUT = frozenset({"flatten", "permute", "transpose"})  # readers that work on any order of memory
_DEFAULTS: dict[str, Any] = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}


class UnfoldPatches(RewriteRule):
    """Turns a convolution over patches that tile the image into a linear layer."""

    def matches(self, node: fx.Node) -> bool:
        """A two-dimensional convolution with a stride other than 1."""
        return node.op == "call_function" and node.target in _CONVOLUTIONS and _pair(_arguments(node)["stride"]) != (1, 1)

    def why_not(self, node: fx.Node, facts: Context) -> str | None:
        """The patches must tile the image exactly, and nothing else may be asked of the convolution."""
        arguments = _arguments(node)
        image, weight = fake(arguments["input"]), fake(arguments["weight"])
        if image is None or weight is None or image.dim() != 4:
            return "capture recorded no shapes of a batch of images"
        if image.device.type != "cpu":
            return "convolutions of other devices need no such help"
        if arguments["padding"] == "same" or (arguments["padding"] != "valid" and _pair(arguments["padding"]) != (0, 0)):
            return "the convolution pads"
        if _pair(arguments["dilation"]) != (1, 1) or arguments["groups"] != 1:
            return "the convolution is dilated or grouped"
        kernel = tuple(weight.shape[2:])
        if _pair(arguments["stride"]) != kernel:
            return "the patches overlap or leave gaps"
        if not all(isinstance(size, int) and size % step == 0 for size, step in zip(image.shape[2:], kernel, strict=True)):
            return "the patches do not tile the image exactly"
        strict = next((user for user in node.users if _name(user) not in _ANY_LAYOUT), None)
        return None if strict is None else f"{strict.name} may need the result in the memory order of a convolution"

    def rewrite(self, node: fx.Node, facts: Context) -> None:
        """Reshape to patches, multiply, and view the result as the image that the convolution returns."""
        arguments = _arguments(node)
        image, weight = fake(arguments["input"]), fake(arguments["weight"])
        assert image is not None
        assert weight is not None
        channels, (rows, columns) = image.shape[1], weight.shape[2:]
        down, across = image.shape[2] // rows, image.shape[3] // columns
        graph = node.graph
        with graph.inserting_before(node):
            # Functions, not methods: PyTorch's compiler caches refuse methods of nodes that capture did not see.
            grid = graph.call_function(torch.reshape, (arguments["input"], (-1, channels, down, rows, across, columns)))
            patches = graph.call_function(torch.permute, (grid, (0, 2, 4, 1, 3, 5)))
            flat = graph.call_function(torch.reshape, (patches, (-1, down, across, channels * rows * columns)))
            kernel = graph.call_function(torch.flatten, (arguments["weight"], 1))
            product = graph.call_function(F.linear, (flat, kernel, arguments["bias"]))
            result = graph.call_function(torch.permute, (product, (0, 3, 1, 2)))
        result.meta = dict(node.meta)
        node.replace_all_uses_with(result)
        graph.erase_node(node)


def _name(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "").partition(".")[0]


def _arguments(node: fx.Node) -> dict[str, Any]:
    return {**_DEFAULTS, **dict(zip(_NAMES, node.args, strict=False)), **node.kwargs}


def _pair(value: Any) -> tuple[Any, ...]:
    """A size as the pair that it stands for: Dynamo keeps `16`, `(16,)` or `(16, 16)` as the model gave it."""
    sizes = (value,) if isinstance(value, int) else tuple(value)
    return sizes * 2 if len(sizes) == 1 else sizes
