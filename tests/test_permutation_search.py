"""The search for an order of trained weights: never worse than none, and good where there is an order to find."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from padst_compile import permutation
from padst_compile.errors import PermutationScoresError
from padst_compile.permutation_search.search import Side, _Search, search_order
from padst_compile.structures import NM, Block, Diagonal, Shape, Structure, Unstructured

SIDES = ("input", "output")
SEEDS = st.integers(0, 2**32 - 1)
STRUCTURES: tuple[Structure, ...] = (
    Block(4),
    Block((2, 5)),
    NM(1, 4),
    NM(2, 5),
    NM(1, 4, 3),
    NM(3, 3),
    Diagonal(),
    Unstructured(),
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def integers(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Whole numbers: sums of them are exact."""
    return torch.randint(0, 100, (rows, columns), generator=seeded(seed)).float()


def sparsity_of(structure: Structure) -> float:
    natural = structure.natural_sparsity()
    return 0.7 if natural is None else natural


def fitting(structure: Structure, columns: int) -> int:
    """At most so many columns, of which the last group of N:M is long enough."""
    short = isinstance(structure, NM) and 0 < columns % structure.m < structure.n
    return columns - columns % structure.m if short else columns  # type: ignore[attr-defined]  # N:M


def kept(scores: torch.Tensor, structure: Structure, order: torch.Tensor, side: Side) -> float:
    """What a layer in this order keeps, from the definition."""
    ordered = scores[:, order] if side == "input" else scores[order]
    topology = structure.choose(ordered, sparsity_of(structure))
    return float(structure.pack(ordered, topology).sum())


@given(st.sampled_from(STRUCTURES), st.sampled_from(SIDES), st.integers(4, 24), st.integers(6, 24), SEEDS)
def test_a_search_gives_a_permutation_that_keeps_what_it_says_and_no_less_than_before(
    structure: Structure, side: Side, rows: int, columns: int, seed: int
) -> None:
    columns = fitting(structure, columns)
    scores = integers(rows, columns, seed)
    found = search_order(scores, structure, sparsity_of(structure), side, generator=seeded(seed), rounds=12)
    size = columns if side == "input" else rows
    permutation.check(found.order, size, "order")
    assert found.before == kept(scores, structure, torch.arange(size), side)
    assert found.after == kept(scores, structure, found.order, side)
    assert found.after >= found.before


@given(st.sampled_from((NM(1, 4), NM(2, 5), NM(1, 4, 3), NM(3, 3))), st.integers(4, 16), st.integers(10, 30), SEEDS)
def test_a_round_of_nm_never_loses(structure: NM, rows: int, columns: int, seed: int) -> None:
    """The benefits are exact, and staying is one of the assignments, so no round loses."""
    columns = fitting(structure, columns)
    scores = integers(rows, columns, seed)
    state = _Search(scores, structure, sparsity_of(structure), "input")
    order = torch.arange(columns)
    for turn in range(4):
        changed = state.replaced(order, seeded(seed + turn))
        assert state.kept(changed) >= state.kept(order)
        order = changed


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("structure", [Block(8), Block((8, 4)), Diagonal()], ids=lambda s: s.to_string())
def test_a_hidden_order_is_found(structure: Structure, side: Side) -> None:
    """A structured weight whose features were shuffled: a search should find most of it again, where chance finds little."""
    shape = Shape(64, 64)
    topology = structure.choose(torch.rand(64, 64, generator=seeded(1)), 0.8)
    values = structure.pack(torch.rand(64, 64, generator=seeded(2)) + 1, topology)
    weight = structure.unpack(values, topology, shape)
    shuffled = weight.index_select(1 if side == "input" else 0, torch.randperm(64, generator=seeded(3)))
    found = search_order(shuffled, structure, 0.8, side, generator=seeded(4))
    total = float(weight.sum())
    assert found.after - found.before > 0.5 * (total - found.before)


@pytest.mark.parametrize(
    ("structure", "side"), [(Unstructured(), "input"), (Unstructured(), "output"), (NM(2, 4), "output")], ids=str
)
def test_where_no_order_is_better_features_stay(structure: Structure, side: Side) -> None:
    found = search_order(integers(16, 16, 0), structure, sparsity_of(structure), side, generator=seeded())
    assert torch.equal(found.order, torch.arange(16))
    assert found.before == found.after


def test_scores_that_are_not_finite_are_refused() -> None:
    scores = integers(16, 16, 0)
    scores[3, 4] = torch.nan
    with pytest.raises(PermutationScoresError, match="NaN"):
        search_order(scores, Block(4), 0.5, "input", generator=seeded())
