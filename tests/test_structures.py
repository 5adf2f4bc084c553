"""Structures: which weights they keep, how they store them, and what they refuse."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from padst_compile import NM, Block, Diagonal, Unstructured
from padst_compile.errors import EmptyLayerError, SpecError, StructureMismatchError, UnknownFieldError
from padst_compile.structures import Shape, Structure, Topology, parse, structure_from_dict
from padst_compile.testing.strategies import PackedWeight, packed_weights, structures

ONE_OF_EACH = (Block(4), Block((3, 5)), NM(2, 4), NM(1, 3, vector=2), Diagonal(), Diagonal(3), Unstructured())
each_structure = pytest.mark.parametrize("structure", ONE_OF_EACH, ids=str)


def mask_of(structure: Structure, topology: Topology, shape: Shape) -> torch.Tensor:
    """The active positions, bool `[out, in]`."""
    ones = torch.ones(shape.out_features, shape.in_features, dtype=torch.float64)
    return structure.unpack(structure.pack(ones, topology), topology, shape) != 0


# ---- packing


@given(packed_weights())
def test_unpacking_gives_back_the_kept_weights_and_zeros_elsewhere(case: PackedWeight) -> None:
    mask = mask_of(case.structure, case.topology, case.shape)
    unpacked = case.structure.unpack(case.values, case.topology, case.shape)
    assert torch.equal(unpacked, case.weight * mask)


@given(packed_weights())
def test_packing_again_gives_back_the_same_values(case: PackedWeight) -> None:
    unpacked = case.structure.unpack(case.values, case.topology, case.shape)
    assert torch.equal(case.structure.pack(unpacked, case.topology), case.values)


@given(packed_weights())
def test_packing_and_unpacking_are_adjoint(case: PackedWeight) -> None:
    values = torch.randint_like(case.values, -5, 6)
    unpacked = case.structure.unpack(values, case.topology, case.shape)
    assert (case.values * values).sum() == (case.weight * unpacked).sum()  # <pack(W), v> = <W, unpack(v)>, exact in integers


@given(packed_weights())
def test_the_gradient_of_unpacking_is_packing_and_the_other_way_round(case: PackedWeight) -> None:
    values = case.values.clone().requires_grad_()
    case.structure.unpack(values, case.topology, case.shape).backward(case.weight)
    assert values.grad is not None
    assert torch.equal(values.grad, case.values)
    weight = case.weight.clone().requires_grad_()
    case.structure.pack(weight, case.topology).backward(case.values)
    assert weight.grad is not None
    assert torch.equal(weight.grad, case.structure.unpack(case.values, case.topology, case.shape))


@given(packed_weights())
def test_values_are_contiguous_even_from_a_transposed_weight(case: PackedWeight) -> None:
    transposed = case.weight.T.contiguous().T
    values = case.structure.pack(transposed, case.topology)
    assert values.is_contiguous()
    assert torch.equal(values, case.values)
    assert case.structure.unpack(values, case.topology, case.shape).is_contiguous()


@each_structure
@pytest.mark.parametrize("special", [float("nan"), float("inf")])
def test_a_weight_that_is_not_kept_leaves_no_trace(structure: Structure, special: float) -> None:
    shape = Shape(12, 12)
    topology = structure.choose(torch.rand(12, 12), 0.5)
    mask = mask_of(structure, topology, shape)
    weight = torch.where(mask, 1.0, special)
    assert torch.equal(structure.unpack(structure.pack(weight, topology), topology, shape), mask.float())


# ---- how many weights are kept


@given(packed_weights())
def test_a_chosen_topology_is_valid(case: PackedWeight) -> None:
    assert case.structure.check_topology(case.topology, case.shape) is None
    assert len(case.topology) == len(case.structure.index_names)


def units(structure: Structure, shape: Shape) -> int:
    """How many units a free structure chooses from."""
    if isinstance(structure, Block):
        return -(-shape.out_features // structure.rows) * -(-shape.in_features // structure.columns)
    if isinstance(structure, Diagonal):
        short, long = sorted((shape.out_features, shape.in_features))
        return long if structure.group == 1 else short // structure.group
    return shape.numel


def kept_units(structure: Structure, mask: torch.Tensor) -> int:
    """How many units have an active weight, counted in the mask itself."""
    rows, columns = mask.nonzero(as_tuple=True)
    if isinstance(structure, Block):
        return len({(int(r) // structure.rows, int(c) // structure.columns) for r, c in zip(rows, columns, strict=True)})
    if isinstance(structure, Diagonal):
        short, long = sorted(mask.shape)
        offsets = (columns - rows if mask.shape[1] >= mask.shape[0] else rows - columns) % long
        return len((offsets if structure.group == 1 else offsets % (short // structure.group)).unique())
    return len(rows)


@given(packed_weights().filter(lambda case: not isinstance(case.structure, NM)))
def test_the_number_of_active_units_follows_from_the_sparsity(case: PackedWeight) -> None:
    mask = mask_of(case.structure, case.topology, case.shape)
    expected = round((1 - case.sparsity) * units(case.structure, case.shape))
    assert kept_units(case.structure, mask) == expected
    if isinstance(case.structure, Diagonal):  # every diagonal of a kept class is whole
        total = units(case.structure, case.shape)
        assert int(mask.sum()) * total == expected * case.shape.numel
    if isinstance(case.structure, Unstructured):
        assert int(mask.sum()) == expected


@given(packed_weights().filter(lambda case: isinstance(case.structure, NM)))
def test_nm_keeps_n_of_every_m_inputs_in_every_row_and_shares_the_choice_in_a_vector(case: PackedWeight) -> None:
    structure = case.structure
    assert isinstance(structure, NM)
    mask = mask_of(structure, case.topology, case.shape)
    for group in mask.split(structure.m, dim=1):
        assert bool((group.sum(1) == structure.n).all())
    for rows in mask.split(structure.vector, dim=0):
        assert bool((rows == rows[0]).all())


# ---- which weights are kept


def every_mask(structure: Structure, shape: Shape, count: int) -> Iterator[torch.Tensor]:
    """All masks of a structure with `count` active units, written without its code."""
    rows, columns = torch.arange(shape.out_features)[:, None], torch.arange(shape.in_features)[None, :]
    if isinstance(structure, NM):
        groups = columns // structure.m
        options = []
        for v, g in itertools.product(range(-(-shape.out_features // structure.vector)), range(int(groups.max()) + 1)):
            members = (groups == g).flatten().nonzero().flatten().tolist()
            here = rows // structure.vector == v
            options.append([here & torch.isin(columns, torch.tensor(c)) for c in itertools.combinations(members, structure.n)])
        for parts in itertools.product(*options):
            yield torch.stack(parts).any(0)
        return
    if isinstance(structure, Block):
        unit = rows // structure.rows * -(-shape.in_features // structure.columns) + columns // structure.columns
    elif isinstance(structure, Diagonal):
        short, long = sorted((shape.out_features, shape.in_features))
        offset = (columns - rows if shape.in_features >= shape.out_features else rows - columns) % long
        unit = offset if structure.group == 1 else offset % (short // structure.group)
    else:
        unit = rows * shape.in_features + columns
    for kept in itertools.combinations(range(int(unit.max()) + 1), count):
        yield torch.isin(unit, torch.tensor(kept))


SMALL = [
    (Block(2), Shape(4, 6), 0.5),
    (Block(2), Shape(3, 5), 0.5),
    (Block((1, 3)), Shape(3, 5), 0.7),
    (NM(1, 2), Shape(2, 5), 0.5),
    (NM(2, 4), Shape(2, 6), 0.5),
    (NM(1, 3, vector=2), Shape(3, 7), 2 / 3),
    (Diagonal(), Shape(3, 5), 0.5),
    (Diagonal(), Shape(5, 3), 0.5),
    (Diagonal(2), Shape(4, 8), 0.5),
    (Diagonal(2), Shape(8, 4), 0.5),
    (Unstructured(), Shape(2, 5), 0.6),
]


@pytest.mark.parametrize(("structure", "shape", "sparsity"), SMALL, ids=str)
@given(seed=st.integers(0, 2**31))
def test_the_choice_keeps_the_largest_total_of_all_masks(
    structure: Structure, shape: Shape, sparsity: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 20, (shape.out_features, shape.in_features), generator=generator).double()
    chosen = mask_of(structure, structure.choose(scores, sparsity), shape)
    count = 0 if isinstance(structure, NM) else round((1 - sparsity) * units(structure, shape))
    masks = list(every_mask(structure, shape, count))
    assert any(torch.equal(chosen, mask) for mask in masks)
    assert (scores * chosen).sum() == max((scores * mask).sum() for mask in masks)


@each_structure
def test_among_equals_the_first_are_chosen(structure: Structure) -> None:
    shape = Shape(12, 12)
    first = next(every_mask(structure, shape, round(0.5 * units(structure, shape))))
    assert torch.equal(mask_of(structure, structure.choose(torch.zeros(12, 12), 0.5), shape), first)


# ---- what does not fit


@pytest.mark.parametrize(
    ("structure", "shape", "sparsity", "unit"),
    [
        (Block(8), Shape(16, 24), 0.95, "none of its 6 8x8 blocks"),
        (Diagonal(), Shape(9, 9), 0.97, "none of its 9 diagonals"),
        (Diagonal(2), Shape(16, 16), 0.95, "none of its 8 class"),
        (Unstructured(), Shape(3, 3), 0.99, "none of its 9 weights"),
        (Unstructured(), Shape(100, 300), 0.99999, "none of its 30000 weights"),
        (Unstructured(), Shape(1000, 1000), 0.9999999, "none of its 1000000 weights"),
        (Block(8), Shape(8, 8), 0.9, "none of its 1 8x8 block "),
    ],
    ids=str,
)
def test_an_empty_layer_is_refused_with_a_sparsity_that_works(
    structure: Structure, shape: Shape, sparsity: float, unit: str
) -> None:
    with pytest.raises(EmptyLayerError, match=rf"layer 'fc': sparsity .* leaves {unit}") as error:
        structure.check(shape, sparsity, "fc")
    suggested = float(str(error.value).split("at most ")[1].split(",")[0])
    assert 0 <= suggested < sparsity
    structure.check(shape, suggested, "fc")
    assert error.value.module == "fc"


@pytest.mark.parametrize(
    ("structure", "inputs", "suggested"),
    [
        (NM(2, 4), 9, 3),
        (NM(2, 4), 5, 5),
        (NM(1, 10), 8, 8),
        (NM(3, 4), 9, 9),
        (NM(4, 16), 50, 10),
        (NM(2, 12), 25, 5),
    ],
    ids=str,
)
def test_nm_that_does_not_divide_is_refused_with_the_nearest_m_that_does(structure: NM, inputs: int, suggested: int) -> None:
    message = (
        rf"layer 'fc': its {inputs} inputs .* nearest m that divides is {suggested}, as in NM\({structure.n}, {suggested}\)"
    )
    with pytest.raises(StructureMismatchError, match=message):
        structure.check(Shape(8, inputs), structure.natural_sparsity(), "fc")
    other = NM(structure.n, suggested)
    other.check(Shape(8, inputs), other.natural_sparsity(), "fc")


@pytest.mark.parametrize(("structure", "inputs"), [(NM(8, 16), 4), (NM(254, 256), 509), (NM(2, 4), 1)], ids=str)
def test_nm_that_no_m_can_fit_is_refused_without_a_false_suggestion(structure: NM, inputs: int) -> None:
    with pytest.raises(StructureMismatchError, match="no m divides them; choose a smaller n"):
        structure.check(Shape(8, inputs), structure.natural_sparsity(), "fc")


def test_nm_accepts_a_shorter_last_group_that_can_hold_n() -> None:
    NM(2, 4).check(Shape(3, 10), 0.5, "fc")


@pytest.mark.parametrize(
    ("group", "shape", "suggested"),
    [
        (5, Shape(16, 16), 4),
        (16, Shape(768, 768 + 1), 1),
        (3, Shape(8, 12), 2),
        (3, Shape(7, 7), 1),
        (20, Shape(12, 12), 6),
    ],
    ids=str,
)
def test_a_diagonal_group_without_a_stride_is_refused_with_the_nearest_that_has_one(
    group: int, shape: Shape, suggested: int
) -> None:
    with pytest.raises(StructureMismatchError, match=f"layer 'fc': .* the nearest group that does is {suggested}$"):
        Diagonal(group).check(shape, 0.5, "fc")
    Diagonal(suggested).check(shape, 0.5, "fc")


# ---- index tensors from elsewhere


def t(*entries: Any, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """A small index tensor."""
    return torch.tensor(entries, dtype=dtype)


@pytest.mark.parametrize(
    ("structure", "shape", "topology", "message"),
    [
        (Block(2), Shape(4, 6), (t(0, 1), t(0)), "row_pointers must run from 0"),
        (Block(2), Shape(4, 6), (t(1, 1, 1), t(0)), "row_pointers must run from 0"),
        (Block(2), Shape(4, 6), (t(0, 1, 1), t(0, 1)), "row_pointers must run from 0 to the 2 blocks"),
        (Block(2), Shape(6, 6), (t(0, 2, 1, 2), t(0, 1)), "row_pointers must not decrease"),
        (Block(2), Shape(4, 6), (t(0, 1, 2), t(0, 3)), r"columns must lie in \[0, 3\)"),
        (Block(2), Shape(4, 6), (t(0, 1, 2), t(0, -1)), r"columns must lie in \[0, 3\)"),
        (Block(2), Shape(4, 6), (t(0, 2, 2), t(1, 1)), "must ascend, each at most once"),
        (Block(2), Shape(4, 6), (t(0, 2, 2), t(1, 0)), "must ascend, each at most once"),
        (Block(2), Shape(4, 6), (t(0, 1, 2), t(0, 1, dtype=torch.float32)), "columns must hold integers"),
        (Block(2), Shape(4, 6), (t(0, 1, 2), t([0], [1])), "columns must have one dimension"),
        (NM(1, 2), Shape(2, 4), (t([0, 1]),), r"offsets must be \[2, 2\], got \[1, 2\]"),
        (NM(1, 2), Shape(2, 4), (t([0, 1], [0, 2]),), "offsets must stay inside their group of 2"),
        (NM(1, 2), Shape(2, 4), (t([0, 1], [0, -1]),), "offsets must stay inside their group of 2"),
        (NM(1, 2), Shape(1, 3), (t([0, 1]),), "offsets must stay inside their group"),
        (NM(2, 3), Shape(1, 3), (t([1, 1]),), "the offsets of a group must ascend"),
        (NM(2, 3), Shape(1, 3), (t([2, 0]),), "the offsets of a group must ascend"),
        (NM(1, 2), Shape(1, 2), (t([0.0], dtype=torch.float32),), "offsets must hold integers"),
        (Diagonal(), Shape(3, 5), (t(0, 5),), r"offsets must lie in \[0, 5\)"),
        (Diagonal(), Shape(5, 3), (t(-1, 2),), r"offsets must lie in \[0, 5\)"),
        (Diagonal(), Shape(3, 5), (t(1, 1),), "the offsets must ascend"),
        (Diagonal(), Shape(3, 5), (t(2, 1),), "the offsets must ascend"),
        (Diagonal(), Shape(3, 5), (t([0, 1]),), "offsets must have one dimension"),
        (Diagonal(), Shape(3, 5), (t(True, dtype=torch.bool),), "offsets must hold integers"),
        (Diagonal(2), Shape(4, 8), (t(0, 2, 4),), "whole residue classes mod 2"),
        (Unstructured(), Shape(2, 3), (torch.ones(3, 2, dtype=torch.bool),), r"mask must be \[2, 3\], got \[3, 2\]"),
        (Unstructured(), Shape(2, 3), (torch.ones(2, 3),), "mask must be torch.bool, not torch.float32"),
    ],
    ids=str,
)
def test_corrupted_index_tensors_are_named(structure: Structure, shape: Shape, topology: Topology, message: str) -> None:
    wrong = structure.check_topology(topology, shape)
    assert wrong is not None
    assert re.search(message, wrong)


# ---- names


@given(structures())
def test_short_forms_and_dictionaries_read_back(structure: Structure) -> None:
    assert parse(structure.to_string()) == structure
    assert structure_from_dict(json.loads(json.dumps(structure.to_dict()))) == structure


@pytest.mark.parametrize(
    "text", ["", "block", "block:", "block:1x2x3", "block:x", "nm:2", "nm:2:4:1:1", "diagonal:1:2", "unstructured:1", "nm:a:b"]
)
def test_an_unreadable_short_form_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match="cannot read structure|unknown structure"):
        parse(text)


@pytest.mark.parametrize("text", ["block:0", "block:-4", "nm:0:4", "nm:1:0", "nm:1:4:0", "diagonal:0"])
def test_a_size_that_is_not_positive_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match="must be a positive integer"):
        parse(text)


def test_the_closest_kind_is_suggested() -> None:
    with pytest.raises(UnknownFieldError, match="unknown structure 'diagnal'; did you mean 'diagonal'"):
        parse("diagnal:4")


@pytest.mark.parametrize(("n", "m", "message"), [(5, 4, "n <= m; got 5:4"), (1, 257, "at most 256 inputs, got m=257")])
def test_nm_refuses_groups_it_cannot_store(n: int, m: int, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        NM(n, m)


@pytest.mark.parametrize("size", [2.5, None, "64", (1, 2, 3), (4,), (4, 2.0), True, 0, (0, 4)], ids=repr)
def test_block_refuses_what_is_no_size(size: Any) -> None:
    with pytest.raises(SpecError, match="Block takes a size|must be a positive integer"):
        Block(size)


# ---- the claim about diagonals


@pytest.mark.parametrize(("group", "shape"), [(4, Shape(12, 12)), (3, Shape(12, 24)), (2, Shape(18, 6)), (16, Shape(64, 128))])
def test_classes_of_diagonals_are_dense_blocks_under_a_stride_permutation(group: int, shape: Shape) -> None:
    structure = Diagonal(group)
    topology = structure.choose(torch.rand(shape.out_features, shape.in_features), 0.5)
    mask = mask_of(structure, topology, shape)
    stride = min(shape.out_features, shape.in_features) // group

    def by_residue(size: int) -> torch.Tensor:
        return torch.arange(size).reshape(-1, stride).T.flatten()

    folded = mask[by_residue(shape.out_features)][:, by_residue(shape.in_features)]
    blocks = folded.reshape(stride, shape.out_features // stride, stride, shape.in_features // stride).double().mean((1, 3))
    assert set(blocks.flatten().tolist()) == {0.0, 1.0}  # each block is all there or not at all
    assert min(shape.out_features // stride, shape.in_features // stride) == group
    kept = round(0.5 * stride)
    assert blocks.sum(0).tolist() == [kept] * stride
    assert blocks.sum(1).tolist() == [kept] * stride


# ---- the grid of units


@given(packed_weights())
def test_units_and_topology_say_the_same(case: PackedWeight) -> None:
    active = case.structure.active_units(case.topology, case.shape)
    rebuilt = case.structure.topology_of(active, case.shape)
    assert all(torch.equal(new, old) and new.dtype == old.dtype for new, old in zip(rebuilt, case.topology, strict=True))
    assert bool((active.sum(1) == case.structure.units_per_pool(case.shape, case.sparsity)).all())


@given(packed_weights())
def test_the_total_of_a_unit_is_the_sum_of_its_scores(case: PackedWeight) -> None:
    size = case.shape.out_features, case.shape.in_features
    scores = torch.randint(1, 9, size, generator=torch.Generator().manual_seed(case.shape.numel)).double()
    totals = case.structure.unit_totals(scores)
    active = case.structure.active_units(case.topology, case.shape)
    assert totals[active].sum() == scores[mask_of(case.structure, case.topology, case.shape)].sum()
    assert totals[totals > -torch.inf].sum() == scores.sum()
    rows = torch.randperm(size[0])[: 1 + size[0] // 3]
    known = torch.zeros(size, dtype=torch.float64)
    known[rows] = scores[rows]
    part = case.structure.unit_totals_of_rows(scores[rows], rows, size[0])
    assert torch.equal(case.structure.grid_of_rows(part, rows, case.shape), case.structure.unit_totals(known))
