"""Axes of tensors as unknowns of a unification problem: what must share one order, and what an order may look like.

Every dimension of every tensor in a graph is an `Axis`. Operators tie axes together (`unify`), see them as products
(`view(…, 12, 64)` makes a 768-axis a product of heads and channels) or as sums (`chunk` and `cat`), or fix their order
(`pin`). What is left free is what a compiler may reorder: first-order unification, as in type inference, where the types
are index sets.

    leaf       its order is one unknown permutation
    product    parts from major to minor: index = (i, j); the order of j may depend on i (`instance`)
    sum        parts one after the other; nothing moves from one part to another
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, TypeAlias

import sympy

Size: TypeAlias = int | sympy.Expr
Key: TypeAlias = tuple["Axis", int, int]  # an axis and a range of its indices


class Axis:
    """One axis, or a part of one. Ask its `root()`: axes that were unified share it.

    Attributes:
        size: how many indices; an expression where it is known at run time only.
        kind: what is known about its structure.
        parts: of a product or a sum.
        pinned: why the order is fixed, or None.
        instances: for a leaf, the axis that stands for it at certain indices of a more major axis.
    """

    __slots__ = ("_parent", "instances", "kind", "parts", "pinned", "size")

    def __init__(self, size: Size, pinned: str | None = None) -> None:
        self.size = size
        self.kind: Literal["leaf", "product", "sum"] = "leaf"
        self.parts: tuple[Axis, ...] = ()
        self.pinned = pinned
        self.instances: dict[Key, Axis] = {}
        self._parent: Axis | None = None
        if not isinstance(size, int) and pinned is None:
            self.pinned = "its size is known at run time only"

    def root(self) -> Axis:
        """The axis that stands for this one and all that were unified with it."""
        root = self
        while root._parent is not None:
            root = root._parent
        node = self
        while node._parent is not None:
            node._parent, node = root, node._parent
        return root

    def pin(self, reason: str) -> None:
        """Fix the order of the axis and of all its parts."""
        stack = [self]
        while stack:
            axis = stack.pop().root()
            if axis.pinned is None:
                axis.pinned = reason
                stack += [*axis.parts, *axis.instances.values()]

    def walk(self) -> Iterator[Axis]:
        """The root, and the roots of all parts below it."""
        stack = [self]
        while stack:
            axis = stack.pop().root()
            yield axis
            stack += reversed(axis.parts)

    def instance(self, of: Axis, first: int, last: int) -> Axis:
        """This axis where the more major axis `of` has an index in `first … last - 1`: its order may be another there."""
        axis = self.root()
        if axis.pinned is not None:
            return axis
        if axis.kind != "leaf":
            parts = [part.instance(of, first, last) for part in axis.parts]
            return product(parts) if axis.kind == "product" else sum_of(parts)
        key = (of.root(), first, last)
        if key not in axis.instances:
            axis.instances[key] = Axis(axis.size)
        return axis.instances[key]

    def __repr__(self) -> str:
        axis = self.root()
        inner = {"leaf": str(axis.size), "product": "*".join(map(repr, axis.parts)), "sum": "+".join(map(repr, axis.parts))}
        return f"({inner[axis.kind]})" + ("!" if axis.pinned else "")


def product(parts: Iterable[Axis]) -> Axis:
    """The axis whose index is a tuple of the parts' indices, major first; of one part, that part."""
    roots = [part.root() for part in parts]
    factors = [factor for root in roots for factor in (root.parts if root.kind == "product" else (root,))]
    return _compound("product", factors, _multiply(factor.size for factor in factors))


def sum_of(parts: Iterable[Axis]) -> Axis:
    """The axis that runs through the parts one after the other; of one part, that part."""
    roots = [part.root() for part in parts if part.size != 0]
    terms = [term for root in roots for term in (root.parts if root.kind == "sum" else (root,))]
    size: Size = sum((term.size for term in terms), 0)
    return _compound("sum", terms, size)


def _compound(kind: Literal["product", "sum"], parts: Sequence[Axis], size: Size) -> Axis:
    if len(parts) == 1:
        return parts[0].root()
    axis = Axis(size)
    axis.kind, axis.parts = kind, tuple(parts)
    # An axis of unknown size may have free parts: as if it were fixed, a pin would not reach them.
    fixed = parts and all(part.root().pinned is not None for part in parts)
    axis.pinned = parts[0].root().pinned if fixed else None
    return axis


def unify(a: Axis, b: Axis) -> None:
    """Demand that two axes have the same order."""
    a, b = a.root(), b.root()
    if a is b:
        return
    if a.size != b.size:
        for axis in (a, b):
            axis.pin(f"axes of {a.size} and {b.size} features meet")
        return
    if a.kind != "leaf" and b.kind == "leaf":
        a, b = b, a
    if a.kind == b.kind == "product":
        align(a.parts, b.parts)
    elif a.kind == "leaf" and b.kind != "leaf" and any(axis is a for axis in b.walk()):
        b.pin("an axis meets a part of itself")
        return
    elif a.kind != "leaf":
        _match_sums(a, b)
    _replace(a, b)


def _replace(a: Axis, b: Axis) -> None:
    """Let `b` stand for `a` as well."""
    a, b = a.root(), b.root()
    if a is b:
        return
    a._parent = b
    reason = a.pinned or b.pinned
    if reason is not None:
        b.pinned = None if a.pinned is not None else b.pinned  # pin again, to reach parts that are new
        b.pin(reason)
    instances, a.instances = a.instances, {}
    for (of, first, last), instance in instances.items():
        if instance.root() is not b.root():  # an axis that is its own instance
            unify(b.root().instance(of, first, last), instance)
    b.instances = {key: instance for key, instance in b.instances.items() if instance.root() is not b.root()}


