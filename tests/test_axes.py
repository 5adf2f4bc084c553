"""Axes as unknowns: what unifying, cutting, aligning and pinning do, and which orders a structured axis can have.

The reference is brute force: an order of a small axis is allowed if and only if it is a product of orders of the parts, as
`groups` builds them from the definition, without a look at the code under test.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import hypothesis.strategies as st
import numpy as np
import pytest
import sympy
from hypothesis import given

from padst_compile.passes.axes.axis import Axis, align, cut, product, sum_of, unify
from padst_compile.passes.axes.orders import Freedom, Order

TOKENS = sympy.Symbol("T", integer=True, positive=True)


def sizes(axes: list[Axis]) -> list[object]:
    return [axis.root().size for axis in axes]


def pinned(*axes: Axis) -> list[bool]:
    return [axis.root().pinned is not None for axis in axes]


def freedom_of(*axes: Axis) -> Freedom:
    """Each axis is seen alone."""
    return Freedom([(axis,) for axis in axes], [])


def split_into(size: int, *parts: int) -> tuple[Axis, list[Axis]]:
    """An axis that a view divides into `parts`."""
    axis, factors = Axis(size), [Axis(part) for part in parts]
    align([axis], factors)
    return axis, factors


# --- unify ---


def test_unified_axes_have_one_root() -> None:
    a, b, c = Axis(4), Axis(4), Axis(4)
    unify(a, b)
    unify(b, c)
    assert a.root() is b.root() is c.root()
    assert pinned(a, b, c) == [False] * 3


def test_an_axis_may_meet_itself() -> None:
    a = Axis(4)
    unify(a, a)
    assert pinned(a) == [False]


def test_axes_of_other_sizes_stay_apart_and_keep_their_order() -> None:
    a, b = Axis(4), Axis(5)
    unify(a, b)
    assert a.root() is not b.root()
    assert {a.pinned, b.pinned} == {"axes of 4 and 5 features meet"}


@pytest.mark.parametrize("first", [True, False])
def test_a_pin_reaches_what_is_unified_with_it(first: bool) -> None:
    fixed, free = Axis(4, "fixed"), Axis(4)
    unify(*((fixed, free) if first else (free, fixed)))
    assert (fixed.root().pinned, free.root().pinned) == ("fixed", "fixed")


@pytest.mark.parametrize("first", [True, False])
def test_a_pin_reaches_the_parts_of_what_is_unified_with_it(first: bool) -> None:
    fixed, (whole, parts) = Axis(6, "fixed"), split_into(6, 2, 3)
    unify(*((fixed, whole) if first else (whole, fixed)))
    assert pinned(*parts) == [True, True]


def test_products_agree_part_by_part() -> None:
    (a, of_a), (b, of_b) = split_into(6, 2, 3), split_into(6, 2, 3)
    unify(a, b)
    assert [x.root() is y.root() for x, y in zip(of_a, of_b, strict=True)] == [True, True]
    assert pinned(a, *of_a) == [False] * 3


def test_products_with_other_borders_are_refined_to_meet() -> None:
    (a, _), (b, _) = split_into(12, 4, 3), split_into(12, 2, 6)
    unify(a, b)
    assert pinned(a, b) == [False, False]
    assert sorted(leaf.size for leaf in freedom_of(a).leaves(a)) == [2, 2, 3]


def test_products_that_have_no_common_division_are_pinned() -> None:
    (a, of_a), (b, of_b) = split_into(12, 4, 3), split_into(12, 3, 4)
    unify(a, b)
    assert all(pinned(*of_a, *of_b))


def test_sums_agree_piece_by_piece() -> None:
    a, b = Axis(9), Axis(9)
    first, second = cut(a, [4, 5]), cut(b, [2, 7])
    unify(a, b)
    assert pinned(a, b) == [False, False]
    freedom = freedom_of(a)
    assert sorted(leaf.size for leaf in freedom.leaves(a)) == [2, 2, 5]
    assert [leaf.size for leaf in freedom.leaves(first[0]) if leaf in freedom.leaves(second[1])] == [2]


def test_a_sum_and_a_product_meet_where_the_product_has_a_border() -> None:
    a, (b, (heads, channels)) = Axis(8), split_into(8, 4, 2)
    cut(a, [2, 6])
    unify(a, b)
    assert pinned(a, b, heads, channels) == [False] * 4


def test_a_sum_and_a_product_that_cross_are_pinned() -> None:
    a, (b, (heads, channels)) = Axis(8), split_into(8, 4, 2)
    cut(a, [3, 5])
    unify(a, b)
    assert pinned(heads, channels) == [True, True]


def test_sums_whose_borders_are_not_known_are_pinned() -> None:
    a, b = (Axis(2), Axis(TOKENS)), (Axis(TOKENS), Axis(2))
    unify(sum_of(a), sum_of(b))
    assert [axis.pinned for axis in (a[0], b[1])] == ["it is divided in two ways that do not meet"] * 2


def test_an_axis_that_meets_a_part_of_itself_keeps_its_order() -> None:
    part = Axis(3)
    whole = sum_of([part, Axis(0)])
    assert whole is part  # what is empty does not count
    outer = product([Axis(1), part])
    unify(part, outer)
    assert part.root().pinned == "an axis meets a part of itself"


# --- cut ---


def test_a_cut_gives_pieces_in_order() -> None:
    axis = Axis(9)
    pieces = cut(axis, [2, 0, 7])
    assert sizes(pieces) == [2, 0, 7]
    assert axis.kind == "sum"
    assert list(axis.parts) == [pieces[0], pieces[2]]


def test_a_cut_into_one_piece_is_the_axis() -> None:
    axis = Axis(9)
    assert cut(axis, [0, 9, 0])[1] is axis
    assert axis.kind == "leaf"


def test_the_same_cut_gives_the_same_pieces() -> None:
    axis = Axis(9)
    first, again = cut(axis, [4, 5]), cut(axis, [4, 5])
    assert [a.root() is b.root() for a, b in zip(first, again, strict=True)] == [True, True]


def test_cuts_at_other_places_share_what_they_overlap() -> None:
    axis = Axis(9)
    left, _ = cut(axis, [4, 5])
    _, middle, _ = cut(axis, [2, 5, 2])
    assert [leaf.size for leaf in freedom_of(axis).leaves(left)] == [2, 2]
    assert [leaf.size for leaf in sorted(freedom_of(axis).leaves(middle), key=lambda leaf: leaf.size)] == [2, 3]
    assert pinned(axis, left, middle) == [False] * 3


def test_a_cut_between_heads_keeps_the_channels_together() -> None:
    axis, (heads, channels) = split_into(12, 4, 3)
    left, right = cut(axis, [3, 9])
    assert sizes([left, right]) == [3, 9]
    assert pinned(axis, heads, channels) == [False] * 3
    assert [(of is heads.root(), first, last) for of, first, last in channels.root().instances] == [(True, 0, 1), (True, 1, 4)]
    assert left.root() is channels.instance(heads, 0, 1)  # one head needs no axis for heads


def test_the_last_head_alone_is_its_channels() -> None:
    axis, (heads, channels) = split_into(12, 4, 3)
    assert cut(axis, [9, 3])[1].root() is channels.instance(heads, 3, 4)


def test_a_cut_through_a_head_pins() -> None:
    axis, (heads, channels) = split_into(12, 4, 3)
    pieces = cut(axis, [4, 8])
    assert sizes(pieces) == [4, 8]
    assert pinned(axis, heads, channels, *pieces) == [True] * 5
    assert channels.root().pinned == "it is cut where its structure has no border"


# --- align ---


def test_a_view_that_changes_nothing_ties_axes_one_by_one() -> None:
    left, right = [Axis(2), Axis(3)], [Axis(2), Axis(3)]
    align(left, right)
    assert [a.root() is b.root() for a, b in zip(left, right, strict=True)] == [True, True]


def test_a_view_divides_an_axis_major_first() -> None:
    axis, (heads, channels) = split_into(12, 4, 3)
    assert axis.kind == "product"
    assert [part.root() for part in axis.parts] == [heads.root(), channels.root()]


def test_a_view_joins_axes() -> None:
    joined, parts = Axis(24), [Axis(2), Axis(3), Axis(4)]
    align(parts, [joined])
    assert sorted(leaf.size for leaf in freedom_of(joined).leaves(joined)) == [2, 3, 4]
    assert {part.root() for part in parts} == set(freedom_of(joined).leaves(joined))


def test_a_view_there_and_back_ties_the_ends() -> None:
    before, after, parts = Axis(12), Axis(12), [Axis(4), Axis(3)]
    align([before], parts)
    align(parts, [after])
    unify(before, after)
    assert pinned(before, after, *parts) == [False] * 4


def test_axes_of_size_one_come_and_go() -> None:
    axis = Axis(6)
    align([product(()), axis], [Axis(2), product(()), Axis(3), product(())])
    assert pinned(axis) == [False]
    assert [part.size for part in axis.parts] == [2, 3]


def test_a_view_across_a_border_pins_what_it_divides_and_nothing_else() -> None:
    batch, left, right = Axis(5), [Axis(4), Axis(3)], [Axis(3), Axis(4)]
    align([batch, *left], [Axis(5), *right])
    assert pinned(batch, *left, *right) == [False, True, True, True, True]


def test_axes_behind_a_division_are_tied_all_the_same() -> None:
    axis, channels, same = Axis(12), Axis(7), Axis(7)
    align([axis, channels], [Axis(4), Axis(3), same])
    assert channels.root() is same.root()


def test_a_symbolic_axis_is_divided_by_what_divides_it() -> None:
    axis, inner = Axis(6 * TOKENS), Axis(3)
    align([axis], [Axis(2 * TOKENS), inner])
    assert axis.root().pinned == "its size is known at run time only"
    assert [part.size for part in axis.root().parts] == [2 * TOKENS, 3]


# --- instance and pin ---


def test_an_instance_is_the_same_each_time_it_is_asked_for() -> None:
    heads, channels = Axis(4), Axis(3)
    assert channels.instance(heads, 1, 2) is channels.instance(heads, 1, 2)
    assert channels.instance(heads, 1, 2) is not channels.instance(heads, 2, 3)
    assert channels.instance(heads, 1, 2).size == 3


def test_an_instance_of_a_structure_has_the_same_structure() -> None:
    heads, (channels, parts) = Axis(4), split_into(6, 2, 3)
    found = channels.instance(heads, 0, 1)
    assert found.kind == "product"
    assert list(found.parts) == [part.instance(heads, 0, 1) for part in parts]


def test_an_instance_of_a_sum_is_a_sum() -> None:
    heads, channels = Axis(4), Axis(6)
    pieces = cut(channels, [2, 4])
    found = channels.instance(heads, 0, 1)
    assert (found.kind, found.size) == ("sum", 6)
    assert list(found.parts) == [piece.instance(heads, 0, 1) for piece in pieces]


def test_an_instance_of_what_is_pinned_is_the_same() -> None:
    channels = Axis(3, "fixed")
    assert channels.instance(Axis(4), 0, 1) is channels


def test_a_structure_that_comes_later_reaches_instances() -> None:
    heads, channels = Axis(4), Axis(6)
    found = channels.instance(heads, 0, 1)
    cut(channels, [2, 4])
    assert found.root().kind == "sum"
    assert [part.size for part in found.root().parts] == [2, 4]


def test_a_pin_reaches_parts_and_instances() -> None:
    axis, (heads, channels) = split_into(12, 4, 3)
    found = channels.instance(heads, 0, 1)
    axis.pin("fixed")
    assert pinned(axis, heads, channels, found) == [True] * 4


def test_a_pin_reaches_the_parts_of_a_sum_whose_size_is_not_known() -> None:
    part = Axis(4)
    sum_of([part, Axis(TOKENS)]).pin("fixed")
    assert part.pinned == "fixed"


def test_the_first_reason_of_a_pin_stays() -> None:
    axis = Axis(3, "first")
    axis.pin("second")
    assert axis.pinned == "first"


def test_a_sum_or_product_of_one_part_is_that_part() -> None:
    part = Axis(3)
    assert product([part]) is part
    assert sum_of([Axis(0), part]) is part
    assert (product([]).size, sum_of([]).size) == (1, 0)


def test_compounds_are_flat() -> None:
    a, b, c = Axis(2), Axis(3), Axis(4)
    assert list(product([product([a, b]), c]).parts) == [a, b, c]
    assert list(sum_of([a, sum_of([b, c])]).parts) == [a, b, c]


def test_a_compound_of_fixed_parts_is_fixed() -> None:
    both, one = product([Axis(2, "x"), Axis(3, "y")]), product([Axis(2, "x"), Axis(3)])
    assert (both.pinned, one.pinned) == ("x", None)


# --- which orders there are ---

Maker = Callable[[], Axis]


def orders(size: int) -> Iterator[Order]:
    return (np.array(order, dtype=np.int32) for order in itertools.permutations(range(size)))


def allowed(axis: Axis, *others: Axis) -> int:
    """How many orders of an axis can be taken apart, where others are seen too; each comes back as it was."""
    freedom = freedom_of(axis, *others)
    count = 0
    for order in orders(int(axis.size)):
        labels = freedom.decompose(axis, order)
        if labels is not None:
            assert np.array_equal(freedom.assemble(axis, labels), order)
            count += 1
    return count


def shared_pieces() -> Axis:
    piece = Axis(3)
    return sum_of([piece, piece])


GROUPS: dict[str, tuple[Maker, int]] = {
    "a leaf": (lambda: Axis(4), 24),
    "a fixed leaf": (lambda: Axis(4, "fixed"), 1),
    "one index": (lambda: Axis(1), 1),
    "heads and channels": (lambda: split_into(6, 3, 2)[0], math.factorial(3) * 2**3),
    "two heads of three": (lambda: split_into(6, 2, 3)[0], 2 * math.factorial(3) ** 2),
    "three levels": (lambda: split_into(8, 2, 2, 2)[0], 2 ** (1 + 2 + 4)),
    "fixed heads": (lambda: product([Axis(3, "fixed"), Axis(2)]), 2**3),
    "fixed channels": (lambda: product([Axis(3), Axis(2, "fixed")]), math.factorial(3)),
    "pieces": (lambda: sum_of([Axis(2), Axis(3)]), 2 * 6),
    "a piece that occurs twice": (shared_pieces, 6),
    "pieces of heads": (lambda: sum_of([split_into(4, 2, 2)[0], Axis(3)]), 2 * 2**2 * 6),
    "heads that are pieces": (lambda: product([sum_of([Axis(1), Axis(2)]), Axis(2)]), 2 * 2**3),
}


@pytest.mark.parametrize("name", GROUPS)
def test_the_number_of_orders(name: str) -> None:
    make, expected = GROUPS[name]
    assert allowed(make()) == expected


def test_channels_that_are_seen_without_heads_share_one_order() -> None:
    axis, (_, channels) = split_into(6, 3, 2)
    freedom = Freedom([(axis,), (channels,)], [])
    found = [order for order in orders(6) if freedom.decompose(axis, order) is not None]
    assert len(found) == math.factorial(3) * 2


def test_channels_share_one_order_along_heads_that_are_mixed() -> None:
    axis, (heads, _) = split_into(6, 3, 2)
    freedom = Freedom([(axis,)], [heads])
    found = [order for order in orders(6) if freedom.decompose(axis, order) is not None]
    assert len(found) == math.factorial(3) * 2


def test_heads_do_not_leave_their_chunk() -> None:
    axis, _ = split_into(6, 3, 2)
    assert allowed(axis, *cut(axis, [2, 4])) == 2 * 2**3


def test_chunks_of_heads_agree_with_the_whole() -> None:
    """Channels of each chunk have their order in the whole too, head by head."""
    axis, _ = split_into(8, 4, 2)
    left, right = cut(axis, [4, 4])
    freedom = freedom_of(axis, left, right)
    order = np.array([1, 0, 2, 3, 6, 7, 5, 4], dtype=np.int32)
    labels = freedom.decompose(axis, order)
    assert labels is not None
    assert freedom.assemble(left, labels).tolist() == [1, 0, 2, 3]
    assert freedom.assemble(right, labels).tolist() == [2, 3, 1, 0]


def trees(depth: int = 2) -> st.SearchStrategy[Axis]:
    """Axes of a few indices, some of them fixed, and products and sums of these."""
    leaf = st.builds(Axis, st.integers(1, 3), st.sampled_from([None, None, None, "fixed"]))
    if depth == 0:
        return leaf
    parts = st.lists(trees(depth - 1), min_size=1, max_size=3)
    return st.one_of(leaf, parts.map(product), parts.map(sum_of)).filter(lambda axis: axis.size <= 24)


@given(trees(), st.integers(0, 2**16))
def test_what_is_assembled_can_be_taken_apart(axis: Axis, seed: int) -> None:
    freedom, generator = freedom_of(axis), np.random.default_rng(seed)
    labels = {}
    for leaf in freedom.leaves(axis):
        if leaf.pinned is None:
            shape = [int(major.size) for major in freedom.depends(leaf)]
            rows = [generator.permutation(int(leaf.size)) for _ in range(math.prod(shape))]
            labels[leaf] = np.array(rows, dtype=np.int32).tobytes()
    order = freedom.assemble(axis, labels)
    assert sorted(order.tolist()) == list(range(int(axis.size)))
    found = freedom.decompose(axis, order)
    assert found is not None
    assert np.array_equal(freedom.assemble(axis, found), order)


@given(trees(), st.integers(0, 2**16))
def test_what_can_be_taken_apart_is_put_together_again(axis: Axis, seed: int) -> None:
    freedom = freedom_of(axis)
    order = np.random.default_rng(seed).permutation(int(axis.size)).astype(np.int32)
    labels = freedom.decompose(axis, order)
    if labels is not None:
        assert np.array_equal(freedom.assemble(axis, labels), order)


def test_a_major_axis_of_one_index_makes_no_difference() -> None:
    axis = product([Axis(1), Axis(2), Axis(1), Axis(3)])
    assert allowed(axis) == 2 * math.factorial(3) ** 2


@given(trees())
def test_the_identity_is_always_an_order(axis: Axis) -> None:
    freedom, order = freedom_of(axis), np.arange(axis.size, dtype=np.int32)
    labels = freedom.decompose(axis, order)
    assert labels is not None
    assert all(label == freedom.identity(leaf) for leaf, label in labels.items())
    assert np.array_equal(freedom.assemble(axis, {}), order)
