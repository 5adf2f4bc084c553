"""row_gather(row_gather(x, S), T)  ==  row_gather(row_gather(x, S, to_panels), T, panels_of=sizes of x)

The kernel for short rows (N:M, diagonals) keeps tokens in vector lanes: it transposes what it reads, and transposes back what
it writes. Between two such products neither is needed, if the first leaves its result feature-major. Both kernels apply
permutations as orders of features in either layout, at no cost in both, so this choice changes none that placement made, and
can come after it. A gate is laid out like the result: the product that computes it leaves it feature-major too. A handful of
tokens is multiplied without any transposition, and left alone. Expects `FuseActivation`, `FuseGate` and `FuseResidual` before
it, which bring such products together. Needs no values.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from padst_compile.passes.base import RewriteRule
from padst_compile.passes.context import Context
from padst_compile.passes.graph import argument, fake, set_arguments
from padst_compile.passes.native_calls import gate_follows, is_row_gather, reads_as_input


class KeepFeatureMajor(RewriteRule):
    """Lets products leave their results in the layout in which the next products work."""

    def matches(self, node: fx.Node) -> bool:
        """A product that another one reads."""
        return is_row_gather(node) and any(_reads(user, node) for user in node.users)

    def why_not(self, node: fx.Node, facts: Context) -> str | None:
        """Nothing else may read the result, and nothing token-major be added to it."""
        if argument(node, "to_panels"):
            return f"{node.name} leaves its result feature-major already"
        others = [user.name for user in node.users if not _reads(user, node)]
        if others:
            return f"{others[0]} reads the result too"
        if argument(node, "residual") is not None:
            return "the kernel adds a residual, which is token-major"
        if not gate_follows(node, is_row_gather):
            return "the kernel reads a gate, which is token-major"
        if not _sizes_known(node):
            return "capture recorded no shapes"
        return "so few tokens are multiplied without panels" if _is_handful(node) else None

    def rewrite(self, node: fx.Node, facts: Context) -> None:
        """Tell the producer, and tell every reader the sizes that it cannot see any more."""
        sizes = _token_sizes(node)
        for user in list(node.users):
            set_arguments(user, panels_of=sizes)
        _leave_panels(node)
        if argument(node, "gate") is not None:
            _leave_panels(argument(node, "gate"))


def _leave_panels(node: fx.Node) -> None:
    features, width = argument(node, "out_features"), torch.ops.padst_native.panel_tokens()
    known = fake(node)
    assert known is not None
    panels = (math.prod(known.shape[:-1]) + width - 1) // width  # symbols stay symbols
    for key in ("example_value", "val"):
        if key in node.meta:
            node.meta[key] = known.new_empty((panels, features, width))
    set_arguments(node, to_panels=True)


def _reads(user: fx.Node, node: fx.Node) -> bool:
    """Whether `user` is a product that takes `node` as activations alone."""
    return is_row_gather(user) and reads_as_input(user, node)


def _is_handful(node: fx.Node) -> bool:
    known = fake(node)
    tokens = math.prod(known.shape[:-1]) if known is not None else None
    return isinstance(tokens, int) and tokens <= torch.ops.padst_native.handful_of_tokens()


def _sizes_known(node: fx.Node) -> bool:
    return fake(node) is not None and (argument(node, "panels_of") is not None or fake(argument(node, "x")) is not None)


def _token_sizes(node: fx.Node) -> list[Any]:
    """The sizes of the tokens that go through a product; nodes where capture left them open."""
    if argument(node, "panels_of") is not None:
        return list(argument(node, "panels_of"))
    x = argument(node, "x")
    known = fake(x)
    assert known is not None
    with node.graph.inserting_before(node):
        return [
            size if isinstance(size, int) else node.graph.call_function(torch.ops.aten.sym_size.int, (x, axis))
            for axis, size in enumerate(known.shape[:-1])
        ]
