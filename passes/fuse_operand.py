"""What FuseGate and FuseResidual have in common: an operator of a native product and a tensor laid out like its result.

The product moves to the place of the operator, where the other tensor is known. That changes nothing if nothing else reads the
product, and nothing between the two places means something else to it.
"""

from __future__ import annotations

import abc
import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import fx

from padst_compile.passes.base import RewriteRule, source_hash
from padst_compile.passes.context import Context
from padst_compile.passes.graph import fake, obstacle_between, set_arguments
from padst_compile.passes.native_calls import is_native_linear


class FuseOperand(RewriteRule):
    """Moves a commutative operator into the kernel that computes one of its operands.

    Attributes:
        operators: the functions of two tensors that the kernel can apply.
        argument_name: the kernel's argument for the other operand.
    """

    operators: ClassVar[tuple[Callable[..., Any], ...]]
    argument_name: ClassVar[str]

    @abc.abstractmethod
    def blocked(self, linear: fx.Node) -> str | None:
        """Why the kernel cannot apply the operator behind what it does already, as a sentence."""

    def uuid(self) -> str:
        """The rule's identity, which depends on this module too."""
        return f"{super().uuid()}-{source_hash(inspect.getmodule(FuseOperand))}"

    def matches(self, node: fx.Node) -> bool:
        """The operator on two tensors, at least one of them a native product."""
        if node.op != "call_function" or node.target not in self.operators or len(node.args) != 2 or node.kwargs:
            return False
        return all(isinstance(operand, fx.Node) for operand in node.args) and any(map(is_native_linear, node.args))

    def why_not(self, node: fx.Node, facts: Context) -> str | None:
        """The product moves to the place of the operator, must have no other reader, and its kernel takes no other shape."""
        linear, other = product_and_other(node)
        if len(linear.users) != 1:
            return f"{linear.name} has {len(linear.users)} readers"
        if other is linear:
            return "both operands are the same product"
        blocked = self.blocked(linear)
        if blocked is not None:
            return blocked
        if not alike(fake(node), fake(linear), fake(other)):
            return "the operands differ in shape or dtype, or are not contiguous"
        obstacle = obstacle_between(linear, node)
        return None if obstacle is None else f"{obstacle} between the product and what is done to it"

    def rewrite(self, node: fx.Node, facts: Context) -> None:
        """Let the kernel read the other operand, at the place of the operator, where it is known."""
        linear, other = product_and_other(node)
        set_arguments(linear, **{self.argument_name: other})
        node.replace_all_uses_with(linear)
        node.prepend(linear)
        node.graph.erase_node(node)


def product_and_other(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Of two products the one that nothing else reads, then the later one."""
    first, second = node.args
    assert isinstance(first, fx.Node)
    assert isinstance(second, fx.Node)
    pairs = [(first, second), (second, first)]
    return max((pair for pair in pairs if is_native_linear(pair[0])), key=lambda pair: (len(pair[0].users) == 1, pair[0]))


def alike(result: torch.Tensor | None, product: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    """Whether the kernel can read `other` where it writes `result`."""
    if result is None or product is None or other is None:
        return False
    return (
        result.dtype == product.dtype == other.dtype and result.shape == product.shape == other.shape and other.is_contiguous()
    )
