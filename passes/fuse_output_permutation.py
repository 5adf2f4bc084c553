"""permute(linear(x, S, b, output_permutation=p), q)  ==  linear(x, S, b[q], output_permutation=p[q])

The kernels finish a tile of outputs in cache before they store it; the table reorders that store. Needs no values, so it
holds while training.
"""

from __future__ import annotations

from torch import fx

from padst_compile.passes.base import RewriteRule
from padst_compile.passes.context import Context
from padst_compile.passes.graph import PERMUTE, STRUCTURED_LINEAR, argument, is_call, obstacle_between, set_arguments
from padst_compile.passes.index_nodes import compose, select


class FuseOutputPermutation(RewriteRule):
    """Moves a permutation into the store of the structured product that it follows."""

    effect = "fused"

    def matches(self, node: fx.Node) -> bool:
        """A permuted structured product."""
        return is_call(node, PERMUTE) and is_call(node.args[0], STRUCTURED_LINEAR)

    def why_not(self, node: fx.Node, facts: Context) -> str | None:
        """The product moves to the permutation's place and must have no other reader."""
        linear = node.args[0]
        assert isinstance(linear, fx.Node)
        if len(linear.users) != 1:
            return f"{linear.name} has {len(linear.users)} readers"
        obstacle = obstacle_between(linear, node)
        return None if obstacle is None else f"{obstacle} between the product and the permutation"

    def rewrite(self, node: fx.Node, facts: Context) -> None:
        """Let the product store in the permuted order."""
        linear, table = node.args
        assert isinstance(linear, fx.Node)
        own, bias = argument(linear, "output_permutation"), argument(linear, "bias")
        linear_args = {name: argument(linear, name) for name in ("x", "values", "topology", "input_permutation")}
        with node.graph.inserting_before(node):
            composed = table if own is None else facts.hoist(compose(node.graph, own, table))
            moved_bias = None if bias is None else facts.hoist(select(node.graph, bias, table))
            fused = node.graph.call_function(STRUCTURED_LINEAR, linear.args, linear.kwargs)
        fused.meta = {**node.meta, "nn_module_stack": linear.meta.get("nn_module_stack")}
        set_arguments(fused, bias=moved_bias, output_permutation=composed, **linear_args)
        node.replace_all_uses_with(fused)
        node.graph.erase_node(node)
        node.graph.erase_node(linear)
