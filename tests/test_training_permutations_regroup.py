"""Regrouping: features move to where their units are active, never for less, never too many."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from padst_compile import permutation
from padst_compile.errors import PermutationScoresError, StructureMismatchError
from padst_compile.permutation_search.units import PlaceUnits, place_units
from padst_compile.structures import NM, Block, Diagonal, Shape, Structure, Topology, Unstructured
from padst_compile.testing.strategies import PackedWeight, packed_weights
from padst_compile.training.permutations.regroup import combine, regroup

SEEDS = st.integers(0, 2**32 - 1)
FRACTIONS = st.floats(0.0, 1.0)
SIDES = st.sampled_from(("input", "output"))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def integers(*shape: int, seed: int = 0) -> torch.Tensor:
    """Whole numbers from 0 to 9: sums of them are exact."""
    return torch.randint(0, 10, shape, generator=seeded(seed)).float()


@st.composite
def problems(draw: st.DrawFn, largest: int = 24) -> tuple[torch.Tensor, PlaceUnits]:
    """Scores and units: groups of places of any sizes, active at random."""
    size, lines, groups, seed = draw(st.integers(1, largest)), draw(st.integers(1, 6)), draw(st.integers(1, 8)), draw(SEEDS)
    active = torch.rand(lines, groups, generator=seeded(seed)) < 0.4
    group = torch.randint(groups, (size,), generator=seeded(seed + 1))
    return integers(lines, size, seed=seed + 2), PlaceUnits(active, group, 1, "input")


@given(problems(), FRACTIONS, st.floats(0.0, 1.0), SEEDS)
def test_the_order_is_a_permutation_moves_few_features_and_never_lowers_the_benefit(
    problem: tuple[torch.Tensor, PlaceUnits], fraction: float, gain: float, seed: int
) -> None:
    scores, units = problem
    size = scores.shape[1]
    order = regroup(scores, units, fraction=fraction, gain=gain, generator=seeded(seed))
    assert order.dtype == torch.int64
    permutation.check(order, size, "order")
    moved = order != torch.arange(size)
    assert int(moved.sum()) <= fraction * size
    before, after = benefit(scores, units), benefit(scores, units, order)
    assert after >= before
    assert (after > before) == bool(moved.any())
    assert torch.equal(units.group[order][moved] != units.group[moved.nonzero().flatten()], torch.ones(int(moved.sum())).bool())
    assert torch.equal(order, regroup(scores, units, fraction=fraction, gain=gain, generator=seeded(seed)))


@given(problems(), st.floats(0.01, 2.0))
def test_what_moves_gains_more_than_asked_for(problem: tuple[torch.Tensor, PlaceUnits], gain: float) -> None:
    scores, units = problem
    order = regroup(scores, units, fraction=1.0, gain=gain, generator=seeded())
    moved = order != torch.arange(order.numel())
    assume(bool(moved.any()))
    held = units.held()[:, moved]
    had = float((scores[:, moved] * held).sum())
    has = float((scores[:, order][:, moved] * held).sum())
    assert has - had > gain * had


@given(problems(largest=6), st.sampled_from((0.0, 0.5, 2.0)))
def test_with_all_features_as_candidates_no_order_is_better(problem: tuple[torch.Tensor, PlaceUnits], gain: float) -> None:
    scores, units = problem

    def value(order: torch.Tensor) -> float:
        """The benefit, where that of features that stay in their group counts for more."""
        stays = units.group[order] == units.group
        return benefit(scores, units, order) + gain * float((scores[:, order] * units.held())[:, stays].sum())

    order = regroup(scores, units, fraction=1.0, gain=gain, generator=seeded())
    every = itertools.permutations(range(scores.shape[1]))
    assert value(order) == max(value(torch.tensor(other)) for other in every)


@given(problems(), SEEDS)
def test_features_stay_in_their_set(problem: tuple[torch.Tensor, PlaceUnits], seed: int) -> None:
    scores, units = problem
    sets = torch.randint(-1, 3, (scores.shape[1],), generator=seeded(seed))
    order = regroup(scores, units, fraction=1.0, gain=0.0, generator=seeded(), sets=sets)
    assert torch.equal(sets[order], sets)
    assert torch.equal(order[sets < 0], (sets < 0).nonzero().flatten())
    assert benefit(scores, units, order) >= benefit(scores, units)
    whole = regroup(scores, units, fraction=1.0, gain=0.0, generator=seeded(), sets=torch.zeros_like(sets))
    assert torch.equal(whole, regroup(scores, units, fraction=1.0, gain=0.0, generator=seeded()))


@given(problems())
def test_a_second_run_of_a_full_search_finds_nothing_more(problem: tuple[torch.Tensor, PlaceUnits]) -> None:
    scores, units = problem
    order = regroup(scores, units, fraction=1.0, gain=0.0, generator=seeded())
    assert permutation.is_identity(regroup(scores[:, order], units, fraction=1.0, gain=0.0, generator=seeded()))


def test_two_features_in_each_others_places_are_exchanged() -> None:
    scores = torch.tensor([[0.0, 5.0, 5.0, 0.0], [5.0, 0.0, 0.0, 5.0]])
    units = PlaceUnits(torch.eye(2, dtype=torch.bool), torch.tensor([0, 0, 1, 1]), 1, "input")
    assert regroup(scores, units, fraction=1.0, generator=seeded()).tolist() == [2, 1, 0, 3]  # 1 and 3 are where they should be


@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.99])
def test_the_fraction_is_rounded_down_and_one_feature_alone_cannot_move(fraction: float) -> None:
    units = PlaceUnits(torch.eye(2, dtype=torch.bool), torch.arange(2), 1, "input")
    scores = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert permutation.is_identity(regroup(scores, units, fraction=fraction, generator=seeded()))
    assert regroup(scores, units, fraction=1.0, generator=seeded()).tolist() == [1, 0]


def test_nothing_moves_for_nothing() -> None:
    units = PlaceUnits(torch.ones(3, 2, dtype=torch.bool), torch.tensor([0, 0, 1, 1]), 1, "input")
    assert permutation.is_identity(regroup(integers(3, 4), units, fraction=1.0, gain=0.0, generator=seeded()))
    empty = PlaceUnits(torch.zeros(3, 2, dtype=torch.bool), torch.tensor([0, 0, 1, 1]), 1, "input")
    assert permutation.is_identity(regroup(integers(3, 4), empty, fraction=1.0, gain=0.0, generator=seeded()))


def test_a_gain_below_the_threshold_moves_nothing() -> None:
    scores = torch.tensor([[10.0, 11.0], [11.0, 10.0]])
    units = PlaceUnits(torch.eye(2, dtype=torch.bool), torch.arange(2), 1, "input")
    assert regroup(scores, units, fraction=1.0, gain=0.09, generator=seeded()).tolist() == [1, 0]
    assert regroup(scores, units, fraction=1.0, gain=0.11, generator=seeded()).tolist() == [0, 1]


def test_repeated_small_moves_find_planted_groups() -> None:
    size, groups = 64, 8
    home = torch.randperm(size, generator=seeded(1)) % groups  # the only group of lines that needs the feature
    scores = torch.zeros(groups, size)
    scores[home, torch.arange(size)] = 1.0
    units = PlaceUnits(torch.eye(groups, dtype=torch.bool), torch.arange(size) // 8, 1, "input")
    generator = seeded(2)
    at = torch.arange(size)
    for _ in range(60):
        at = at[regroup(scores[:, at], units, fraction=0.25, generator=generator)]
    assert torch.equal(home[at], units.group)


def test_scores_that_are_not_finite_are_refused() -> None:
    units = PlaceUnits(torch.eye(2, dtype=torch.bool), torch.arange(2), 1, "input")
    with pytest.raises(PermutationScoresError, match="NaN or infinite"):
        regroup(torch.full((2, 2), float("nan")), units, fraction=1.0, generator=seeded())


# Units of places


def benefit(scores: torch.Tensor, units: PlaceUnits, order: torch.Tensor | None = None) -> float:
    """The total benefit of all features at their places, as if they had moved by `order`."""
    moved = scores if order is None else scores[:, order]
    return float((moved.double() * units.held()).sum())


def structured() -> st.SearchStrategy[PackedWeight]:
    return packed_weights(16).filter(lambda packed: not isinstance(packed.structure, Unstructured))


@given(structured(), SIDES, SEEDS)
def test_the_benefit_is_what_the_mask_keeps_of_the_scores(packed: PackedWeight, side: str, seed: int) -> None:
    shape = packed.shape
    units = place_units(packed.structure, packed.topology, shape, side)
    dense = integers(shape.out_features, shape.in_features, seed=seed)
    scores = units.scores(dense)
    size = shape.in_features if side == "input" else shape.out_features
    assert scores.shape == (units.active.shape[0], size)
    order = torch.randperm(size, generator=seeded(seed))
    moved = dense[:, order] if side == "input" else dense[order]
    kept = packed.structure.pack(moved, packed.topology).sum()
    assert benefit(scores, units) == float(packed.structure.pack(dense, packed.topology).sum())
    assert benefit(scores, units, order) == float(kept)


@pytest.mark.parametrize(
    ("structure", "side", "lines", "places"),
    [
        (Block((2, 3)), "input", 4, 3),
        (Block((2, 3)), "output", 3, 4),
        (NM(1, 3, 2), "input", 4, 9),
        (NM(1, 3, 2), "output", 9, 4),
        (Diagonal(), "input", 8, 9),
    ],
)
def test_the_grid_of_lines_and_places_follows_the_structure(structure: Structure, side: str, lines: int, places: int) -> None:
    shape = Shape(8, 9)
    topology = structure.choose(torch.rand(8, 9, generator=seeded()), structure.natural_sparsity() or 0.5)
    units = place_units(structure, topology, shape, side)
    assert units.active.shape == (lines, places)
    assert int(units.group.max()) == places - 1


def test_an_unstructured_layer_is_refused_by_name() -> None:
    topology: Topology = (torch.ones(4, 4, dtype=torch.bool),)
    with pytest.raises(StructureMismatchError, match=r"layer 'blocks\.0\.fc': 'regroup' .* permutation='none'"):
        place_units(Unstructured(), topology, Shape(4, 4), "input", "blocks.0.fc")


def test_combined_scores_weigh_weights_and_gradients_alike_whatever_their_units() -> None:
    units = PlaceUnits(torch.tensor([[True, False], [False, True]]), torch.tensor([0, 0, 1, 1]), 1, "input")
    weights = (integers(2, 4, seed=1) + 1) * units.held()
    gradients = integers(2, 4, seed=2) + 1
    scores = combine(weights, gradients, units)
    torch.testing.assert_close(scores, combine(weights * 1000, gradients / 1000, units))
    torch.testing.assert_close(scores[units.held()].mean(), torch.tensor(2.0))  # 1 from each
    assert torch.equal(combine(weights * 0, gradients * 0, units), torch.zeros(2, 4))
    assert permutation.is_identity(
        regroup(combine(weights, 0 * gradients, units), units, fraction=1.0, gain=0.0, generator=seeded())
    )
