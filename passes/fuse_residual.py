"""native_linear(x, S, b, activation) + r  ==  native_linear(x, S, b, activation, residual=r)

The kernels finish a tile of sums while it is in cache; adding another tensor there spares reading the outputs again and
writing the sum. Expects `FuseActivation` before it, and `ChooseKernels` before that, which calls native kernels in inference
alone. Needs no values.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from padst_compile.passes.base import RewriteRule
from padst_compile.passes.context import Context
from padst_compile.passes.graph import argument, fake, obstacle_between, set_arguments
from padst_compile.passes.native_calls import is_native_linear

_ADDITIONS = (operator.add, torch.add, torch.ops.aten.add.Tensor)


class FuseResidual(RewriteRule):
    """Moves the addition of a tensor into the kernel that computes one of its terms."""

    def matches(self, node: fx.Node) -> bool:
        """A sum of two tensors, at least one of them a native product."""
        if node.op != "call_function" or node.target not in _ADDITIONS or len(node.args) != 2 or node.kwargs:
            return False
        return all(isinstance(term, fx.Node) for term in node.args) and any(map(is_native_linear, node.args))

    def why_not(self, node: fx.Node, facts: Context) -> str | None:
        """The product moves to the place of the sum, must have no other reader, and its kernel takes no other shape."""
        linear, residual = _product_and_residual(node)
        if len(linear.users) != 1:
            return f"{linear.name} has {len(linear.users)} readers"
        if residual is linear:
            return "both terms are the same product"
        if argument(linear, "residual") is not None:
            return "the kernel adds another tensor already"
        if not _alike(fake(node), fake(linear), fake(residual)):
            return "the terms differ in shape or dtype, or are not contiguous"
        obstacle = obstacle_between(linear, node)
        return None if obstacle is None else f"{obstacle} between the product and the sum"

    def rewrite(self, node: fx.Node, facts: Context) -> None:
        """Let the kernel add the other term, at the place of the sum, where it is known."""
        linear, residual = _product_and_residual(node)
        set_arguments(linear, residual=residual)
        node.replace_all_uses_with(linear)
        node.prepend(linear)
        node.graph.erase_node(node)


def _product_and_residual(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Of two products the one that nothing else reads, then the later one."""
    first, second = node.args
    assert isinstance(first, fx.Node)
    assert isinstance(second, fx.Node)
    terms = [(first, second), (second, first)]
    return max((pair for pair in terms if is_native_linear(pair[0])), key=lambda pair: (len(pair[0].users) == 1, pair[0]))


def _alike(result: torch.Tensor | None, product: torch.Tensor | None, residual: torch.Tensor | None) -> bool:
    if result is None or product is None or residual is None:
        return False
    return (
        result.dtype == product.dtype == residual.dtype
        and result.shape == product.shape == residual.shape
        and residual.is_contiguous()
    )
