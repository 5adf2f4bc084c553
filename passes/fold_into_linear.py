"""permute(f(x W.T + b), p)  ==  f(x W[p].T + b[p])   for a pointwise f

A permutation behind a dense linear layer, through functions that treat all channels alike, is an order of the rows of the
layer's weight. The reordered weight is made once, so the rule runs in inference alone; the weight is watched and made
anew when it changes.
"""

from __future__ import annotations

from torch import fx

from padst_compile.passes.base import RewriteRule
from padst_compile.passes.context import Context
from padst_compile.passes.find_linears import LinearMatch, match_linear
from padst_compile.passes.graph import PERMUTE, is_call
from padst_compile.passes.index_nodes import select
from padst_compile.passes.pointwise import is_unary_pointwise

_MAX_CHAIN = 16


class FoldIntoLinear(RewriteRule):
    """Moves a permutation into the rows of the dense linear layer whose result it reorders."""

    effect = "folded"

    def matches(self, node: fx.Node) -> bool:
        """A permute whose input ends in a chain of pointwise functions (perhaps none) of something else."""
        return is_call(node, PERMUTE) and isinstance(node.args[0], fx.Node) and _source(node) is not None

    def why_not(self, node: fx.Node, facts: Context) -> str | None:
        """The chain must start at a dense linear layer of its own and be read by nothing else."""
        chain = _chain(node)
        linear = match_linear(chain[-1], facts)
        if linear is None or linear.module is not None:
            return "it does not start at a dense linear layer with parameters as weights"
        if not facts.inference:
            return "training: reordering the weight at every step costs more than reordering the activations"
        shared = next((link for link in chain if len(link.users) != 1), None)
        if shared is not None:
            return f"{shared.name} has {len(shared.users)} readers, which would all see the new order"
        if not facts.is_static(node.args[1]):
            return "the index table is computed from the inputs"
        return None

    def rewrite(self, node: fx.Node, facts: Context) -> None:
        """Reorder the rows of the weight and the bias; drop the permute."""
        linear = match_linear(_chain(node)[-1], facts)
        assert linear is not None
        _reorder_rows(linear, node.args[1], facts)
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]  # a node, by `matches`
        node.graph.erase_node(node)


def _reorder_rows(linear: LinearMatch, table: object, facts: Context) -> None:
    graph, call = linear.node.graph, linear.node
    assert linear.weight is not None
    # The table may be defined after the linear layer, so the reordered parameters go right before the call with it.
    if isinstance(table, fx.Node):
        _move_before(table, call)
    with graph.inserting_before(call):
        weight = facts.hoist(select(graph, linear.weight, table, 1 if linear.transposed else 0))
        bias = None if linear.bias is None else facts.hoist(select(graph, linear.bias, table))
    call.replace_input_with(linear.weight, weight)
    if linear.bias is not None and bias is not None:
        call.replace_input_with(linear.bias, bias)


def _move_before(node: fx.Node, anchor: fx.Node) -> None:
    """Move a static node, and what it is computed from, before `anchor` where it comes later."""
    if node < anchor:
        return
    anchor.prepend(node)
    for source in node.all_input_nodes:
        _move_before(source, node)


def _source(permute: fx.Node) -> fx.Node | None:
    chain = _chain(permute)
    return chain[-1] if chain and chain[-1].op in ("call_function", "call_module") else None


def _chain(permute: fx.Node) -> list[fx.Node]:
    """From the permute's input back through pointwise functions to the first node that is none."""
    link = permute.args[0]
    chain: list[fx.Node] = []
    while isinstance(link, fx.Node) and len(chain) < _MAX_CHAIN:
        chain.append(link)
        if not is_unary_pointwise(link):
            break
        link = link.all_input_nodes[0]
    return chain
