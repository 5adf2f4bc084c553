"""The permutations of one axis that a graph lets through, as a group that one can ask and draw from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from padst_compile.passes.axes.axis import Axis
from padst_compile.passes.axes.orders import Freedom, Order

Kind: TypeAlias = Literal["any", "identity", "within heads", "whole heads", "whole heads and within heads", "restricted"]


@dataclasses.dataclass(frozen=True)
class OrderGroup:
    """Orders of an axis in which only certain leaves are reordered.

    Args:
        axis: what is reordered.
        free: the leaves that may be.
        freedom: of the graph that the axis is from.
    """

    axis: Axis
    free: frozenset[Axis]
    freedom: Freedom

    @property
    def kind(self) -> Kind:
        """The group in a word; heads are the major factors of an axis that is a product."""
        root = self.axis.root()
        factors = [part.root() for part in root.parts if part.size != 1]
        if not self._free(root):
            return "identity"
        if root.kind == "leaf":
            return "any"
        if root.kind != "product":
            return "restricted"
        within, whole = self._free(factors[-1]), any(map(self._free, factors[:-1]))
        if within:
            return "whole heads and within heads" if whole else "within heads"
        return "whole heads"

    def contains(self, order: Order) -> bool:
        """Whether an order, `[size]`, is one of the group."""
        labels = self.freedom.decompose(self.axis, order)
        return labels is not None and all(
            leaf in self.free or label == self.freedom.identity(leaf) for leaf, label in labels.items()
        )

    def random(self, permutation: Callable[[int], Order]) -> Order:
        """A random order of the group.

        Args:
            permutation: draws a permutation of that many elements.
        """
        labels = {}
        for leaf in self.freedom.leaves(self.axis):
            if leaf in self.free:
                sizes = [int(axis.size) for axis in self.freedom.depends(leaf)]
                table = np.empty((*sizes, int(leaf.size)), dtype=np.int32)
                for index in np.ndindex(*sizes):
                    table[index] = permutation(int(leaf.size))
                labels[leaf] = table.tobytes()
        return self.freedom.assemble(self.axis, labels)

    def exchanges(self) -> list[npt.NDArray[np.int64]]:
        """Sets of places, `[copies, width]` each: any orders of the sets together are in the group, those of a row in all rows.

        A set is one free leaf at one index of what its order depends on. Of leaves that reorder the same places, as heads and
        the channels within them do, the finer one stands: whole heads move where nothing within them may.
        """
        rows = [self._rows(leaf, place) for leaf in self._ordered() for place in self._table_places(leaf)]
        found: list[npt.NDArray[np.int64]] = []
        taken: set[int] = set()
        for places in sorted(rows, key=len):
            if places.size and taken.isdisjoint(places.ravel().tolist()):
                found.append(places)
                taken.update(places.ravel().tolist())
        return found

    def _ordered(self) -> list[Axis]:
        return [leaf for leaf in self.freedom.leaves(self.axis) if leaf in self.free and leaf.size != 1]

    def _table_places(self, leaf: Axis) -> Iterable[tuple[int, ...]]:
        return np.ndindex(*(int(major.size) for major in self.freedom.depends(leaf)))

    def _rows(self, leaf: Axis, place: tuple[int, ...]) -> npt.NDArray[np.int64]:
        """The places that an entry of a leaf's table reorders, `[copies, leaf.size]`; read off what such entries do."""
        size = int(leaf.size)
        turned = self._assembled(leaf, place, np.roll(np.arange(size), -1))  # each copy becomes one cycle
        swapped = self._assembled(leaf, place, np.array([1, 0, *range(2, size)]))
        firsts = [
            start
            for start in np.flatnonzero(swapped != np.arange(swapped.size))
            if turned[start] == swapped[start] and (size > 2 or start < turned[start])  # of two, either is first
        ]
        rows = np.array(firsts, dtype=np.int64).reshape(-1, 1)
        for _ in range(size - 1):
            rows = np.concatenate((rows, turned[rows[:, -1:]]), 1)
        return rows

    def _assembled(self, leaf: Axis, place: tuple[int, ...], order: Order) -> Order:
        table = self.freedom.table(leaf, self.freedom.identity(leaf)).copy()
        table[place] = order
        return self.freedom.assemble(self.axis, {leaf: table.tobytes()})

    def _free(self, axis: Axis) -> bool:
        return any(leaf in self.free for leaf in self.freedom.leaves(axis))


def all_orders(size: int) -> OrderGroup:
    """The symmetric group."""
    axis = Axis(size)
    return OrderGroup(axis, frozenset([axis]), Freedom([(axis,)], []))


def no_orders(size: int) -> OrderGroup:
    """The identity alone."""
    return dataclasses.replace(all_orders(size), free=frozenset())


def free_leaves(freedom: Freedom, axis: Axis, blocked: Iterable[Axis]) -> frozenset[Axis]:
    """The leaves of an axis that nothing pins and nothing blocks."""
    taken = set(blocked)
    return frozenset(leaf for leaf in freedom.leaves(axis) if leaf.pinned is None and leaf not in taken)
