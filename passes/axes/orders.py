"""The orders that a structured axis can have: a group, its elements taken apart into one order per leaf and put together.

An axis that is a product of `h` heads and `d` channels can be reordered by any permutation that moves whole heads and, within
each head, channels: the wreath product `S_d ≀ S_h`. A sum can be reordered part by part. Leaves that several axes share must
agree. So an order of an axis, if it has one of these forms, is the same as one order per leaf (`decompose`), and orders of
leaves make up an order of every axis (`assemble`).

An order of `n` indices is an int32 array `p` of shape `[n]`: position `i` holds what was at index `p[i]`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import networkx as nx
import numpy as np
import numpy.typing as npt

from padst_compile.passes.axes.axis import Axis, unify

Order: TypeAlias = npt.NDArray[np.int32]
Label: TypeAlias = bytes  # orders of one leaf, one per index of the axes it depends on, as int32 bytes: hashable
Labels: TypeAlias = Mapping[Axis, Label]
_Context: TypeAlias = Mapping[Axis, int]


class Freedom:
    """Settles, once all operators have had their say, on which more major axes the order of a leaf may depend.

    The order of `d` may differ from one index of `h` to the next only if whoever sees `d` sees `h` too, and never as
    something to be summed, normalised or moved along.

    Args:
        seen: groups of axes that some operator sees together.
        mixed: axes along which an operator combines elements without removing the axis.
    """

    def __init__(self, seen: Sequence[Sequence[Axis]], mixed: Iterable[Axis]) -> None:
        self._seen, self._mixed = seen, list(mixed)
        while self._unify_instances():
            pass
        self._depends = self._dependencies()

    def depends(self, leaf: Axis) -> tuple[Axis, ...]:
        """The axes on whose index the order of `leaf` may depend, major first."""
        return self._depends.get(leaf.root(), ())

    def identity(self, leaf: Axis) -> Label:
        """The label of a leaf that stays as it is."""
        return self.label(leaf, np.arange(leaf.size, dtype=np.int32))

    def label(self, leaf: Axis, order: Order) -> Label:
        """The label that gives a leaf one order at all indices of what it depends on."""
        sizes = [int(axis.size) for axis in self.depends(leaf)]
        return np.ascontiguousarray(np.broadcast_to(order.astype(np.int32), (*sizes, order.size))).tobytes()

    def leaves(self, axis: Axis) -> list[Axis]:
        """The leaves whose orders make up the order of `axis`, instances included."""
        return [here for here in _reachable([axis]) if here.kind == "leaf"]

    def decompose(self, axis: Axis, order: Order) -> dict[Axis, Label] | None:
        """One label per leaf of `axis`, or None where no such labels make `order`."""
        taken_apart = _Decomposition(self)
        return taken_apart.labels() if taken_apart.visit([axis], order, {}) else None

    def assemble(self, axis: Axis, labels: Labels) -> Order:
        """The order of `axis`, int32 `[axis.size]`; leaves without a label stay as they are."""
        return self._assemble([axis.root()], labels, {}).copy()  # labels are read-only

    def table(self, leaf: Axis, label: Label) -> Order:
        """A label as an array `[*sizes of what the leaf depends on, size]`."""
        sizes = [int(axis.size) for axis in self.depends(leaf)]
        return np.frombuffer(label, dtype=np.int32).reshape(*sizes, int(leaf.size))

    def _assemble(self, parts: Sequence[Axis], labels: Labels, context: _Context) -> Order:
        head, rest = open_head(parts, context)
        if head is None:
            return np.zeros(1, dtype=np.int32)
        own = self._assemble_one(head, labels, context)
        if not rest:
            return own
        inner = _size(rest)
        rows = [index * inner + self._assemble(rest, labels, {**context, **_places(head, int(index))}) for index in own]
        return np.concatenate(rows).astype(np.int32)

    def _assemble_one(self, axis: Axis, labels: Labels, context: _Context) -> Order:
        if axis.kind == "sum":
            return _concatenate([self._assemble([part], labels, context) for part in axis.parts])
        label = labels.get(axis)
        if label is None:
            return np.arange(axis.size, dtype=np.int32)
        order: Order = self.table(axis, label)[tuple(context[major] for major in self.depends(axis))]
        return order

    def _unify_instances(self) -> bool:
        """Tie instances to their axis where the order may not depend on the index; whether anything changed."""
        depends = self._dependencies()
        for leaf in self._all_leaves():
            known: dict[tuple[Axis, int, int], Axis] = {}
            for (of, first, last), instance in leaf.instances.items():
                allowed = of.root() in depends.get(leaf, ())
                twin = known.setdefault((of.root(), first, last), instance) if allowed else leaf
                if twin.root() is not instance.root():
                    unify(twin, instance)
                    return True  # structures have changed: look again
            leaf.instances = known
        return self._unify_cycle()

    def _unify_cycle(self) -> bool:
        """Tie leaves that are instances of each other, which leaves no room for a difference."""
        graph = nx.DiGraph((leaf, other.root()) for leaf in self._all_leaves() for other in leaf.instances.values())
        for component in nx.strongly_connected_components(graph):
            first, *others = component
            for other in others:
                unify(first, other)
                return True
        return False

    def _all_leaves(self) -> list[Axis]:
        found = _reachable([axis for group in self._seen for axis in group])
        return [axis for axis in found if axis.kind == "leaf"]

    def _dependencies(self) -> dict[Axis, tuple[Axis, ...]]:
        majors = self._majors()
        together: dict[Axis, set[Axis]] = {}
        for group in self._seen:
            present = {axis for member in group for axis in member.walk()}
            for axis in present & majors.keys():
                together[axis] = together[axis] & present if axis in together else present
        mixed = {axis for member in self._mixed for axis in member.walk()}
        return {
            leaf: tuple(axis for axis in before if axis in together.get(leaf, ()) and axis not in mixed)
            for leaf, before in majors.items()
        }

    def _majors(self) -> dict[Axis, dict[Axis, None]]:
        """For every leaf the parts that come before it in some product."""
        majors: dict[Axis, dict[Axis, None]] = {}
        for axis in {axis for group in self._seen for member in group for axis in member.walk()}:
            before: list[Axis] = []
            for part in axis.parts if axis.kind == "product" else ():
                for leaf in part.walk():
                    if leaf.kind == "leaf":
                        majors.setdefault(leaf, {}).update(dict.fromkeys(m for m in before if m is not leaf and m.size != 1))
                before.append(part.root())
        return majors


class _Decomposition:
    """Collects what an order says about every leaf, and notices contradictions."""

    def __init__(self, freedom: Freedom) -> None:
        self._freedom = freedom
        self._tables: dict[Axis, Order] = {}

    def labels(self) -> dict[Axis, Label]:
        return {leaf: self._filled(leaf, table).tobytes() for leaf, table in self._tables.items()}

    def visit(self, parts: Sequence[Axis], order: Order, context: _Context) -> bool:
        """Whether `order` is one of the product of `parts`."""
        head, rest = open_head(parts, context)
        if head is None:
            return True
        if not rest:
            return self._visit_one(head, order, context)
        inner = _size(rest)
        rows = order.reshape(-1, inner)
        own = rows[:, 0] // inner
        if not np.array_equal(rows // inner, np.broadcast_to(own[:, None], rows.shape)):
            return False
        return self._visit_one(head, own, context) and all(
            self.visit(rest, row - index * inner, {**context, **_places(head, int(index))})
            for index, row in zip(own, rows, strict=True)
        )

    def _visit_one(self, axis: Axis, order: Order, context: _Context) -> bool:
        if axis.kind == "sum":
            return self._visit_sum(axis, order, context)
        if axis.pinned is not None and not np.array_equal(order, np.arange(order.size)):
            return False
        depends = self._freedom.depends(axis)
        if axis not in self._tables:
            self._tables[axis] = np.full((*(int(major.size) for major in depends), order.size), -1, dtype=np.int32)
        row = self._tables[axis][tuple(context[major] for major in depends)]
        if row[0] >= 0 and not np.array_equal(row, order):
            return False
        row[:] = order
        return True

    def _visit_sum(self, axis: Axis, order: Order, context: _Context) -> bool:
        first = 0
        for part in axis.parts:
            last = first + int(part.size)
            piece = order[first:last] - first
            if piece.size and not (piece.min() >= 0 and piece.max() < last - first):
                return False
            if not self.visit([part], piece, context):
                return False
            first = last
        return True

    def _filled(self, leaf: Axis, table: Order) -> Order:
        """Indices that the decomposed axis does not reach stay as they are."""
        return np.where(table < 0, np.arange(leaf.size, dtype=np.int32), table).astype(np.int32)


def _reachable(axes: Iterable[Axis]) -> list[Axis]:
    """The roots of axes, their parts and instances, in a stable order."""
    found: dict[Axis, None] = {}
    stack = [axis.root() for axis in axes]
    while stack:
        here = stack.pop()
        if here not in found:
            found[here] = None
            stack += [other.root() for other in (*here.parts, *here.instances.values())]
    return list(found)


def open_head(parts: Sequence[Axis], context: _Context) -> tuple[Axis | None, list[Axis]]:
    """The most major factor of a product that has more than one index, with the instance that holds in `context`; the rest."""
    queue = list(parts)
    while queue:
        head = _instance_in(queue.pop(0).root(), context)
        if head.kind == "product":
            queue[:0] = head.parts
        elif head.size != 1 or head.kind == "sum":
            return head, queue
    return None, []


def _places(axis: Axis, index: int) -> dict[Axis, int]:
    """Which index of an axis, and so of the part of it that holds that one: orders may depend on either."""
    axis = axis.root()
    places, inner = {axis: index}, int(axis.size)
    for part in axis.parts:
        size = int(part.size)
        if axis.kind == "product":
            inner //= size
            places |= _places(part, index // inner % size)
        elif 0 <= index < size:
            places |= _places(part, index)
        index -= size if axis.kind == "sum" else 0
    return places


def _instance_in(axis: Axis, context: _Context) -> Axis:
    for (of, first, last), instance in axis.instances.items():
        if first <= context.get(of.root(), -1) < last:
            return _instance_in(instance.root(), context)
    return axis


def _size(parts: Sequence[Axis]) -> int:
    result = 1
    for part in parts:
        result *= int(part.size)
    return result


def _concatenate(orders: Sequence[Order]) -> Order:
    offsets = np.cumsum([0, *(order.size for order in orders)])[:-1]
    return np.concatenate([order + offset for order, offset in zip(orders, offsets, strict=True)]).astype(np.int32)
