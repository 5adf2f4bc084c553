"""Why a permutation that is left could not vanish, in words for the user."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from padst_compile.passes.axes.axis import Axis
from padst_compile.passes.axes.trace import Permute
from padst_compile.passes.graph import argument, layer_name
from padst_compile.structures import parse

if TYPE_CHECKING:
    from padst_compile.passes.place_permutations import Placement, Site

_MOST_NAMES = 2
_VERBS = {"input": "read", "output": "written"}
_INDEXED = ("nm", "diagonal")  # kernels that find every row through an index


def why_left(problem: Placement, site: Site) -> str:
    """A sentence about one end of a structured product that has a table."""
    if parse(argument(site.node, "structure")).kind in _INDEXED:
        return "its kernel finds every row through an index in any case: nothing would be gained"
    if problem.wanted(site) is None:
        return _why_impossible(problem, site)
    rivals = [f"{_VERBS[rival.side]} by {layer_name(rival.node)}" for rival in _rivals(problem, site)]
    if site.table is None:
        return f"it stands in for tables elsewhere: the same features are {_listed(rivals)}"
    return f"sparing it costs more elsewhere: the same features are {_listed(rivals)}"


def why_link_left(problem: Placement, link: Permute) -> str:
    """A sentence about a permutation that is an operation of its own."""
    leaves = [leaf for axis in (link.inputs, link.outputs) for leaf in problem.freedom.leaves(axis)]
    fixed = next((leaf.pinned for leaf in leaves if leaf.pinned is not None), None)
    return "sparing it costs more elsewhere" if fixed is None else f"the order of the features is fixed: {fixed}"


def _why_impossible(problem: Placement, site: Site) -> str:
    leaves = problem.freedom.leaves(site.axis)
    fixed = next((leaf.pinned for leaf in leaves if leaf.pinned is not None), None)
    if all(leaf.pinned is not None for leaf in leaves):
        return f"the order of its {site.side}s is fixed: {fixed}"
    return f"the graph divides its {site.side}s as {in_words(site.axis)}, and the permutation does not keep to that"


def _rivals(problem: Placement, site: Site) -> Iterator[Site]:
    """Other ends of products that see the same features and would need another order of them."""
    own = problem.wanted(site) or {}
    for other in problem.sites:
        theirs = problem.wanted(other) or {}
        if any(theirs[leaf] != own[leaf] for leaf in own.keys() & theirs.keys()):
            yield other


def _listed(names: list[str]) -> str:
    distinct = list(dict.fromkeys(names))
    if not distinct:
        return "seen by other operations"
    shown, more = distinct[:_MOST_NAMES], len(distinct) - _MOST_NAMES
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")


def in_words(axis: Axis) -> str:
    """The structure of an axis: `3 x 64` for three groups of 64, `64 + 128` for pieces one after the other."""
    root = axis.root()
    if root.kind == "leaf":
        return str(root.size)
    words = [in_words(part) for part in root.parts]
    if root.kind == "sum":
        return " + ".join(words)
    return " x ".join(f"({word})" if part.root().kind == "sum" else word for part, word in zip(root.parts, words, strict=True))
