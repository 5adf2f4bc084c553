"""min over v, w, …  Σ f  ==  min over w, …  (Σ of the f without v  +  min over v  Σ of the f with v)

The cheapest choice of a label for each variable, where the cost is a sum of factors over few variables each. By the rule
above a variable leaves the problem for a table over the variables that it shares factors with; the table remembers the
label that attained each minimum. So the work grows in proportion to the variables, and exponentially only with how densely
factors tie them: on a tree no table is larger than that of a factor.

Of several optima the result is the first in lexicographic order, the variables taken in the reverse order of elimination.
So no variable can move to a label that comes earlier in its domain without a higher cost. Nothing depends on hashes.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any, Generic, TypeAlias, TypeVar

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from padst_compile.passes.elimination_order import elimination_order

Label = TypeVar("Label")
Variable = TypeVar("Variable", bound=Hashable)
Cost: TypeAlias = float | Fraction

DEFAULT_LIMIT = 1_000_000

_EXACT_IN_FLOATS = 2**53
_MOST_COSTS_DRAWN = 10_000


class NoLabellingError(ValueError):
    """Every labelling is forbidden."""


class LabellingTooLargeError(ValueError):
    """The factors tie too many labels together for an exact answer."""


@dataclasses.dataclass(frozen=True)
class Factor(Generic[Label]):
    """One term of the cost.

    Args:
        variables: what it depends on; one of them may occur twice.
        cost: of their labels, in that order: a float, an int or a Fraction, `math.inf` where forbidden; not NaN or -inf.
        name: for people.
    """

    variables: tuple[Hashable, ...]
    cost: Callable[..., Cost]
    name: str = ""

    @property
    def scope(self) -> tuple[Hashable, ...]:
        """Each variable once."""
        return tuple(dict.fromkeys(self.variables))

    def costs(self, labels: Sequence[Sequence[Label]]) -> Iterable[Cost]:
        """The cost of every combination of labels of the scope, the last variable's changing fastest."""
        combinations = itertools.product(*labels)
        if len(self.scope) == len(self.variables):
            return itertools.starmap(self.cost, combinations)
        places = [self.scope.index(variable) for variable in self.variables]
        return (self.cost(*(combination[place] for place in places)) for combination in combinations)


def total_cost(assignment: Mapping[Any, Label], factors: Iterable[Factor[Label]]) -> Cost:
    """The sum of the factors under one labelling."""
    return sum(factor.cost(*(assignment[variable] for variable in factor.variables)) for factor in factors)


def minimise(
    domains: Mapping[Variable, Sequence[Label]], factors: Sequence[Factor[Label]], *, limit: int = DEFAULT_LIMIT
) -> dict[Variable, Label]:
    """The labelling of least total cost. Ints and Fractions stay exact.

    Args:
        domains: the labels each variable may have, the preferred one first.
        factors: the terms of the cost; each is evaluated once for each combination of labels, and for the result.
        limit: entries of the largest table.

    Raises:
        LabellingTooLargeError: a table would have more; no factor of several variables has been evaluated.
        NoLabellingError: every labelling costs `math.inf`.
    """
    own, shared = _split(factors)
    preferences = {v: _Preference.of(v, labels, own.get(v, ())) for v, labels in domains.items()}
    labels = {v: preference.labels for v, preference in preferences.items()}
    order = _order(labels, shared, limit)
    rank = {v: place for place, v in enumerate(order)}
    tables = [_Table((rank[v],), preferences[v].costs) for v in order]
    tables += [_evaluate(factor, labels, rank) for factor in shared]
    chosen = dict(zip(order, _back_substitute(_eliminate(_in_floats(tables), len(order))), strict=True))
    result = {v: allowed[chosen.get(v, 0)] for v, allowed in labels.items()}
    if total_cost(result, factors) == math.inf:
        raise NoLabellingError("every combination of labels is forbidden by some factor")
    return result


def draw(domains: Mapping[Any, Sequence[Label]], factors: Iterable[Factor[Label]]) -> nx.Graph:
    """The variables as nodes, and an edge between two that share a factor; for a graph viewer.

    A node has its `labels`, and both have `factors`, by name, and `costs`: of a node for each label, of an edge the least and
    the greatest. All are strings, one factor after the other divided by semicolons, so that `nx.write_graphml` takes them.
    """
    graph = nx.Graph()
    for variable, labels in domains.items():
        graph.add_node(variable, labels=", ".join(map(str, labels)), factors="", costs="")
    for factor in factors:
        _draw_factor(graph, factor, [domains[variable] for variable in factor.scope])
    return graph


@dataclasses.dataclass(frozen=True)
class _Preference(Generic[Label]):
    """The labels that a variable's own factors allow, and what these cost together."""

    labels: list[Label]
    costs: NDArray[Any]

    @classmethod
    def of(cls, variable: Hashable, labels: Sequence[Label], factors: Iterable[Factor[Label]]) -> _Preference[Label]:
        """The sum of the factors of one variable."""
        costs = sum((_array(factor.costs([labels])) for factor in factors), start=np.zeros(len(labels), dtype=object))
        allowed = costs != math.inf
        if not allowed.any():
            raise NoLabellingError(f"no label of {variable} is allowed")
        return cls(list(itertools.compress(labels, allowed)), costs[allowed])


