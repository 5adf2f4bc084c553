"""Diagonals in whole residue classes, as the blocks that they are."""

from __future__ import annotations

import pytest
import torch

from padst_compile import permutation
from padst_compile.kernels import dispatch, native
from padst_compile.kernels.block.reference import block_linear
from padst_compile.kernels.diagonal.blocks import block_size, block_tables, diagonal_blocks
from padst_compile.kernels.diagonal.reference import diagonal_linear
from padst_compile.kernels.structured_linear import structured_linear
from padst_compile.structures import Block, Diagonal, Shape, Structure, Topology

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


def permutation_of(x: torch.Tensor, table: torch.Tensor | None) -> torch.Tensor:
    return x if table is None else x[..., table.long()]


@each_case
@pytest.mark.parametrize("density", [0.01, 0.3, 1.0])
def test_the_block_form_equals_the_diagonals(structure: Diagonal, shape: Shape, density: float) -> None:
    structure.check(shape, 0.0, "layer")
    values, topology = random_layer(structure, shape, density)
    assert structure.check_topology(topology, shape) is None
    x = torch.randint(-9, 10, (3, shape.in_features), generator=torch.Generator().manual_seed(1)).double()

    tables = block_tables(structure, topology, shape)
    inputs = x[:, tables.input_permutation.long()]
    y = block_linear(tables.structure, inputs, tables.blocks(values), tables.topology, shape.out_features)
    expected = diagonal_linear(structure, x, values, topology, shape.out_features)
    assert torch.equal(y[:, tables.output_permutation.long()], expected)


@each_case
def test_the_block_form_is_a_valid_layer_with_no_padding(structure: Diagonal, shape: Shape) -> None:
    values, topology = random_layer(structure, shape, 0.3)
    tables = block_tables(structure, topology, shape)
    assert tables.structure == block_size(structure, shape)
    assert tables.structure.check_topology(tables.topology, shape) is None
    assert tables.structure.grid(shape) == (structure.classes(shape),) * 2
    blocks = tables.blocks(values)
    assert blocks.numel() == values.numel()
    assert blocks.is_contiguous()
    assert torch.equal(tables.topology[0].diff(), tables.topology[0].diff()[:1].expand(structure.classes(shape)))
    for table, size in ((tables.input_permutation, shape.in_features), (tables.output_permutation, shape.out_features)):
        assert table.dtype == torch.int32
        assert torch.equal(permutation.check(table, size, "layer"), table)


@each_case
def test_values_come_back(structure: Diagonal, shape: Shape) -> None:
    values, topology = random_layer(structure, shape, 0.3)
    tables = block_tables(structure, topology, shape)
    assert torch.equal(tables.diagonals(tables.blocks(values)), values.flatten())


def test_fc1_and_fc2_meet_in_the_same_order() -> None:
    """What one layer's stride permutation does to the hidden features, the next one's undoes: the two cancel."""
    up, down, structure = Shape(96, 24), Shape(24, 96), Diagonal(4)
    first = block_tables(structure, random_layer(structure, up, 0.5)[1], up)
    second = block_tables(structure, random_layer(structure, down, 0.5)[1], down)
    assert permutation.is_identity(permutation.compose(first.output_permutation, second.input_permutation))


@each_case
def test_index_maps_follow_from_the_definition(structure: Diagonal, shape: Shape) -> None:
    """Every value lies in the block of its residues, at the place of its steps."""
    values, topology = random_layer(structure, shape, 0.3)
    stride = structure.classes(shape)
    numbered = torch.arange(values.numel(), dtype=torch.float64).reshape(values.shape) + 1
    tables = block_tables(structure, topology, shape)
    blocks = tables.structure.unpack(tables.blocks(numbered), tables.topology, shape)
    i, j = (position.flatten() for position in structure.positions(topology, shape))
    rows, columns = tables.structure.rows, tables.structure.columns
    found = blocks[i % stride * rows + i // stride, j % stride * columns + j // stride]
    assert torch.equal(found, numbered.flatten())


@each_case
def test_the_operator_for_graphs(structure: Diagonal, shape: Shape) -> None:
    offsets = random_layer(structure, shape, 0.3)[1][0]
    arguments = (offsets, shape.out_features, shape.in_features, structure.to_string())
    tables = block_tables(structure, (offsets,), shape)
    expected = [*tables.topology, tables.entries, tables.input_permutation, tables.output_permutation]
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(diagonal_blocks(*arguments), expected, strict=True))
    torch.library.opcheck(torch.ops.padst.diagonal_blocks.default, arguments, test_utils=("test_schema", "test_faketensor"))


# ---- where products are dispatched


needs_native = pytest.mark.skipif(not native.load(), reason=f"no native kernels: {native.unavailable_reason()}")
# The second group is large enough for ATen's gradient of the values, too.
LAYERS = [
    (Diagonal(16), Shape(64, 64)),
    (Diagonal(16), Shape(32, 96)),
    (Diagonal(16), Shape(96, 32)),
    (Diagonal(64), Shape(128, 192)),
]


@needs_native
@pytest.mark.parametrize(("structure", "shape"), LAYERS, ids=str)
@pytest.mark.parametrize(("into", "out"), [(False, False), (True, True)])
def test_products_with_many_tokens_and_their_gradients_run_on_blocks(
    structure: Diagonal, shape: Shape, into: bool, out: bool
) -> None:
    """Exact in float32: whole numbers, and sums of few of them."""
    assert dispatch.folds_into_blocks(structure, shape, torch.device("cpu"), torch.float32)
    values, topology = random_layer(structure, shape, 0.5)
    generator = torch.Generator().manual_seed(2)
    tables = [
        permutation.random(shape.in_features, generator) if into else None,
        permutation.random(shape.out_features, generator) if out else None,
    ]
    results = []
    for tokens, dtype in ((600, torch.float32), (600, torch.float64)):
        generator = torch.Generator().manual_seed(3)
        x = torch.randint(-9, 10, (tokens, shape.in_features), generator=generator).to(dtype).requires_grad_()
        direction = torch.randint(-9, 10, (tokens, shape.out_features), generator=generator).to(dtype)
        weights, bias = values.to(dtype).requires_grad_(), torch.arange(shape.out_features, dtype=dtype)
        y = structured_linear(x, weights, list(topology), bias, *tables, shape.out_features, structure.to_string())
        results.append([y, *torch.autograd.grad(y, (x, weights), direction)])
    for found, exact in zip(*results, strict=True):
        assert found.dtype == torch.float32
        assert found.is_contiguous()
        assert torch.equal(found.double(), exact)


@needs_native
@pytest.mark.parametrize(
    ("structure", "shape", "dtype", "answer"),
    [
        (Diagonal(16), Shape(64, 64), torch.float32, True),
        (Diagonal(8), Shape(64, 64), torch.float32, False),
        (Diagonal(), Shape(64, 64), torch.float32, False),
        (Diagonal(16), Shape(64, 64), torch.float64, False),
        (Block(16), Shape(64, 64), torch.float32, False),
    ],
    ids=str,
)
def test_which_layers_fold(structure: Structure, shape: Shape, dtype: torch.dtype, answer: bool) -> None:
    assert dispatch.folds_into_blocks(structure, shape, torch.device("cpu"), dtype) is answer