def _match_sums(a: Axis, b: Axis) -> None:
    """Tie the parts of two axes of which at least one is a sum."""
    sizes = _common_sizes(a, b)
    if sizes is None:
        for axis in (a, b):
            axis.pin("it is divided in two ways that do not meet")
        return
    for left, right in zip(cut(a, sizes), cut(b, sizes), strict=True):
        unify(left, right)


def _common_sizes(a: Axis, b: Axis) -> list[int] | None:
    """Sizes of the coarsest pieces into which both axes can be cut so that each piece is a part of each."""
    bounds = [_bounds(axis) for axis in (a, b) if axis.kind == "sum"]
    if any(bound is None for bound in bounds):
        return None
    marks = sorted({mark for bound in bounds for mark in bound or ()})
    return [last - first for first, last in itertools.pairwise(marks)]


def _bounds(axis: Axis) -> list[int] | None:
    marks = [0]
    for part in axis.parts:
        if not isinstance(part.size, int):
            return None
        marks.append(marks[-1] + part.size)
    return marks


def align(left: Sequence[Axis], right: Sequence[Axis]) -> None:
    """Tie two lists of axes that number the same elements, major first: what `view` does to the shape of a tensor."""
    lefts, rights = collections.deque(left), collections.deque(right)
    while lefts and rights and lefts[-1].size == rights[-1].size:
        unify(lefts.pop(), rights.pop())
    while lefts and rights:
        a, b = lefts.popleft().root(), rights.popleft().root()
        if a.size == b.size:
            unify(a, b)
        elif _open(a, b.size, lefts):
            rights.appendleft(b)
        elif _open(b, a.size, rights):
            lefts.appendleft(a)
        else:
            lefts.appendleft(a)
            rights.appendleft(b)
            break
    for axis in (*lefts, *rights):
        if axis.size != 1:
            axis.pin("a reshape divides it in a way that has no name")


def _open(axis: Axis, size: Size, queue: collections.deque[Axis]) -> bool:
    """Put the parts of `axis` in front of `queue` if it is, or can be made, a product that starts with `size` or less."""
    if axis.kind == "product":
        queue.extendleft(reversed(axis.parts))
        return True
    rest = _quotient(axis.size, size)
    if axis.kind == "leaf" and rest is not None and size != 1 and rest != 1:
        _refine(axis, "product", (size, rest))
        queue.extendleft(reversed(axis.parts))
        return True
    return False


def _refine(leaf: Axis, kind: Literal["product", "sum"], sizes: Sequence[Size]) -> None:
    """Give a leaf a structure, and its instances the same."""
    leaf.kind, leaf.parts = kind, tuple(Axis(size, leaf.pinned) for size in sizes)
    instances, leaf.instances = leaf.instances, {}
    for (of, first, last), instance in instances.items():
        parts = [part.instance(of, first, last) for part in leaf.parts]
        unify(product(parts) if kind == "product" else sum_of(parts), instance)


def cut(axis: Axis, sizes: Sequence[int]) -> list[Axis]:
    """The pieces of an axis, one after the other: what `split` does.

    A piece of size zero is an axis without indices. Where the cut goes through something that has no parts there, the axis
    is pinned.
    """
    axis = axis.root()
    pieces = _cut(axis, [size for size in sizes if size])
    if pieces is None:
        axis.pin("it is cut where its structure has no border")
        pieces = [Axis(size, axis.pinned) for size in sizes if size]
    remaining = iter(pieces)
    return [next(remaining) if size else Axis(0) for size in sizes]


def _cut(axis: Axis, sizes: Sequence[int]) -> list[Axis] | None:
    if len(sizes) == 1:
        return [axis]
    if axis.kind == "leaf":
        _refine(axis, "sum", sizes)
        return list(axis.parts)
    return _cut_sum(axis, sizes) if axis.kind == "sum" else _cut_product(axis, sizes)


def _cut_sum(axis: Axis, sizes: Sequence[int]) -> list[Axis] | None:
    terms = collections.deque(part.root() for part in axis.parts)
    pieces = []
    for size in sizes:
        taken, missing = [], size
        while missing:
            term = terms.popleft()
            if not isinstance(term.size, int):
                return None
            if term.size > missing:
                halves = _cut(term, (missing, term.size - missing))
                if halves is None:
                    return None
                term = halves[0]
                terms.appendleft(halves[1])
            taken.append(term)
            missing -= int(term.size)
        pieces.append(sum_of(taken))
    return pieces


def _cut_product(axis: Axis, sizes: Sequence[int]) -> list[Axis] | None:
    major, minors = axis.parts[0].root(), axis.parts[1:]
    inner = _multiply(part.size for part in minors)
    if not isinstance(inner, int) or not isinstance(major.size, int) or any(size % inner for size in sizes):
        return None
    heads = _cut(major, [size // inner for size in sizes])
    if heads is None:
        return None
    pieces, first = [], 0
    for head, size in zip(heads, sizes, strict=True):
        last = first + size // inner
        tail = [part.instance(major, first, last) for part in minors]
        pieces.append(product([*tail] if last - first == 1 else [head, *tail]))
        first = last
    return pieces


def _multiply(sizes: Iterable[Size]) -> Size:
    result: Size = 1
    for size in sizes:
        result = result * size
    return result


def _quotient(whole: Size, part: Size) -> Size | None:
    """`whole / part` where it is a whole number, as far as one can tell."""
    if isinstance(whole, int) and isinstance(part, int):
        return whole // part if part and whole % part == 0 else None
    quotient = sympy.cancel(sympy.sympify(whole) / sympy.sympify(part))
    if quotient.is_Integer:
        return int(quotient)
    return quotient if quotient.is_polynomial() and quotient.is_integer else None
