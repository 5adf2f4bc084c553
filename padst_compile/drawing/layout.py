"""Places for the boxes of a block: one row per step, and a lane beside the rows for every tensor that skips some."""

from __future__ import annotations

import collections
import dataclasses

import networkx as nx

from padst_compile.drawing.block_graph import BlockGraph


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where things are.

    Attributes:
        rows: of each box.
        columns: of each box, counted from the middle of its row; a half where a row has an even number of boxes.
        lanes: of each edge, or None for one that goes straight down.
    """

    rows: tuple[int, ...]
    columns: tuple[float, ...]
    lanes: tuple[int | None, ...]

    @property
    def height(self) -> int:
        """Number of rows."""
        return 1 + max(self.rows, default=0)

    @property
    def breadth(self) -> int:
        """Boxes in the widest row."""
        return max(collections.Counter(self.rows).values(), default=0)

    @property
    def lane_count(self) -> int:
        """Lanes beside the rows."""
        return 1 + max((lane for lane in self.lanes if lane is not None), default=-1)


def lay_out(block: BlockGraph) -> Layout:
    """Rows by the longest way from the top; a box that nothing feeds stands just above its first reader."""
    rows = _rows(block)
    columns = _columns(block, rows)
    return Layout(tuple(rows), tuple(columns), tuple(_lanes(block, rows, columns)))


def _rows(block: BlockGraph) -> list[int]:
    flow = nx.DiGraph()
    flow.add_nodes_from(range(len(block.boxes)))
    flow.add_edges_from((edge.source, edge.target) for edge in block.edges)
    rows = [0] * len(block.boxes)
    order = list(nx.topological_sort(flow))
    for box in order:
        rows[box] = max((rows[before] + 1 for before in flow.predecessors(box)), default=0)
    for box in order:
        if not flow.in_degree(box) and flow.out_degree(box):
            rows[box] = min(rows[after] for after in flow.successors(box)) - 1
    return rows


def _columns(block: BlockGraph, rows: list[int]) -> list[float]:
    columns = [0.0] * len(rows)
    for row in range(max(rows, default=-1) + 1):
        here = [box for box, own in enumerate(rows) if own == row]
        feeding = {box: [columns[edge.source] for edge in block.edges if edge.target == box] or [0.0] for box in here}
        here.sort(key=lambda box: sum(feeding[box]) / len(feeding[box]))
        for position, box in enumerate(here):
            columns[box] = position - (len(here) - 1) / 2
    return columns


def _lanes(block: BlockGraph, rows: list[int], columns: list[float]) -> list[int | None]:
    """Edges that would run through a box go around, the short ones closest."""
    lanes: list[int | None] = [None] * len(block.edges)
    taken: list[list[tuple[int, int]]] = []
    spans = sorted((rows[edge.target] - rows[edge.source], number) for number, edge in enumerate(block.edges))
    for span, number in spans:
        edge = block.edges[number]
        first, last = rows[edge.source], rows[edge.target]
        if span == 1:
            continue
        lane = next((i for i, used in enumerate(taken) if all(last <= a or b <= first for a, b in used)), len(taken))
        taken += [[]] * (lane == len(taken))
        taken[lane] = [*taken[lane], (first, last)]
        lanes[number] = lane
    return lanes
