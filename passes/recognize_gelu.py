"""0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))  ==  gelu(x, approximate="tanh")

Models write the tanh form of GELU in several ways, transformers' `gelu_new` among them. Whatever the way, it is a polynomial of
x and of one hyperbolic tangent of a polynomial of x, so it is recognised by its coefficients; `gelu_fast`, whose sqrt(2 / pi)
has ten digits, is another function. As one call it can be fused into the kernel before it; `TanhGate` takes what is left. Needs
no values.
"""

from __future__ import annotations

import collections
import math
import operator
from collections.abc import Iterator
from typing import TypeAlias

import torch
from torch import fx
from torch.nn import functional as F

from padst_compile.passes.base import RewriteRule
from padst_compile.passes.context import Context
from padst_compile.passes.graph import fake, obstacle_between

_aten = torch.ops.aten
_SUMS = (operator.add, torch.add, _aten.add.Tensor)
_PRODUCTS = (operator.mul, torch.mul, _aten.mul.Tensor)
_POWERS = (operator.pow, torch.pow, _aten.pow.Tensor_Scalar)
_TANHS = (torch.tanh, F.tanh, _aten.tanh.default)
_SCALE = math.sqrt(2 / math.pi)
_DEPTH = 6  # of the tangent below the product, and of x below the tangent; known expressions have up to 4
_TOLERANCE = 1e-15  # what products of constants lose to rounding

# Coefficients by the powers of x and of the tangent.
Polynomial: TypeAlias = dict[tuple[int, int], float]
_OUTER: Polynomial = {(1, 0): 0.5, (1, 1): 0.5}
_INNER: Polynomial = {(1, 0): _SCALE, (3, 0): _SCALE * 0.044715}


class RecognizeGelu(RewriteRule):
    """Replaces the tanh form of GELU by one call."""

    def matches(self, node: fx.Node) -> bool:
        """The product at the end of the expression."""
        return _is_call(node, _PRODUCTS) and _source(node) is not None

    def why_not(self, node: fx.Node, facts: Context) -> str | None:
        """Floating point of one dtype, no result in between that something else reads, and nothing written in between."""
        x = _source(node)
        assert x is not None
        inner = _between(x, node)
        kinds = {tensor.dtype if tensor is not None else None for tensor in map(fake, (x, *inner, node))}
        if len(kinds) != 1 or not all(kind is not None and kind.is_floating_point for kind in kinds):
            return "the parts differ in dtype, or are not floating point"
        shared = next((link for link in inner if any(user is not node and user not in inner for user in link.users)), None)
        if shared is not None:
            return f"{shared.name} is read elsewhere too"
        obstacle = obstacle_between(min(inner), node)
        return None if obstacle is None else f"{obstacle} between {min(inner).name} and {node.name}"

    def rewrite(self, node: fx.Node, facts: Context) -> None:
        """One call at the place of the last product."""
        x = _source(node)
        assert x is not None
        inner = _between(x, node)
        with node.graph.inserting_before(node):
            gelu = node.graph.call_function(F.gelu, (x,), {"approximate": "tanh"})
        gelu.meta = dict(node.meta)
        node.replace_all_uses_with(gelu)
        node.graph.erase_node(node)
        for link in sorted(inner, reverse=True):
            node.graph.erase_node(link)


def _source(node: fx.Node) -> fx.Node | None:
    """The x of which `node` is the GELU: something that the expression reads more than once."""
    tanh = next((link for link in _ancestors(node) if _is_tanh(link)), None)
    if tanh is None:
        return None
    candidates = (x for x in _ancestors(tanh) if len(x.users) > 1)
    return next((x for x in candidates if _is_gelu(node, x, tanh)), None)


def _is_gelu(node: fx.Node, x: fx.Node, tanh: fx.Node) -> bool:
    return _near(_expand(node, x, tanh), _OUTER) and _near(_expand(tanh.args[0], x, None), _INNER)


def _ancestors(node: fx.Node) -> Iterator[fx.Node]:
    """What a node is computed from within `_DEPTH` calls, near ones first."""
    seen, layer = {node}, [node]
    for _ in range(_DEPTH):
        layer = [source for link in layer for source in link.all_input_nodes if _is_arithmetic(link)]
        layer = [source for source in dict.fromkeys(layer) if source not in seen]
        seen.update(layer)
        yield from layer


def _between(x: fx.Node, node: fx.Node) -> set[fx.Node]:
    """The calls between x and the last product."""
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        new = [source for source in stack.pop().all_input_nodes if source is not x and source not in found]
        found.update(new)
        stack.extend(new)
    return found


def _expand(value: object, x: fx.Node, tanh: fx.Node | None) -> Polynomial | None:
    """An expression as a polynomial of x and the tangent, or None where it is none."""
    if isinstance(value, (int, float)):
        return {(0, 0): float(value)}
    if value is x or value is tanh:
        return {(1, 0) if value is x else (0, 1): 1.0}
    if not isinstance(value, fx.Node) or not _is_call(value, (*_SUMS, *_PRODUCTS, *_POWERS)):
        return None
    left, right = (_expand(part, x, tanh) for part in value.args)
    if left is None or right is None:
        return None
    if value.target in _SUMS:
        return _add(left, right)
    if value.target in _PRODUCTS:
        return _multiply(left, right)
    return _power(left, right)


def _add(left: Polynomial, right: Polynomial) -> Polynomial:
    return {powers: left.get(powers, 0.0) + right.get(powers, 0.0) for powers in {**left, **right}}


def _multiply(left: Polynomial, right: Polynomial) -> Polynomial:
    total: dict[tuple[int, int], float] = collections.defaultdict(float)
    for (a, b), first in left.items():
        for (c, d), second in right.items():
            total[a + c, b + d] += first * second
    return dict(total)


def _power(base: Polynomial, exponent: Polynomial) -> Polynomial | None:
    """Squares and cubes of single terms; nothing else occurs."""
    count = exponent.get((0, 0))
    if len(base) != 1 or len(exponent) != 1 or count not in (2.0, 3.0):
        return None
    ((powers, factor),) = base.items()
    return {(int(count) * powers[0], int(count) * powers[1]): factor**count}


def _near(found: Polynomial | None, wanted: Polynomial) -> bool:
    if found is None or found.keys() != wanted.keys():
        return False
    return all(math.isclose(found[powers], wanted[powers], rel_tol=_TOLERANCE) for powers in wanted)


def _is_tanh(node: fx.Node) -> bool:
    named = node.target == "tanh" if node.op == "call_method" else node.op == "call_function" and node.target in _TANHS
    return named and len(node.args) == 1 and not node.kwargs


def _is_arithmetic(node: fx.Node) -> bool:
    return _is_tanh(node) or _is_call(node, (*_SUMS, *_PRODUCTS, *_POWERS))


def _is_call(node: fx.Node, targets: tuple[object, ...]) -> bool:
    return node.op == "call_function" and node.target in targets and len(node.args) == 2 and not node.kwargs
