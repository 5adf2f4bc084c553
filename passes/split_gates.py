"""native_linear(x, S, b).chunk(2)  ==  native_linear(x, S[:h], b[:h]), native_linear(x, S[h:], b[h:])

Gated layers that are written as one linear layer, `a, b = proj(x).chunk(2, -1)` and `a * gelu(b)` (timm's GluMlp, diffusers'
GEGLU, Phi-3's gate_up_proj), multiply two halves of one product. Each half of the rows of S is a product of its own, so that
`FuseActivation` and `FuseGate`, which it expects behind it, apply one half where the kernel of the other writes its results:
the wide tensor of both is never written. With few tokens that saves less than a second call costs. The cut must lie between
block rows, or between groups of rows that share a choice (N:M); a diagonal runs through both halves.

Where the cut lies among the blocks is a value of the row pointers, which are watched, and so is a table that reorders the
outputs of each half. Expects `ChooseKernels` before it, which calls native kernels in inference alone: what runs dense or is
trained stays one product.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import fx

from padst_compile.passes.base import RewriteRule
from padst_compile.passes.context import Context
from padst_compile.passes.fuse_activation import activation_of
from padst_compile.passes.fuse_gate import FuseGate
from padst_compile.passes.graph import argument, fake, fake_meta, rows, set_arguments
from padst_compile.passes.native_calls import epilogue, is_block_linear, is_native_linear, is_nm_linear, note_second_half

_aten = torch.ops.aten
_DIVISIONS = frozenset({"chunk", "split", "tensor_split"})
_LEAST_TOKENS = 64  # with which the tensor that is not written outweighs a second call
_Arguments: TypeAlias = Mapping[str, Any]


class SplitGates(RewriteRule):
    """Makes two products of one whose halves are multiplied with each other."""

    def matches(self, node: fx.Node) -> bool:
        """A native product that is divided in two."""
        return _name(node) in _DIVISIONS and is_native_linear(_divided(node)) and _pieces(node) is not None

    def why_not(self, node: fx.Node, facts: Context) -> str | None:
        """Nothing else may read the product, a kernel must be able to apply the gate, and the rows of S fall in two."""
        linear, pieces = _divided(node), _pieces(node)
        assert isinstance(linear, fx.Node)
        assert pieces is not None
        if len(linear.users) != 1:
            return f"{linear.name} has {len(linear.users)} readers"
        if fake(linear) is None or any(fake(piece) is None for piece in pieces):
            return "capture recorded no shapes"
        half = argument(linear, "out_features") // 2
        if any(2 * _shape(piece)[-1] != argument(linear, "out_features") for piece in pieces):
            return "its features are not divided in the middle"
        before = epilogue(linear)
        if before:
            return f"the kernel applies another {before[-1]} already"
        if not any(map(_is_factor, pieces)):
            return "no half is multiplied by another tensor right away"
        if rows(fake(linear)) < _LEAST_TOKENS:
            return f"two kernels cost more than they save with fewer than {_LEAST_TOKENS} tokens"
        return _why_rows_stay(linear, half, facts) or _why_order_stays(linear, half, facts)

    def rewrite(self, node: fx.Node, facts: Context) -> None:
        """Cut the parameters, and multiply twice; the first half keeps the product's node."""
        linear, pieces = _divided(node), _pieces(node)
        assert isinstance(linear, fx.Node)
        assert pieces is not None
        graph, half, target = node.graph, argument(linear, "out_features") // 2, linear.target
        assert callable(target)
        with graph.inserting_before(linear):
            arguments = [
                {**_weights(linear, half, second, facts), **_outputs(linear, half, second, facts), "out_features": half}
                for second in (False, True)
            ]
        with graph.inserting_after(linear):
            other = graph.call_function(target, linear.args, linear.kwargs)
        for product, own, piece in zip((linear, other), arguments, pieces, strict=True):
            product.meta = {**linear.meta, **_fake_half(linear, piece)}
            set_arguments(product, **own)
            piece.replace_all_uses_with(product)
            graph.erase_node(piece)
        note_second_half(linear, other)
        graph.erase_node(node)


def _name(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "").partition(".")[0]


def _divided(node: fx.Node) -> object:
    return node.args[0] if node.args else None


