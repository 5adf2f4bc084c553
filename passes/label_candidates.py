"""min over all labels  ==  min over the labels that demands and links can give

A *demand* costs the same for every label but one, a *link* for every pair of labels but `x == forward(y)`. Take an optimal
labelling and one set of variables that satisfied links connect. If one of its demands is satisfied, the links transport
that label to all others. If none is, relabel all of them by what reaches any one of them: the satisfied links stay
satisfied, and nothing else was satisfied before. So transported labels suffice, if a cycle of links that holds for one
labelling holds for all; permutations are like that, since `g·p == p` for one p means that g is the identity.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Generic, TypeVar

Label = TypeVar("Label", bound=Hashable)
Variable = TypeVar("Variable", bound=Hashable)

CAP = 32


@dataclasses.dataclass(frozen=True)
class Link(Generic[Label]):
    """The condition `label(target) == forward(label(source))`.

    Args:
        target: a variable.
        source: another, or the same.
        forward: from labels of `source` to labels of `target`, a bijection.
        backward: its inverse.
    """

    target: Hashable
    source: Hashable
    forward: Callable[[Label], Label]
    backward: Callable[[Label], Label]

    def holds(self, target: Label, source: Label) -> bool:
        """Whether two labels satisfy the link."""
        return self.forward(source) == target


def candidates(
    demands: Mapping[Variable, Sequence[Label]], links: Iterable[Link[Label]], *, default: Label, cap: int = CAP
) -> dict[Variable, tuple[Label, ...]]:
    """For each variable the labels worth trying, its own demands first, then by the number of links they came through.

    Args:
        demands: for every variable the labels that some factor of its own asks for, the preferred one first; may be empty.
        links: conditions between variables.
        default: for variables that no demand reaches.
        cap: on the labels of one variable; the nearest are kept. Where it cuts, optimality is no longer certain.
    """
    closure = _Closure(demands, links, cap)
    closure.add((variable, label) for variable, labels in demands.items() for label in labels)
    for variable, found in closure.labels.items():
        if not found:
            closure.add([(variable, default)])
    return {variable: tuple(closure.labels[variable]) for variable in demands}


class _Closure(Generic[Label]):
    """Labels of each variable, in the order in which they were found; all that links transport is found too."""

    def __init__(self, variables: Iterable[Hashable], links: Iterable[Link[Label]], cap: int) -> None:
        self.labels: dict[Hashable, dict[Label, None]] = {variable: {} for variable in variables}
        self._cap = cap
        self._transports: dict[Hashable, list[tuple[Hashable, Callable[[Label], Label]]]] = collections.defaultdict(list)
        for link in links:
            self._transports[link.source].append((link.target, link.forward))
            self._transports[link.target].append((link.source, link.backward))

    def add(self, seeds: Iterable[tuple[Hashable, Label]]) -> None:
        """Breadth first, so that a cap keeps what is near."""
        queue = collections.deque(seed for seed in seeds if self._is_new(*seed))
        while queue:
            variable, label = queue.popleft()
            reached = ((other, transport(label)) for other, transport in self._transports[variable])
            queue.extend(found for found in reached if self._is_new(*found))

    def _is_new(self, variable: Hashable, label: Label) -> bool:
        """Records a label unless it is known or the cap is reached."""
        known = self.labels[variable]
        if label in known or len(known) >= self._cap:
            return False
        known[label] = None
        return True
