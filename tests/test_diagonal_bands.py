"""Diagonals whose offsets lie in runs, read along their step as bands of blocks."""

from __future__ import annotations

import math

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st

from padst_compile import permutation
from padst_compile.kernels.diagonal.band_search import MOST_STORED, Fold, count_blocks, few_enough, folds, likely_steps
from padst_compile.kernels.diagonal.bands import Bands, BandTables, band_tables, diagonal_bands, place
from padst_compile.kernels.diagonal.blocks import block_tables
from padst_compile.structures import Block, Diagonal, Shape

SQUARE, WIDE, TALL = Shape(128, 128), Shape(64, 256), Shape(256, 64)


def steps_of(shape: Shape) -> list[int]:
    """The steps along which a layer can be read."""
    short, long = sorted((shape.out_features, shape.in_features))
    return [step for step in range(1, long) if short == long or (short % step == 0 and long % step == 0)]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Bands, torch.Tensor, Shape]:
    """Any way to read a small layer, and any offsets."""
    short, times = draw(st.integers(2, 12)), draw(st.integers(1, 3))
    shape = draw(st.sampled_from([Shape(short, short * times), Shape(short * times, short)]))
    step = draw(st.sampled_from(steps_of(shape)))
    blocks = Block((draw(st.integers(1, 5)), draw(st.integers(1, 5))))
    offsets = sorted(draw(st.sets(st.integers(0, short * times - 1), min_size=1)))
    return Bands(step, draw(st.integers(0, 5)), blocks), torch.tensor(offsets, dtype=torch.int32), shape


# ---- the maps


def test_places_follow_the_walk_whatever_the_sizes() -> None:
    """`place(c + step * v mod period) == c * length + (v - shift) mod length`, proved with symbols in place of sizes."""
    classes, length, factor, undone, turns, laps = sympy.symbols("g n e f t k", integer=True, positive=True)
    c, v, shift = sympy.symbols("c v s", integer=True, nonnegative=True)
    # The step is classes * factor, the period classes * length; the walk has gone round `laps` times.
    index = c + classes * (factor * v - length * laps)
    found = place(index, classes, length, undone, shift).replace(sympy.floor, lambda x: sympy.floor(sympy.expand(x)))
    found = found.subs({sympy.Mod(c, classes): c, sympy.floor(c / classes): 0})  # a residue: 0 <= c < classes
    inverse = {factor * undone: 1 + turns * length}
    found = found.replace(sympy.Mod, lambda x, n: sympy.simplify(sympy.Mod(sympy.expand(sympy.expand(x).subs(inverse)), n)))
    assert sympy.simplify(found - (c * length + sympy.Mod(v - shift, length))) == 0


