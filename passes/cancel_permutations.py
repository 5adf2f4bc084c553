"""permute(x, p)  ==  x   where p is the identity

A permutation and its inverse meet as their composition, which is the identity; so this rule, after composition, is what
makes `Π⁻¹ Π` vanish. Where the graph itself computes the one table from the other (`argsort(p)[p]`) no values are needed, and
the rule holds while training. Otherwise it looks at the table's values, so it runs in inference alone, and the table is
watched: when the permutation changes, the graph is rewritten from the start.
"""

from __future__ import annotations

import torch
from torch import fx

from padst_compile.passes.base import RewriteRule
from padst_compile.passes.context import Context
from padst_compile.passes.graph import PERMUTE, STRUCTURED_LINEAR, is_call, obstacle_between
from padst_compile.permutation import is_identity


class CancelPermutations(RewriteRule):
    """Removes permutations that move nothing."""

    effect = "cancelled"

    def matches(self, node: fx.Node) -> bool:
        """Any permute."""
        return is_call(node, PERMUTE)

    def why_not(self, node: fx.Node, facts: Context) -> str | None:
        """The table must be known, and be the identity."""
        _, indices = node.args
        if is_inverse_pair(indices):
            return why_no_copy(node)
        if not facts.inference:
            return "training: the permutation's values may change at any step"
        if not isinstance(indices, fx.Node) or not facts.is_static(indices):
            return "the index table is computed from the inputs"
        if not is_identity(facts.value(indices)):
            return "the permutation moves features"
        return why_no_copy(node)

    def rewrite(self, node: fx.Node, facts: Context) -> None:
        """Read the input itself, and watch the table."""
        x, indices = node.args
        assert isinstance(x, fx.Node)
        assert isinstance(indices, fx.Node)
        if not is_inverse_pair(indices):
            facts.assume(indices)
        node.replace_all_uses_with(x)
        node.graph.erase_node(node)


def is_inverse_pair(table: object) -> bool:
    """Whether a table is composed of an index tensor and what `argsort` makes of the same."""
    if not is_call(table, torch.ops.aten.index_select.default):
        return False
    first, dim, second = table.args  # type: ignore[attr-defined]  # a node
    return dim == 0 and (_same(_sorted_from(first), second) or _same(_sorted_from(second), first))


def _same(a: object, b: object) -> bool:
    """Whether two nodes are one, or read the same attribute."""
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return False
    return a is b or (a.op == b.op == "get_attr" and a.target == b.target)


def _sorted_from(node: object) -> object:
    """What a node is the `argsort` of, but for casts."""
    while isinstance(node, fx.Node) and node.op == "call_method" and node.target in ("to", "int", "long"):
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.kwargs or len(node.args) != 1:
        return None
    by_method = node.op == "call_method" and node.target == "argsort"
    return node.args[0] if by_method or node.target in (torch.argsort, torch.ops.aten.argsort.default) else None


def why_no_copy(permute: fx.Node) -> str | None:
    """The result of a permutation is a tensor of its own: why its readers need that, or None where its input serves as well."""
    source = permute.args[0]
    assert isinstance(source, fx.Node)
    readers = list(permute.users)
    if any(reader.op == "output" for reader in readers) and (source.op == "placeholder" or len(source.users) > 1):
        return "the graph returns the result, which must not be the tensor that was permuted"
    # Results of our own ops share no memory with x; what any other reader returns may, and may be written to later.
    safe = all(is_call(reader, PERMUTE) or is_call(reader, STRUCTURED_LINEAR) for reader in readers)
    obstacle = obstacle_between(permute, max(readers) if safe and readers else None)
    return None if obstacle is None else f"{obstacle} while the result is in use"
