"""dropout(x, p, training=False)  ==  x

A model in evaluation mode is captured with its dropouts. Inductor drops them, but until then they stand between a product and
what could be fused with it. Needs no values.
"""

from __future__ import annotations

import torch
from torch import fx
from torch.nn import functional as F

from padst_compile.passes.base import RewriteRule
from padst_compile.passes.context import Context

_DROPOUTS = (F.dropout, torch.ops.aten.dropout.default)


class RemoveDropout(RewriteRule):
    """Removes dropouts that do nothing."""

    def matches(self, node: fx.Node) -> bool:
        """A dropout with probability zero, or of a model in evaluation mode."""
        if node.op != "call_function" or node.target not in _DROPOUTS or not isinstance(node.args[0], fx.Node):
            return False
        probability = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)
        training = node.args[2] if len(node.args) > 2 else node.kwargs.get("training", True)
        return bool(probability == 0) or training is False

    def rewrite(self, node: fx.Node, facts: Context) -> None:
        """Eager mode returns the same tensor, too."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node.replace_all_uses_with(source)
        node.graph.erase_node(node)