@pytest.mark.parametrize("shape", [Shape(2, 2), Shape(12, 12), Shape(35, 35), Shape(12, 36), Shape(36, 12)], ids=str)
def test_places_are_those_of_a_walk_step_by_step(shape: Shape) -> None:
    long = max(shape.out_features, shape.in_features)
    for step in steps_of(shape):
        bands = Bands(step, 0, Block(4))
        for places, features in (
            (bands.input_places(shape), shape.in_features),
            (bands.output_places(shape), shape.out_features),
        ):
            order, index = [], 0
            for c in range(math.gcd(step, long)):
                index = c
                for _ in range(features // math.gcd(step, long)):
                    order.append(index)
                    index = (index + step) % long
            assert permutation.inverse(places).tolist() == order


@given(cases())
def test_blocks_hold_the_diagonals_and_zeros(case: tuple[Bands, torch.Tensor, Shape]) -> None:
    """The dense weight, reordered on both sides, is that of the blocks; every value occurs once."""
    bands, offsets, shape = case
    length = min(shape.out_features, shape.in_features)
    values = torch.arange(1, offsets.numel() * length + 1, dtype=torch.float64).reshape(-1, length)
    tables = band_tables(bands, offsets, shape)
    assert bands.blocks.check_topology(tables.topology, shape) is None
    assert permutation.check(tables.input_permutation, shape.in_features, "layer").dtype == torch.int32
    assert permutation.check(tables.output_permutation, shape.out_features, "layer").dtype == torch.int32
    blocks = tables.blocks(values, bands.blocks)
    assert int(blocks.count_nonzero()) == values.numel()
    weight = bands.blocks.unpack(blocks, tables.topology, shape)
    into, out = permutation.inverse(tables.input_permutation).long(), tables.output_permutation.long()
    assert torch.equal(weight[out][:, into], Diagonal().unpack(values, (offsets,), shape))
    assert bands.moves_inputs(shape) == (not permutation.is_identity(tables.input_permutation))
    assert bands.moves_outputs(shape) == (not permutation.is_identity(tables.output_permutation))


@given(cases())
def test_no_block_is_empty_and_their_number_is_known_beforehand(case: tuple[Bands, torch.Tensor, Shape]) -> None:
    bands, offsets, shape = case
    tables = band_tables(bands, offsets, shape)
    values = torch.ones(offsets.numel(), min(shape.out_features, shape.in_features))
    assert bool(tables.blocks(values, bands.blocks).flatten(1).any(1).all())
    assert count_blocks(bands, offsets, shape) == tables.topology[1].numel()


@given(cases())
def test_the_operator_for_graphs(case: tuple[Bands, torch.Tensor, Shape]) -> None:
    bands, offsets, shape = case
    found = diagonal_bands(*arguments_of(bands, offsets, shape))
    tables = band_tables(bands, offsets, shape)
    expected = [*tables.topology, tables.entries, tables.input_permutation, tables.output_permutation]
    assert all(torch.equal(a, b) and a.dtype == b.dtype == torch.int32 for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("shape", [Shape(12, 12), Shape(8, 24), Shape(24, 8)], ids=str)
def test_the_operator_says_beforehand_what_it_makes(shape: Shape) -> None:
    arguments = arguments_of(Bands(2, 1, Block((4, 3))), torch.tensor([0, 1, 5], dtype=torch.int32), shape)
    torch.library.opcheck(torch.ops.padst.diagonal_bands.default, arguments, test_utils=("test_schema", "test_faketensor"))


def arguments_of(bands: Bands, offsets: torch.Tensor, shape: Shape) -> tuple[object, ...]:
    sizes = shape.out_features, shape.in_features, bands.step, bands.shift, bands.blocks.rows, bands.blocks.columns
    return offsets, *sizes, count_blocks(bands, offsets, shape)


@pytest.mark.parametrize("shape", [Shape(12, 12), Shape(12, 36), Shape(36, 12)], ids=str)
@pytest.mark.parametrize("group", [2, 3, 6])
def test_whole_classes_are_the_blocks_of_diagonals_in_classes(shape: Shape, group: int) -> None:
    structure = Diagonal(group)
    topology = structure.choose(torch.rand(*dense(shape)), 0.5)
    expected = block_tables(structure, topology, shape)
    found: BandTables = band_tables(Bands(structure.classes(shape), 0, expected.structure), topology[0], shape)
    assert all(map(torch.equal, found.topology, expected.topology))
    assert torch.equal(found.entries, expected.entries)
    assert torch.equal(found.input_permutation, expected.input_permutation)
    assert torch.equal(found.output_permutation, expected.output_permutation)


def dense(shape: Shape) -> tuple[int, int]:
    return shape.out_features, shape.in_features


# ---- the search


def offsets_of(*runs: range, period: int) -> torch.Tensor:
    return torch.tensor(sorted({offset % period for run in runs for offset in run}), dtype=torch.int32)


def cheapest(offsets: torch.Tensor, shape: Shape, side: int = 16) -> Fold:
    """The fold that stores least in blocks of one size."""
    return min((fold for fold in folds(offsets, shape) if fold.bands.blocks == Block(side)), key=lambda fold: fold.stored)


@given(st.integers(1, 40), st.data())
def test_progressions_are_counted(period: int, data: st.DataObject) -> None:
    offsets = sorted(data.draw(st.sets(st.integers(0, period - 1), min_size=1)))
    for step, begun in likely_steps(torch.tensor(offsets), period, period):
        assert begun == sum((offset - step) % period not in offsets for offset in offsets)


def test_the_steps_with_the_fewest_progressions_come_first() -> None:
    offsets = offsets_of(range(5, 5 + 7 * 40, 7), period=509)
    assert likely_steps(offsets.long(), 509, 509)[0] == (7, 1)


@pytest.mark.parametrize("shape", [SQUARE, WIDE, TALL], ids=str)
def test_a_run_is_a_band_of_features_in_their_order(shape: Shape) -> None:
    offsets = offsets_of(range(17), period=max(dense(shape)))
    fold = cheapest(offsets, shape)
    assert (fold.bands.step, fold.bands.shift) == (1, 0)
    assert not fold.bands.moves_inputs(shape)
    assert not fold.bands.moves_outputs(shape)
    assert fold.stored == 32 * min(dense(shape))  # of 17 + 15 columns


@pytest.mark.parametrize("first", range(0, 128, 9))
def test_a_shift_lets_a_run_begin_where_blocks_do(first: int) -> None:
    offsets = offsets_of(range(first, first + 17), period=128)
    fold = cheapest(offsets, SQUARE)
    assert fold.bands.shift == first % 16
    assert count_blocks(fold.bands, offsets, SQUARE) * 256 == fold.stored == 32 * 128


@given(st.sets(st.integers(0, 127), min_size=1, max_size=40))
def test_no_other_shift_takes_fewer_blocks(runs: set[int]) -> None:
    offsets = offsets_of(*(range(first, first + 10) for first in runs), period=128)
    for fold in folds(offsets, SQUARE):
        if math.gcd(fold.bands.step, 128) == 1:  # block rows that stand for all are exact
            counts = [
                count_blocks(Bands(fold.bands.step, shift, fold.bands.blocks), offsets, SQUARE)
                for shift in range(fold.bands.blocks.columns)
            ]
            assert counts.index(min(counts)) == fold.bands.shift
            assert min(counts) * fold.bands.blocks.rows * fold.bands.blocks.columns == fold.stored


def test_progressions_of_a_step_without_common_divisor_are_found() -> None:
    offsets = offsets_of(range(3, 3 + 5 * 40, 5), period=509)
    fold = cheapest(offsets, Shape(509, 509))
    assert fold.bands.step == 5
    assert fold.stored < 1.7 * offsets.numel() * 509


@pytest.mark.parametrize("shape", [SQUARE, WIDE, TALL], ids=str)
@pytest.mark.parametrize("group", [16, 32])
def test_whole_classes_are_found_without_being_told(shape: Shape, group: int) -> None:
    structure = Diagonal(group)
    (offsets,) = structure.choose(torch.rand(*dense(shape)), 0.5)
    step = min(dense(shape)) // group
    sizes = Block((shape.out_features // step, shape.in_features // step))
    (fold, *_) = [fold for fold in folds(offsets, shape) if fold.bands.step == step and fold.bands.blocks == sizes]
    assert fold.stored == offsets.numel() * min(dense(shape))


def test_neighbouring_classes_that_are_too_small_alone_share_blocks() -> None:
    (offsets,) = Diagonal(8).topology_of(torch.arange(96)[None] < 16, Shape(768, 768))
    fold = cheapest(offsets, Shape(768, 768))
    assert fold.bands.step == 96
    assert fold.stored <= 1.13 * offsets.numel() * 768


@pytest.mark.parametrize("shape", [Shape(768, 768), Shape(768, 3072), Shape(3072, 768)], ids=str)
@pytest.mark.parametrize("share", [0.05, 0.1, 0.2, 0.5])
def test_scattered_offsets_form_no_bands(shape: Shape, share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    period = max(dense(shape))
    offsets = torch.randperm(period, generator=generator)[: round(share * period)].sort().values.int()
    assert list(folds(offsets, shape)) == []


def test_layers_without_diagonals_have_nothing_to_fold() -> None:
    assert list(folds(torch.empty(0, dtype=torch.int32), SQUARE)) == []


def test_blocks_may_store_a_few_times_the_weights_and_half_of_the_dense_weight() -> None:
    assert few_enough(MOST_STORED * 100, 100, SQUARE)
    assert not few_enough(MOST_STORED * 100 + 1, 100, SQUARE)
    assert few_enough(128 * 64, 128 * 60, SQUARE)
    assert not few_enough(128 * 64 + 1, 128 * 60, SQUARE)


@given(st.sets(st.integers(0, 127), min_size=1, max_size=3), st.integers(4, 20))
def test_all_that_is_found_is_few_enough(runs: set[int], width: int) -> None:
    offsets = offsets_of(*(range(first, first + width) for first in runs), period=128)
    for fold in folds(offsets, SQUARE):
        assert few_enough(fold.stored, offsets.numel() * 128, SQUARE)
        assert fold.stored >= offsets.numel() * 128 * (1 - 1 / 8)  # a sample of 8 block rows