@dataclasses.dataclass(frozen=True)
class _Table:
    """Values for each combination of labels; one axis for each variable, known by its rank in the elimination, ascending."""

    scope: tuple[int, ...]
    values: NDArray[Any]

    def spread(self, scope: tuple[int, ...]) -> NDArray[Any]:
        """The values with an axis of size one for each variable of `scope` that they do not depend on."""
        sizes = dict(zip(self.scope, self.values.shape, strict=True))
        return self.values.reshape([sizes.get(variable, 1) for variable in scope])


def _split(factors: Iterable[Factor[Label]]) -> tuple[dict[Hashable, list[Factor[Label]]], list[Factor[Label]]]:
    """The factors of one variable, by variable, and those of several."""
    own: dict[Hashable, list[Factor[Label]]] = {}
    shared = []
    for factor in factors:
        if len(factor.scope) == 1:
            own.setdefault(factor.scope[0], []).append(factor)
        elif factor.scope:
            shared.append(factor)
    return own, shared


def _order(labels: Mapping[Any, Sequence[Label]], factors: Iterable[Factor[Label]], limit: int) -> list[Any]:
    """The variables that have a choice, in order of elimination."""
    free = [variable for variable, allowed in labels.items() if len(allowed) > 1]
    place = {variable: i for i, variable in enumerate(free)}
    scopes = [[place[variable] for variable in factor.scope if variable in place] for factor in factors]
    order = elimination_order([len(labels[variable]) for variable in free], scopes)
    largest = [free[i] for i in sorted(order.largest)]
    entries = math.prod(len(labels[variable]) for variable in largest)
    if entries > limit:
        names = ", ".join(map(str, largest))
        raise LabellingTooLargeError(f"a table over {names} would have {entries} entries; the limit is {limit}")
    return [free[i] for i in order.variables]


def _evaluate(factor: Factor[Label], labels: Mapping[Any, Sequence[Label]], rank: Mapping[Any, int]) -> _Table:
    """A factor over the variables that have a rank; the others have one label, so that their axes vanish."""
    scope = [variable for variable in factor.scope if variable in rank]
    values = _array(factor.costs([labels[variable] for variable in factor.scope]))
    by_rank = sorted(scope, key=rank.__getitem__)
    values = values.reshape([len(labels[variable]) for variable in scope]).transpose([scope.index(v) for v in by_rank])
    return _Table(tuple(rank[variable] for variable in by_rank), values)


def _array(costs: Iterable[Cost]) -> NDArray[Any]:
    listed = list(costs)
    return np.fromiter(listed, dtype=object, count=len(listed))


def _in_floats(tables: Sequence[_Table]) -> Sequence[_Table]:
    """The tables as float64, which is faster, unless that would round: a Fraction, or ints that may add up to too much."""
    values = [list(table.values.flat) for table in tables]
    types = set(map(type, itertools.chain.from_iterable(values)))
    if not all(issubclass(kind, (int, float)) for kind in types):
        return tables
    greatest = sum(max((abs(c) for c in costs if not isinstance(c, float)), default=0) for costs in values)
    if greatest > _EXACT_IN_FLOATS:
        return tables
    return [_Table(table.scope, table.values.astype(np.float64)) for table in tables]


def _eliminate(tables: Iterable[_Table], count: int) -> list[_Table]:
    """For each variable in order, the index of its best label, as a table over variables of higher rank."""
    buckets: list[list[_Table]] = [[] for _ in range(count)]
    choices = []
    for table in tables:
        if table.scope:
            buckets[table.scope[0]].append(table)
    for bucket in buckets:
        total = _sum(bucket)
        rest = total.scope[1:]
        choices.append(_Table(rest, np.asarray(total.values.argmin(axis=0))))
        if rest:
            buckets[rest[0]].append(_Table(rest, total.values.min(axis=0)))
    return choices


def _sum(tables: Sequence[_Table]) -> _Table:
    scope = tuple(sorted({variable for table in tables for variable in table.scope}))
    return _Table(scope, functools.reduce(np.add, [table.spread(scope) for table in tables]))


def _back_substitute(choices: Sequence[_Table]) -> list[int]:
    """The index of each variable's label, from the last eliminated to the first."""
    chosen = [0] * len(choices)
    for variable in reversed(range(len(choices))):
        choice = choices[variable]
        chosen[variable] = int(choice.values[tuple(chosen[other] for other in choice.scope)])
    return chosen


def _draw_factor(graph: nx.Graph, factor: Factor[Label], labels: Sequence[Sequence[Label]]) -> None:
    """Adds a factor to what its node or its edges say."""
    few = math.prod(map(len, labels)) <= _MOST_COSTS_DRAWN
    costs = list(factor.costs(labels)) if few else []
    if len(factor.scope) == 1:
        _append(graph.nodes[factor.scope[0]], factors=factor.name or "unnamed", costs=", ".join(map(str, costs)) or "…")
        return
    bounds = f"{min(costs)} … {max(costs)}" if costs else "…"
    graph.add_edges_from(itertools.combinations(factor.scope, 2))
    for edge in itertools.combinations(factor.scope, 2):
        _append(graph.edges[edge], factors=factor.name or "unnamed", costs=bounds)


def _append(attributes: dict[str, str], **texts: str) -> None:
    for key, text in texts.items():
        attributes[key] = "; ".join(filter(None, [attributes.get(key), text]))
