"""linear(x, diagonals, in=p, out=q)  ==  linear(x, blocks, in=p[s], out=t[q])

Diagonals that were chosen in whole residue classes are dense blocks between two stride permutations `s` and `t`, see
`kernels/diagonal/blocks.py`. Block kernels are faster, and the stride permutations are tables like any others: after this rule
`PlacePermutations` folds them into the neighbours. Between two layers over the same hidden features they cancel.

In inference alone, where the reordered values are made once. While training, `kernels/dispatch.py` folds in each call, which
keeps the gradients those of the diagonals. Needs no values.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from padst_compile.kernels import dispatch
from padst_compile.kernels.diagonal.blocks import block_size
from padst_compile.passes.base import RewriteRule
from padst_compile.passes.context import Context
from padst_compile.passes.graph import STRUCTURED_LINEAR, argument, fake, is_call, set_arguments
from padst_compile.passes.index_nodes import compose
from padst_compile.structures import Block, Diagonal, Shape, parse

FOLDED_FROM = "padst_folded_from"  # the structure of a product that is one of blocks now
FOLDED_ACTIVE = "padst_folded_active"  # the weights of such a product, where its blocks have zeros beside them
_EQUAL_ROWS = "padst_equal_rows"  # the row pointers of such a product that are equally far apart, whatever the offsets
_aten = torch.ops.aten


class FoldDiagonals(RewriteRule):
    """Makes block products of diagonal ones."""

    def matches(self, node: fx.Node) -> bool:
        """A product of diagonals in classes."""
        return _structure(node) is not None

    def why_not(self, node: fx.Node, facts: Context) -> str | None:
        """There must be a kernel for the blocks, and the weights must be known before the inputs."""
        structure, result = _structure(node), fake(node)
        assert structure is not None
        if not facts.inference:
            return "training: each call folds them by itself"
        if result is None or fake(argument(node, "x")) is None:
            return "capture recorded no shapes"
        if not all(map(facts.is_static, [argument(node, "values"), *argument(node, "topology")])):
            return "the weights are computed from the inputs"
        if dispatch.folds_into_blocks(structure, _shape(node), result.device, result.dtype):
            return None
        return f"no kernel is faster with {block_size(structure, _shape(node)).to_string()}"

    def rewrite(self, node: fx.Node, facts: Context) -> None:
        """Compute tables and values from those of the diagonals."""
        structure, shape = _structure(node), _shape(node)
        assert structure is not None
        (offsets,), sizes = argument(node, "topology"), (shape.out_features, shape.in_features, argument(node, "structure"))
        with node.graph.inserting_before(node):
            tables = made(node, facts, torch.ops.padst.diagonal_blocks.default, offsets, *sizes)
            flat = made(node, facts, _aten.reshape.default, argument(node, "values"), [-1])
            multiply_blocks(node, facts, block_size(structure, shape), tables, flat)
        node.meta[_EQUAL_ROWS] = argument(node, "topology")[0].name


def has_equal_rows(node: fx.Node) -> bool:
    """Whether every block row of a product is known to hold equally many blocks, as those of diagonals in classes do."""
    return bool(node.meta.get(_EQUAL_ROWS) == argument(node, "topology")[0].name)


def made(node: fx.Node, facts: Context, target: Any, *arguments: Any) -> fx.Node:
    """A call in the graph of `node`, hoisted where that may be."""
    return facts.hoist(node.graph.call_function(target, arguments))


def multiply_blocks(
    node: fx.Node, facts: Context, blocks: Block, tables: fx.Node, flat: fx.Node, *, reads: bool = True, writes: bool = True
) -> None:
    """Make a product of diagonals one of blocks, and compose the tables around these with those that are there.

    Args:
        node: the product, before which nodes are being inserted.
        facts: of its graph.
        blocks: the structure that it shall have.
        tables: makes row pointers, columns, entries, input permutation and output permutation.
        flat: the values that entries are indices of.
        reads: whether the input permutation moves anything.
        writes: whether the output permutation does.
    """
    graph, into, out = node.graph, argument(node, "input_permutation"), argument(node, "output_permutation")
    parts = [made(node, facts, operator.getitem, tables, place) for place in range(5)]
    pointers, columns, entries, before, behind = parts
    reordered = made(node, facts, _aten.index_select.default, flat, 0, entries)
    values = made(node, facts, _aten.reshape.default, reordered, [-1, blocks.columns, blocks.rows])
    if reads:
        into = before if into is None else facts.hoist(compose(graph, into, before))
    if writes:
        out = behind if out is None else facts.hoist(compose(graph, behind, out))
    node.meta[FOLDED_FROM] = argument(node, "structure")
    set_arguments(
        node,
        values=values,
        topology=[pointers, columns],
        input_permutation=into,
        output_permutation=out,
        structure=blocks.to_string(),
    )


def _structure(node: fx.Node) -> Diagonal | None:
    """The structure of a product of diagonals in classes; None for all else."""
    structure = parse(argument(node, "structure")) if is_call(node, STRUCTURED_LINEAR) else None
    return structure if isinstance(structure, Diagonal) and structure.group > 1 else None


def _shape(node: fx.Node) -> Shape:
    x = fake(argument(node, "x"))
    assert x is not None
    return Shape(argument(node, "out_features"), int(x.shape[-1]))
