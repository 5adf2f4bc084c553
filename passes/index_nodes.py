"""Graph nodes over index tables and per-channel parameters; all made of static nodes, so inference computes them once."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx


def compose(graph: fx.Graph, first: Any, second: Any) -> fx.Node:
    """The table that applies `first`, then `second`: `first[second]`."""
    return graph.call_function(torch.ops.aten.index_select.default, (first, 0, second))


def select(graph: fx.Graph, tensor: Any, indices: Any, axis: int = 0) -> fx.Node:
    """`tensor` with one axis reordered: rows of a weight, entries of a bias."""
    return graph.call_function(torch.ops.aten.index_select.default, (tensor, axis, indices))


def invert(graph: fx.Graph, indices: Any) -> fx.Node:
    """The table that undoes `indices`."""
    return graph.call_function(torch.ops.aten.argsort.default, (indices,))
