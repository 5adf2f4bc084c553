"""In which order variables leave a sum of factors, so that the tables on the way stay small.

Eliminating a variable makes one table over it and all that it shares a factor or a table with. The variables of these
tables are the bags of a tree decomposition of the interaction graph, and every tree decomposition gives an order: from its
leaves inwards, each variable in the last bag that contains it. The best tree is hard to find; of networkx's two heuristics
the better one is taken. Both find the best for chains, trees and whatever else is chordal.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import networkx as nx
from networkx.algorithms.approximation import treewidth_min_degree, treewidth_min_fill_in


@dataclasses.dataclass(frozen=True)
class EliminationOrder:
    """The variables in order of elimination, and those of the largest table on the way."""

    variables: tuple[int, ...]
    largest: frozenset[int]


def elimination_order(sizes: Sequence[int], scopes: Iterable[Iterable[int]]) -> EliminationOrder:
    """An order for the variables `0 … len(sizes) - 1`. It depends on no hash but those of ints, so that it is always the same.

    Args:
        sizes: labels of each variable.
        scopes: the variables of each factor.
    """
    graph = nx.Graph()
    graph.add_nodes_from(range(len(sizes)))
    for scope in scopes:
        graph.add_edges_from(itertools.combinations(scope, 2))
    trees = [_decompose(graph.subgraph(component), sizes) for component in nx.connected_components(graph)]
    bags: Iterator[frozenset[int]] = itertools.chain.from_iterable(trees)
    largest = max(bags, key=functools.partial(_entries, sizes), default=frozenset())
    return EliminationOrder(tuple(variable for tree in trees for variable in _inwards(tree)), largest)


def _entries(sizes: Sequence[int], bag: frozenset[int]) -> int:
    return math.prod(sizes[variable] for variable in bag)


def _decompose(component: nx.Graph, sizes: Sequence[int]) -> nx.Graph:
    """A tree of bags whose largest table is as small as a heuristic gets it."""
    trees = [heuristic(component)[1] for heuristic in (treewidth_min_degree, treewidth_min_fill_in)]
    return min(trees, key=lambda tree: max(_entries(sizes, bag) for bag in tree))


def _inwards(tree: nx.Graph) -> Iterator[int]:
    """Each variable at the last bag that contains it, from the leaves to the root."""
    root = next(iter(tree))
    for parent, child in reversed(list(nx.bfs_edges(tree, root))):
        yield from sorted(child - parent)
    yield from sorted(root)