def _pieces(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The nodes of the first and the second piece, if these are all that is read of a division."""
    gets = [user for user in node.users if user.op == "call_function" and user.target is operator.getitem]
    found = {user.args[1]: user for user in gets if isinstance(user.args[1], int)}
    return (found[0], found[1]) if len(node.users) == 2 and found.keys() == {0, 1} else None


def _shape(node: fx.Node) -> torch.Size:
    known = fake(node)
    assert known is not None
    return known.shape


def _is_factor(piece: fx.Node) -> bool:
    """Whether a piece, or a function of it that kernels know, is multiplied by another tensor of its shape."""
    node, reader = piece, _only_reader(piece)
    if reader is not None and activation_of(reader) is not None:
        node, reader = reader, _only_reader(reader)
    if reader is None or reader.target not in FuseGate.operators or len(reader.args) != 2 or reader.kwargs:
        return False
    others = [operand for operand in reader.args if operand is not node]
    return len(others) == 1 and (other := fake(others[0])) is not None and other.shape == _shape(piece)


def _only_reader(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _why_rows_stay(linear: fx.Node, half: int, facts: Context) -> str | None:
    """What keeps S from falling in two between its rows."""
    names = ("values", "row_pointers", "columns") if is_block_linear(linear) else ("values", "offsets")
    if not (is_block_linear(linear) or is_nm_linear(linear)):
        return "its diagonals run through both halves"
    if not all(facts.is_static(argument(linear, name)) for name in names):
        return "the weights are computed from the inputs"
    if half % _row_group(linear, facts):
        return f"{_row_group(linear, facts)} outputs that belong together lie in both halves"
    return None


def _why_order_stays(linear: fx.Node, half: int, facts: Context) -> str | None:
    table = argument(linear, "output_permutation")
    if table is None:
        return None
    if not facts.is_static(table):
        return "the order of its outputs is computed from the inputs"
    return None if bool((facts.value(table)[:half] < half).all()) else "the order of its outputs mixes the halves"


def _row_group(linear: fx.Node, facts: Context) -> int:
    """How many outputs are stored together: rows of a block, or those that share a choice; the last axis of the values."""
    return int(facts.value(argument(linear, "values")).shape[2])


def _weights(linear: fx.Node, half: int, second: bool, facts: Context) -> _Arguments:
    """The weights of one half."""
    values, group = argument(linear, "values"), half // _row_group(linear, facts)
    if is_nm_linear(linear):
        first, last = (group, 2 * group) if second else (0, group)
        return {name: _cut(argument(linear, name), first, last, facts) for name in ("values", "offsets")}
    pointers, columns = argument(linear, "row_pointers"), argument(linear, "columns")
    known = facts.assume(pointers)
    middle, total = int(known[group]), int(known[-1])
    if not second:
        blocks, own = (0, middle), _cut(pointers, 0, group + 1, facts)
    else:
        blocks, own = (middle, total), _less(_cut(pointers, group, 2 * group + 1, facts), middle, facts)
    return {"values": _cut(values, *blocks, facts), "row_pointers": own, "columns": _cut(columns, *blocks, facts)}


def _outputs(linear: fx.Node, half: int, second: bool, facts: Context) -> _Arguments:
    """The bias of one half, and the order of its outputs."""
    bias, table = argument(linear, "bias"), argument(linear, "output_permutation")
    first, last = (half, 2 * half) if second else (0, half)
    bias = None if bias is None else _cut(bias, first, last, facts)
    if table is not None:
        facts.assume(table)
        table = _less(_cut(table, first, last, facts), first, facts)
    return {"bias": bias, "output_permutation": table}


def _cut(tensor: fx.Node, first: int, last: int, facts: Context) -> fx.Node:
    return facts.hoist(tensor.graph.call_function(_aten.slice.Tensor, (tensor, 0, first, last)))


def _less(indices: fx.Node, offset: int, facts: Context) -> fx.Node:
    return facts.hoist(indices.graph.call_function(_aten.sub.Scalar, (indices, offset))) if offset else indices


def _fake_half(linear: fx.Node, piece: fx.Node) -> dict[str, Any]:
    """What the product of one half returns: contiguous, as a piece of the whole was not."""
    return {key: known.new_empty(_shape(piece)) for key, known in fake_meta(linear).items() if isinstance(known, torch.Tensor)}
