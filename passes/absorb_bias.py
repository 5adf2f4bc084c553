"""linear(x, S) + b  ==  linear(x, S, b)

A layer that permutes its output adds its bias after the permutation; once the permutation is fused into the store, the
addition can be too.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from padst_compile.passes.base import RewriteRule
from padst_compile.passes.context import Context
from padst_compile.passes.graph import STRUCTURED_LINEAR, argument, fake, is_call, obstacle_between, set_arguments

_ADDITIONS = (operator.add, torch.add, torch.ops.aten.add.Tensor)


class AbsorbBias(RewriteRule):
    """Moves the addition of a parameter into the structured product before it."""

    def matches(self, node: fx.Node) -> bool:
        """A sum of a structured product and something else."""
        return (
            node.op == "call_function"
            and node.target in _ADDITIONS
            and set(node.kwargs) <= {"input", "self", "other"}
            and len(_terms(node)) == 2
            and is_call(_terms(node)[0], STRUCTURED_LINEAR)
        )

    def why_not(self, node: fx.Node, facts: Context) -> str | None:
        """The product must be bias-free and read by this sum alone, the addend a vector of parameters."""
        linear, addend = _terms(node)
        addend = _uncast(addend)
        assert isinstance(linear, fx.Node)
        if argument(linear, "bias") is not None:
            return "the product has a bias already"
        if len(linear.users) != 1:
            return f"{linear.name} has {len(linear.users)} readers"
        if not isinstance(addend, fx.Node) or not facts.is_static(addend):
            return "the addend is no parameter"
        if facts.value(addend).shape != (argument(linear, "out_features"),):
            return "the addend is no vector over the outputs"
        obstacle = obstacle_between(linear, node)
        if obstacle is not None:
            return f"{obstacle} between the product and the sum"
        result, product = fake(node), fake(linear)
        mixed = result is not None and product is not None and result.dtype != product.dtype
        return "the addition changes the dtype" if mixed else None

    def rewrite(self, node: fx.Node, facts: Context) -> None:
        """Give the product its bias, at the place of the sum, where the addend is known."""
        linear, addend = _terms(node)
        assert isinstance(linear, fx.Node)
        set_arguments(linear, bias=_uncast(addend))
        node.replace_all_uses_with(linear)
        node.prepend(linear)
        node.graph.erase_node(node)
        if addend is not _uncast(addend) and not addend.users:
            node.graph.erase_node(addend)


def _uncast(addend: Any) -> Any:
    """What an addend is without a cast to the dtype that it has already, as a layer that permutes its output writes."""
    if not isinstance(addend, fx.Node) or addend.op != "call_method" or addend.target != "to" or addend.kwargs:
        return addend
    source, *rest = addend.args
    known = fake(source)
    return source if known is not None and rest == [known.dtype] else addend


def _terms(node: fx.Node) -> tuple[Any, ...]:
    """Both terms of a sum, given by position or by keyword."""
    first = node.args or tuple(node.kwargs[name] for name in ("input", "self") if name in node.kwargs)
    return (*first, *(node.kwargs[name] for name in ("other",) if name in node.kwargs))
