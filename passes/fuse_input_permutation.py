"""linear(permute(x, p), S, input_permutation=q)  ==  linear(x, S, input_permutation=p[q])

The kernels read their tokens tile by tile and apply the table while they copy a tile: the gather costs no pass over
memory of its own. Needs no values, so it holds while training.
"""

from __future__ import annotations

from torch import fx

from padst_compile.passes.base import RewriteRule
from padst_compile.passes.context import Context
from padst_compile.passes.graph import PERMUTE, STRUCTURED_LINEAR, argument, is_call, obstacle_between, set_arguments
from padst_compile.passes.index_nodes import compose


class FuseInputPermutation(RewriteRule):
    """Moves a permutation into the load of the structured product that reads it."""

    effect = "fused"

    def matches(self, node: fx.Node) -> bool:
        """A structured product of a permuted input."""
        return is_call(node, STRUCTURED_LINEAR) and is_call(node.args[0], PERMUTE)

    def why_not(self, node: fx.Node, facts: Context) -> str | None:
        """Only products may read the permutation, or it would stay; and nothing may write to its input in between."""
        permute = node.args[0]
        assert isinstance(permute, fx.Node)
        other = next((reader for reader in permute.users if not _reads_as_input(reader, permute)), None)
        if other is not None:
            return f"{permute.name} is read by {other.name} too, so it stays and the product reads its result"
        obstacle = obstacle_between(permute, node)
        return None if obstacle is None else f"{obstacle} between the permutation and the product"

    def rewrite(self, node: fx.Node, facts: Context) -> None:
        """Hand the table to the product."""
        permute = node.args[0]
        assert isinstance(permute, fx.Node)
        x, table = permute.args
        own = argument(node, "input_permutation")
        if own is not None:
            with node.graph.inserting_before(node):
                table = facts.hoist(compose(node.graph, table, own))
        set_arguments(node, x=x, input_permutation=table)


def _reads_as_input(reader: fx.Node, permute: fx.Node) -> bool:
    """Whether a node is a structured product of the permuted activations."""
    return is_call(reader, STRUCTURED_LINEAR) and reader.args[0] is permute
