"""permute(permute(x, p), q)  ==  permute(x, p[q])

`permute(x, p)[..., i] = x[..., p[i]]`, so the outer index table selects from the inner one. The composed table is itself
a graph node: the rule needs no values, holds while training, and costs one gather over the table instead of one over the
activations.
"""

from __future__ import annotations

from torch import fx

from padst_compile.passes.base import RewriteRule
from padst_compile.passes.context import Context
from padst_compile.passes.graph import PERMUTE, is_call, obstacle_between
from padst_compile.passes.index_nodes import compose


class ComposePermutations(RewriteRule):
    """Turns a chain of two permutations into one."""

    effect = "composed"

    def matches(self, node: fx.Node) -> bool:
        """The outer permute of a chain."""
        return is_call(node, PERMUTE) and is_call(node.args[0], PERMUTE)

    def why_not(self, node: fx.Node, facts: Context) -> str | None:
        """The inner result must have no other reader, or both gathers would stay."""
        inner = node.args[0]
        assert isinstance(inner, fx.Node)
        if len(inner.users) != 1:
            return f"{inner.name} has {len(inner.users)} readers: composing would add a gather, not save one"
        obstacle = obstacle_between(inner, node)
        return None if obstacle is None else f"{obstacle} between the two permutations"

    def rewrite(self, node: fx.Node, facts: Context) -> None:
        """Index the inner table by the outer one."""
        inner, outer_indices = node.args
        assert isinstance(inner, fx.Node)
        x, inner_indices = inner.args
        with node.graph.inserting_before(node):
            node.args = (x, facts.hoist(compose(node.graph, inner_indices, outer_indices)))
