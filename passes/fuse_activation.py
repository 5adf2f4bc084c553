"""act(native_linear(x, S, b))  ==  native_linear(x, S, b, activation=act)

The kernels finish a tile of sums while it is in cache; a function of each of them costs no pass over memory there. They apply
it in float32, before they round to the dtype of the outputs. Expects `ChooseKernels` before it, which calls native kernels in
inference alone. Needs no values.
"""

from __future__ import annotations

import torch
from torch import fx
from torch.nn import functional as F

from padst_compile.passes.base import RewriteRule
from padst_compile.passes.context import Context
from padst_compile.passes.graph import fake, set_arguments
from padst_compile.passes.native_calls import epilogue, is_native_linear

_aten = torch.ops.aten
_GELUS = (F.gelu, _aten.gelu.default)
_GELU_FORMS = {"none": "gelu", "tanh": "gelu_tanh"}
# In place or not: what only the activation reads may as well be overwritten.
_FUNCTIONS = {
    F.relu: "relu", torch.relu: "relu", torch.relu_: "relu", _aten.relu.default: "relu", _aten.relu_.default: "relu",
    F.silu: "silu", _aten.silu.default: "silu", _aten.silu_.default: "silu",
}  # fmt: skip
_METHODS = {"relu": "relu", "relu_": "relu"}


class FuseActivation(RewriteRule):
    """Moves a function of every output into the kernel that computes the outputs."""

    def matches(self, node: fx.Node) -> bool:
        """An activation that the kernels know, of a native product."""
        return activation_of(node) is not None and is_native_linear(_argument(node))

    def why_not(self, node: fx.Node, facts: Context) -> str | None:
        """The activation must be the product's only reader, and the first thing that happens to it."""
        linear = _argument(node)
        assert isinstance(linear, fx.Node)
        if len(linear.users) != 1:
            return f"{linear.name} has {len(linear.users)} readers"
        before = epilogue(linear)
        if before:
            return f"the kernel applies another {before[-1]} already"
        result, product = fake(node), fake(linear)
        known = result is not None and product is not None and result.dtype == product.dtype
        return None if known else "the activation changes the dtype"

    def rewrite(self, node: fx.Node, facts: Context) -> None:
        """Nothing between the two can matter: the product's result was the activation's alone."""
        linear, activation = _argument(node), activation_of(node)
        assert isinstance(linear, fx.Node)
        set_arguments(linear, activation=activation)
        node.replace_all_uses_with(linear)
        node.graph.erase_node(node)


def activation_of(node: fx.Node) -> str | None:
    """The kernels' name of the function that a node applies, if they know it."""
    if node.op == "call_method":
        return _METHODS.get(str(node.target))
    if node.op != "call_function":
        return None
    if node.target in _GELUS:
        return _GELU_FORMS.get(str(node.kwargs.get("approximate", "none")))
    return _FUNCTIONS.get(node.target)


def _argument(node: fx.Node) -> object:
    return node.args[0] if node.args else node.kwargs.get("input")
