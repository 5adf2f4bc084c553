"""permute(norm(x, w, b), p)  ==  norm(permute(x, p), w[p], b[p])

Mean, variance and root mean square over the last axis do not depend on its order, so LayerNorm and RMSNorm commute with a
permutation once their weights are permuted too. The rule fires where the permutation then meets another one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from padst_compile.passes.base import RewriteRule
from padst_compile.passes.context import Context
from padst_compile.passes.graph import PERMUTE, fake_meta, is_call, obstacle_between
from padst_compile.passes.index_nodes import select

_NORMS = (F.layer_norm, F.rms_norm, torch.ops.aten.layer_norm.default, torch.ops.aten.rms_norm.default)
_NAMES = ("input", "normalized_shape", "weight", "bias", "eps")


class FoldIntoNorm(RewriteRule):
    """Moves a permutation from behind a norm to before it, into the norm's weights."""

    effect = "moved"

    def matches(self, node: fx.Node) -> bool:
        """A permuted norm."""
        norm = node.args[0] if is_call(node, PERMUTE) else None
        return isinstance(norm, fx.Node) and norm.op == "call_function" and norm.target in _NORMS

    def why_not(self, node: fx.Node, facts: Context) -> str | None:
        """Only the last axis, only one reader, and only where the moved permutation meets another."""
        norm = node.args[0]
        assert isinstance(norm, fx.Node)
        if len(norm.users) != 1:
            return f"{norm.name} has {len(norm.users)} readers, which would all see the new order"
        arguments = _arguments(norm)
        if len(arguments["normalized_shape"]) != 1:
            return "the norm spans several axes"
        if not is_call(arguments["input"], PERMUTE):
            return "no other permutation comes before the norm to meet this one"
        parameters = [arguments[name] for name in ("weight", "bias") if arguments.get(name) is not None]
        if not all(facts.is_static(parameter) for parameter in parameters):
            return "the norm's weights are computed from the inputs"
        obstacle = obstacle_between(norm, node)
        return None if obstacle is None else f"{obstacle} between the norm and the permutation"

    def rewrite(self, node: fx.Node, facts: Context) -> None:
        """Permute the norm's input and its weights."""
        norm, table = node.args
        assert isinstance(norm, fx.Node)
        arguments = _arguments(norm)
        with node.graph.inserting_before(node):
            moved = node.graph.call_function(PERMUTE, (arguments["input"], table))
            moved.meta = {**node.meta, **fake_meta(arguments["input"])}  # under autocast the norm may change the dtype
            for name in ("weight", "bias"):
                if arguments.get(name) is not None:
                    arguments[name] = facts.hoist(select(node.graph, arguments[name], table))
            arguments["input"] = moved
            ordered = [arguments[name] for name in _names(norm) if name in arguments]
            result = node.graph.call_function(norm.target, tuple(ordered))  # type: ignore[arg-type]  # a function
        result.meta = dict(node.meta)
        node.replace_all_uses_with(result)
        node.graph.erase_node(node)
        node.graph.erase_node(norm)


def _names(norm: fx.Node) -> tuple[str, ...]:
    is_rms = norm.target in (F.rms_norm, torch.ops.aten.rms_norm.default)
    return tuple(name for name in _NAMES if not (is_rms and name == "bias"))


def _arguments(norm: fx.Node) -> dict[str, Any]:
    arguments: dict[str, Any] = dict.fromkeys(_names(norm)[:-1])  # eps keeps its default where it is not given
    arguments.update(zip(_names(norm), norm.args, strict=False))
    return {**arguments, **{name: value for name, value in norm.kwargs.items() if name in _names(norm)}}
