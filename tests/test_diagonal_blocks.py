"""Diagonals in whole residue classes, as the blocks that they are."""

from __future__ import annotations

import itertools

import pytest
import torch

from padst_compile import permutation
from padst_compile.kernels.block.reference import block_linear
from padst_compile.kernels.diagonal.blocks import BlockForm, block_form, diagonal_values, folds
from padst_compile.kernels.diagonal.reference import diagonal_linear
from padst_compile.structures import Diagonal, Shape, Topology

# Square, wide and tall; strides of 1, of a side, and in between; sides that are no powers of two.
CASES = [
    (Diagonal(group), Shape(*size))
    for group, size in [
        (2, (4, 4)), (2, (2, 6)), (2, (6, 2)), (3, (12, 12)), (3, (6, 10)), (3, (10, 6)), (4, (12, 30)), (4, (30, 12)),
        (5, (35, 35)), (6, (12, 24)), (7, (21, 33)), (7, (33, 21)), (8, (8, 40)), (8, (40, 8)), (16, (48, 96)), (16, (96, 48)),
        (16, (64, 64)), (2, (10, 10)),
    ]
]  # fmt: skip
each_case = pytest.mark.parametrize(("structure", "shape"), CASES, ids=str)


def random_layer(structure: Diagonal, shape: Shape, density: float) -> tuple[torch.Tensor, Topology]:
    """Whole numbers, so that every sum in float64 is exact."""
    generator = torch.Generator().manual_seed(shape.numel)
    scores = torch.rand(shape.out_features, shape.in_features, generator=generator)
    kept = max(1, round(density * structure.classes(shape))) / structure.classes(shape)
    topology = structure.choose(scores, 1 - kept)
    weight = torch.randint(-9, 10, scores.shape, generator=generator).double()
    return structure.pack(weight, topology), topology


def product(form: BlockForm, x: torch.Tensor, out_features: int) -> torch.Tensor:
    y = block_linear(form.structure, permutation_of(x, form.input_permutation), form.values, form.topology, out_features)
    return permutation_of(y, form.output_permutation)


def permutation_of(x: torch.Tensor, table: torch.Tensor | None) -> torch.Tensor:
    return x if table is None else x[..., table.long()]


@each_case
@pytest.mark.parametrize("density", [0.01, 0.3, 1.0])
@pytest.mark.parametrize(("permute_in", "permute_out"), list(itertools.product((False, True), repeat=2)))
def test_the_block_form_equals_the_diagonals(
    structure: Diagonal, shape: Shape, density: float, permute_in: bool, permute_out: bool
) -> None:
    structure.check(shape, 0.0, "layer")
    values, topology = random_layer(structure, shape, density)
    assert structure.check_topology(topology, shape) is None
    generator = torch.Generator().manual_seed(1)
    into = permutation.random(shape.in_features, generator) if permute_in else None
    out = permutation.random(shape.out_features, generator) if permute_out else None
    x = torch.randint(-9, 10, (3, shape.in_features), generator=generator).double()

    form = block_form(structure, values, topology, shape, into, out)
    expected = diagonal_linear(structure, permutation_of(x, into), values, topology, shape.out_features)
    assert torch.equal(product(form, x, shape.out_features), permutation_of(expected, out))


@each_case
def test_the_block_form_is_a_valid_layer_with_no_padding(structure: Diagonal, shape: Shape) -> None:
    values, topology = random_layer(structure, shape, 0.3)
    form = block_form(structure, values, topology, shape)
    assert form.structure.check_topology(form.topology, shape) is None
    assert form.structure.grid(shape) == (structure.classes(shape),) * 2
    assert form.values.numel() == values.numel()
    assert form.values.is_contiguous()
    assert torch.equal(form.topology[0].diff(), form.topology[0].diff()[:1].expand(structure.classes(shape)))
    for table, size in ((form.input_permutation, shape.in_features), (form.output_permutation, shape.out_features)):
        assert torch.equal(permutation.check(table, size, "layer"), table)


@each_case
def test_values_come_back(structure: Diagonal, shape: Shape) -> None:
    values, topology = random_layer(structure, shape, 0.3)
    form = block_form(structure, values, topology, shape)
    assert torch.equal(diagonal_values(structure, form.values, topology, shape), values)


def test_fc1_and_fc2_meet_in_the_same_order() -> None:
    """What one layer's stride permutation does to the hidden features, the next one's undoes: the two cancel."""
    up, down, structure = Shape(96, 24), Shape(24, 96), Diagonal(4)
    first = block_form(structure, *random_layer(structure, up, 0.5), up)
    second = block_form(structure, *random_layer(structure, down, 0.5), down)
    assert permutation.is_identity(permutation.compose(first.output_permutation, second.input_permutation))


def test_index_maps_follow_from_the_definition() -> None:
    """Every value lies in the block of its residues, at the place of its steps."""
    for structure, shape in CASES:
        values, topology = random_layer(structure, shape, 0.3)
        stride = structure.classes(shape)
        numbered = torch.arange(values.numel(), dtype=torch.float64).reshape(values.shape) + 1
        form = block_form(structure, numbered, topology, shape)
        blocks = form.structure.unpack(form.values, form.topology, shape)
        i, j = (position.flatten() for position in structure.positions(topology, shape))
        rows, columns = form.structure.rows, form.structure.columns
        found = blocks[i % stride * rows + i // stride, j % stride * columns + j // stride]
        assert torch.equal(found, numbered.flatten())


@pytest.mark.parametrize(("group", "smallest", "answer"), [(1, 1, False), (2, 1, True), (8, 16, False), (16, 16, True)])
def test_only_whole_classes_fold(group: int, smallest: int, answer: bool) -> None:
    assert folds(Diagonal(group), smallest) is answer
