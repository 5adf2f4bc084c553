"""0.5 x (1 + tanh(u))  ==  x sigmoid(2 u)

The tanh form of GELU is a product with a gate that an exponential computes in a third of the time of a hyperbolic tangent, and
without the cancellation of `1 + tanh(u)` for negative u. Expects `FuseActivation` before it, whose kernels are faster still,
and takes what that left: `gelu(x, approximate="tanh")`, and products that are written out. Needs no values.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from padst_compile.passes.base import RewriteRule
from padst_compile.passes.context import Context
from padst_compile.passes.graph import fake, obstacle_between

_aten = torch.ops.aten
_PRODUCTS = (operator.mul, torch.mul, _aten.mul.Tensor)
_SUMS = (operator.add, torch.add, _aten.add.Tensor)
_TANHS = (torch.tanh, F.tanh, _aten.tanh.default)
_GELUS = (F.gelu, _aten.gelu.default)
_SCALE = math.sqrt(2 / math.pi)


class TanhGate(RewriteRule):
    """Computes the tanh form of GELU with a sigmoid."""

    def matches(self, node: fx.Node) -> bool:
        """The tanh form of GELU, or a product of half of something and one plus a hyperbolic tangent."""
        return _is_gelu(node) or _parts(node) is not None

    def why_not(self, node: fx.Node, facts: Context) -> str | None:
        """Floating point on a CPU, nothing written in between, and the tangent needed by nothing else."""
        result = fake(node)
        if result is None or not result.is_floating_point() or result.device.type != "cpu":
            return "the gain is known for floating point on CPUs alone"
        return None if _is_gelu(node) else _why_not_product(node, result.dtype)

    def rewrite(self, node: fx.Node, facts: Context) -> None:
        """One gate for the call, or for three products and sums."""
        if _is_gelu(node):
            _rewrite_gelu(node)
        else:
            _rewrite_product(node)


def _is_gelu(node: fx.Node) -> bool:
    known = node.op == "call_function" and node.target in _GELUS and len(node.args) == 1
    return known and node.kwargs == {"approximate": "tanh"}


def _rewrite_gelu(node: fx.Node) -> None:
    """By the definition of the call, with its constants; in float32 at least, like the call."""
    result, graph = fake(node), node.graph
    assert result is not None
    narrow = result.dtype.itemsize < torch.float32.itemsize
    with graph.inserting_before(node):
        x = _cast(graph, node.args[0], torch.float32) if narrow else node.args[0]
        square = graph.call_function(operator.mul, (x, x))
        cube = graph.call_function(operator.mul, (graph.call_function(operator.mul, (square, x)), 0.044715))
        exponent = graph.call_function(operator.mul, (graph.call_function(operator.add, (x, cube)), _SCALE))
        doubled = graph.call_function(operator.mul, (exponent, 2.0))
        product = graph.call_function(operator.mul, (x, graph.call_function(torch.sigmoid, (doubled,))))
        if narrow:
            product = _cast(graph, product, result.dtype)
    product.meta = dict(node.meta)
    node.replace_all_uses_with(product)
    graph.erase_node(node)


def _why_not_product(node: fx.Node, dtype: torch.dtype) -> str | None:
    parts = _parts(node)
    assert parts is not None
    x, tanh, links = parts
    if any(fake(other) is None or fake(other).dtype != dtype for other in (x, tanh)):  # type: ignore[union-attr]
        return "the parts differ in dtype"
    shared = next((link for link in links if len(link.users) != 1), None)
    if shared is not None:
        return f"{shared.name} has {len(shared.users)} readers"
    first = min(links)
    obstacle = obstacle_between(first, node)
    return None if obstacle is None else f"{obstacle} between {first.name} and {node.name}"


def _cast(graph: fx.Graph, x: Any, dtype: torch.dtype) -> fx.Node:
    """`x.to(dtype)` as an operator: PyTorch's compiler caches refuse methods of nodes that capture did not see."""
    return graph.call_function(torch.ops.aten.to.dtype, (x, dtype))


def _rewrite_product(node: fx.Node) -> None:
    parts = _parts(node)
    assert parts is not None
    x, tanh, links = parts
    graph = node.graph
    with graph.inserting_before(node):
        doubled = graph.call_function(operator.mul, (tanh.args[0], 2.0))
        gate = graph.call_function(torch.sigmoid, (doubled,))
        product = graph.call_function(operator.mul, (x, gate))
    for new, old in ((doubled, tanh), (gate, tanh), (product, node)):
        new.meta = dict(old.meta)
    node.replace_all_uses_with(product)
    graph.erase_node(node)
    for link in sorted(links, reverse=True):
        graph.erase_node(link)


def _parts(node: fx.Node) -> tuple[fx.Node, fx.Node, list[fx.Node]] | None:
    """x, the tangent, and the inner nodes (half of x, one plus the tangent, the tangent) of a matching product."""
    if not _is_call(node, _PRODUCTS):
        return None
    for half, one_plus in (node.args, reversed(node.args)):
        x, tanh = _beside_number(half, _PRODUCTS, 0.5), _beside_number(one_plus, _SUMS, 1.0)
        if x is not None and tanh is not None and tanh.op == "call_function" and tanh.target in _TANHS and not tanh.kwargs:
            assert isinstance(half, fx.Node)
            assert isinstance(one_plus, fx.Node)
            return x, tanh, [half, one_plus, tanh]
    return None


def _beside_number(node: Any, targets: tuple[Any, ...], number: float) -> fx.Node | None:
    """The other operand of a product or sum with a number."""
    if not _is_call(node, targets):
        return None
    left, right = node.args
    if isinstance(right, fx.Node) and not isinstance(left, fx.Node) and left == number:
        return right
    return left if isinstance(left, fx.Node) and not isinstance(right, fx.Node) and right == number else None


def _is_call(node: Any, targets: tuple[Any, ...]) -> bool:
    return (
        isinstance(node, fx.Node)
        and node.op == "call_function"
        and node.target in targets
        and len(node.args) == 2
        and not node.kwargs
    )
