"""Gradients on the CPU by the C++ kernels: of the values and inputs of each structure."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from padst_compile.kernels import dispatch, native
from padst_compile.kernels.diagonal.transpose import transpose
from padst_compile.structures import NM, Block, Diagonal, Shape, Structure, Topology

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
AROUND = ((True, False), (False, True), (True, True))  # which of the permutations there are
SHAPES = (Shape(64, 96), Shape(33, 131), Shape(131, 33), Shape(7, 300))

needs_blocks = pytest.mark.skipif(
    not (native.load() and native.supports("block", torch.float32)), reason="no micro-kernel for block layers"
)


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def table(features: int) -> torch.Tensor:
    return torch.randperm(features).int()


def size(shape: Shape) -> tuple[int, int]:
    return shape.out_features, shape.in_features


def block_gradient(
    structure: Block, grad: torch.Tensor, x: torch.Tensor, topology: Topology, *around: torch.Tensor | None
) -> torch.Tensor:
    sides = structure.rows, structure.columns
    result: torch.Tensor = torch.ops.padst_native.block_value_gradient(grad, x, *topology, *sides, *around)
    return result


def value_gradient(
    structure: Structure, grad: torch.Tensor, x: torch.Tensor, topology: Topology, *around: torch.Tensor | None
) -> torch.Tensor:
    ops = torch.ops.padst_native
    if isinstance(structure, Block):
        return block_gradient(structure, grad, x, topology, *around)
    if isinstance(structure, NM):
        pattern = structure.n, structure.m, structure.vector
        return ops.nm_value_gradient(grad, x, *topology, *pattern, *around)  # type: ignore[no-any-return]
    return ops.diagonal_value_gradient(grad, x, *topology, *around)  # type: ignore[no-any-return]


def check(
    structure: Structure, shape: Shape, dtype: torch.dtype, tokens: int, *, into: bool = False, out: bool = False
) -> None:
    """Within the error bound of a float32 dot product over the tokens (Higham, section 3.1) and one rounding to the dtype."""
    topology = structure.choose(torch.rand(size(shape)), 0.5)
    grad, x = torch.randn(tokens, shape.out_features).to(dtype), torch.randn(tokens, shape.in_features).to(dtype)
    tables = table(shape.in_features) if into else None, table(shape.out_features) if out else None
    found = value_gradient(structure, grad, x, topology, *tables)
    x = x if tables[0] is None else x[:, tables[0].long()]
    grad = grad if tables[1] is None else grad[:, tables[1].long().argsort()]
    exact = structure.pack(grad.double().T @ x.double(), topology)
    magnitude = structure.pack(grad.double().abs().T @ x.double().abs(), topology)
    unit = torch.finfo(torch.float32).eps / 2
    bound = (tokens + 2) * unit / (1 - (tokens + 2) * unit) * magnitude
    bound = bound + (exact.abs() + bound) * torch.finfo(dtype).eps / 2 + torch.finfo(dtype).smallest_normal
    assert found.dtype == dtype
    assert found.shape == exact.shape
    assert bool(((found.double() - exact).abs() <= bound).all())


@needs_blocks
@pytest.mark.usefixtures("poisoned_memory", "threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("structure", [Block(64), Block(16), Block((5, 7)), Block((32, 8))], ids=lambda s: s.to_string())
def test_the_gradient_of_block_values(structure: Block, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        if structure.grid(shape) == (1, 1):
            continue  # nothing to choose
        for tokens in (0, 1, 2, 15, 16, 33):
            check(structure, shape, dtype, tokens)


@needs_blocks
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [255, 256, 257, 600])
def test_more_tokens_than_a_tile_holds(dtype: torch.dtype, tokens: int) -> None:
    check(Block(16), Shape(48, 40), dtype, tokens)


@needs_blocks
@pytest.mark.usefixtures("poisoned_memory", "threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("structure", [Block(16), Block((5, 7))], ids=lambda s: s.to_string())
@pytest.mark.parametrize(("into", "out"), AROUND)
def test_the_gradient_of_block_values_between_permutations(structure: Block, dtype: torch.dtype, into: bool, out: bool) -> None:
    for shape in SHAPES:
        for tokens in (0, 1, 33, 257):
            check(structure, shape, dtype, tokens, into=into, out=out)


@needs_blocks
@pytest.mark.usefixtures("poisoned_memory", "threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("structure", [Block(64), Block(16), Block((5, 7)), Block((32, 8))], ids=lambda s: s.to_string())
def test_the_gradient_of_a_block_layers_inputs(structure: Block, dtype: torch.dtype) -> None:
    """Whole numbers, on which float32 is exact, and 16-bit floats are after one rounding."""
    for shape in SHAPES:
        topology = structure.choose(torch.rand(size(shape)), 0.0 if structure.grid(shape) == (1, 1) else 0.6)
        values = structure.pack(torch.randint(-3, 4, size(shape)).to(dtype), topology)
        dense = structure.unpack(values, topology, shape).float()
        into, out = table(shape.in_features), table(shape.out_features)
        for tokens in ((0,), (1,), (15,), (2, 33)):
            grad = torch.randint(-3, 4, (*tokens, shape.out_features)).to(dtype)
            for before, behind in ((None, None), (None, into), (out, None), (out, into)):
                found = torch.ops.padst_native.block_input_gradient(grad, values, *topology, shape.in_features, behind, before)
                inner = (grad if before is None else grad[..., before.long().argsort()]).float() @ dense
                expected = inner if behind is None else inner[..., behind.long().argsort()]
                assert torch.equal(found, expected.to(dtype))


@needs_blocks
def test_no_padding_reaches_the_gradient_of_inputs() -> None:
    """The part of a ragged block beyond the matrix may hold anything."""
    structure, shape = Block(16), Shape(20, 24)
    topology = structure.choose(torch.ones(size(shape)), 0.0)
    weight = torch.randint(-3, 4, size(shape)).float()
    values = structure.pack(weight, topology)
    values[~structure.pack(torch.ones(size(shape)), topology).bool()] = torch.nan
    grad = torch.randint(-3, 4, (5, 20)).float()
    assert torch.equal(torch.ops.padst_native.block_input_gradient(grad, values, *topology, 24), grad @ weight)


@needs_blocks
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad": torch.randn(5, 24).half()}, "but values are"),
        ({"grad": torch.randn(5, 99)}, "row_pointers has"),
        ({"in_features": 4}, "index outside"),
        ({"in_features": 0}, "must be positive"),
        ({"values": torch.randn(3, 4, 8, 2)}, "not interleaved"),
        ({"input_permutation": torch.zeros(16, dtype=torch.int32)}, "input_permutation.*occurs twice"),
        ({"output_permutation": torch.zeros(24, dtype=torch.int32)}, "output_permutation.*occurs twice"),
        ({"output_permutation": torch.arange(16).int()}, "output_permutation.*16 entries for 24"),
    ],
)
def test_wrong_operands_of_the_gradient_of_inputs_are_refused(change: dict[str, object], message: str) -> None:
    structure = Block(8)
    row_pointers, columns = structure.choose(torch.eye(24, 16), 0.5)
    operands: dict[str, object] = {
        "grad": torch.randn(5, 24), "values": torch.randn(3, 8, 8), "row_pointers": row_pointers, "columns": columns,
        "in_features": 16,
    }  # fmt: skip
    torch.ops.padst_native.block_input_gradient(**operands)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.padst_native.block_input_gradient(**operands | change)


@needs_blocks
def test_padding_gets_no_gradient() -> None:
    """The part of a ragged block beyond the matrix."""
    structure, shape = Block(16), Shape(20, 24)
    topology = structure.choose(torch.ones(size(shape)), 0.0)
    gradient = block_gradient(structure, torch.randn(5, 20), torch.randn(5, 24), topology)
    inside = structure.pack(torch.ones(size(shape)), topology).bool()
    assert bool(gradient[inside].all())
    assert not bool(gradient[~inside].any())


@needs_blocks
def test_block_rows_without_blocks() -> None:
    structure, shape = Block(8), Shape(32, 16)
    mask = torch.zeros(size(shape))
    mask[8:16, :8] = 1
    topology = structure.choose(mask, 7 / 8)
    grad, x = torch.arange(96.0).reshape(3, 32), torch.arange(48.0).reshape(3, 16)
    assert torch.equal(block_gradient(structure, grad, x, topology), structure.pack(grad.T @ x, topology))


@needs_blocks
def test_inputs_that_are_not_contiguous() -> None:
    structure = Block(8)
    topology = structure.choose(torch.rand(24, 16), 0.5)
    grad, x = torch.arange(120.0).reshape(24, 5).T, torch.arange(160.0).reshape(10, 16)[::2]
    assert torch.equal(block_gradient(structure, grad, x, topology), structure.pack(grad.T @ x, topology))


@needs_blocks
def test_opcheck() -> None:
    structure = Block(8)
    topology = structure.choose(torch.rand(24, 16), 0.5)
    arguments = (torch.randn(5, 24), torch.randn(5, 16), *topology, 8, 8)
    torch.library.opcheck(
        torch.ops.padst_native.block_value_gradient.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


@needs_blocks
def test_opcheck_between_permutations() -> None:
    structure = Block(8)
    topology = structure.choose(torch.rand(24, 16), 0.5)
    arguments = (torch.randn(5, 24), torch.randn(5, 16), *topology, 8, 8, table(16), table(24))
    torch.library.opcheck(
        torch.ops.padst_native.block_value_gradient.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


@needs_blocks
def test_opcheck_of_the_gradient_of_inputs() -> None:
    structure = Block(8)
    topology = structure.choose(torch.rand(24, 16), 0.5)
    values = structure.pack(torch.randn(24, 16), topology)
    for around in ((), (table(16), table(24))):
        arguments = (torch.randn(2, 5, 24), values, *topology, 16, *around)
        torch.library.opcheck(
            torch.ops.padst_native.block_input_gradient.default, arguments, test_utils=("test_schema", "test_faketensor")
        )


@needs_blocks
@pytest.mark.parametrize("structure", [Block(2), NM(1, 4), Diagonal()], ids=lambda s: s.to_string())
def test_wrong_permutations_are_refused(structure: Structure) -> None:
    grad, x = torch.randn(5, 8), torch.randn(5, 8)
    topology, right = structure.choose(torch.rand(8, 8), 0.75), table(8)
    twice, beyond = torch.zeros(8, dtype=torch.int32), torch.arange(1, 9).int()
    wrong = {"occurs twice": twice, "index outside": beyond, "7 entries for 8": table(7), "must be int32": right.long()}
    for message, indices in wrong.items():
        for side, around in (("input", (indices, right)), ("output", (right, indices))):
            with pytest.raises(RuntimeError, match=f"{side}_permutation.*{message}"):
                value_gradient(structure, grad, x, topology, *around)


@needs_blocks
@pytest.mark.parametrize(
    ("grad", "x", "message"),
    [
        (torch.randn(2, 5, 24), torch.randn(5, 16), r"must be \[tokens, features\]"),
        (torch.randn(4, 24), torch.randn(5, 16), "4 tokens"),
        (torch.randn(5, 24).half(), torch.randn(5, 16), "but grad is"),
        (torch.randn(5, 24).double(), torch.randn(5, 16).double(), "no micro-kernel"),
        (torch.randn(5, 99), torch.randn(5, 16), "row_pointers has"),
        (torch.randn(5, 24), torch.randn(5, 4), "index outside"),
    ],
)
def test_wrong_operands_are_refused(grad: torch.Tensor, x: torch.Tensor, message: str) -> None:
    topology = Block(8).choose(torch.eye(24, 16), 0.5)
    with pytest.raises(RuntimeError, match=message):
        block_gradient(Block(8), grad, x, topology)


@pytest.mark.parametrize("shape", [Shape(12, 12), Shape(12, 7), Shape(7, 12), Shape(1, 1)])
def test_diagonals_transposed_are_the_transpose(shape: Shape) -> None:
    structure = Diagonal()
    topology = structure.choose(torch.rand(size(shape)), 0.0 if shape == Shape(1, 1) else 0.6)
    values = structure.pack(torch.arange(1.0, shape.out_features * shape.in_features + 1).reshape(size(shape)), topology)
    turned, offsets = transpose(values, topology, shape)
    back = Shape(shape.in_features, shape.out_features)
    assert structure.check_topology(offsets, back) is None
    assert torch.equal(structure.unpack(turned, offsets, back), structure.unpack(values, topology, shape).T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [Shape(12, 12), Shape(12, 7), Shape(7, 12)])
def test_the_gradient_of_a_diagonal_layers_inputs(shape: Shape, dtype: torch.dtype) -> None:
    structure = Diagonal()
    topology = structure.choose(torch.rand(size(shape)), 0.6)
    values = structure.pack(torch.randint(-4, 5, size(shape)).to(dtype), topology)
    grad = torch.randint(-4, 5, (3, shape.out_features)).to(dtype)
    found = dispatch.input_gradient(structure, grad, values, topology, shape.in_features)
    assert torch.equal(found, grad @ structure.unpack(values, topology, shape))


needs_native = pytest.mark.skipif(not native.load(), reason=f"no native kernels: {native.unavailable_reason()}")
ROWS = [NM(1, 10), NM(2, 7), NM(2, 4, vector=6), NM(3, 3), Diagonal()]


def sizes(structure: Structure) -> list[Shape]:
    """Shapes that no tile divides, and that leave an N:M group short."""
    every = [Shape(64, 96), Shape(33, 131), Shape(131, 33), Shape(7, 300), Shape(300, 7), Shape(170, 170)]
    if isinstance(structure, NM):
        return [
            s for s in every if s.in_features >= structure.m and (s.in_features % structure.m or structure.n) >= structure.n
        ]
    return every


@needs_native
@pytest.mark.usefixtures("poisoned_memory", "threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("structure", ROWS, ids=lambda s: s.to_string())
def test_the_gradient_of_values_of_short_rows(structure: Structure, dtype: torch.dtype) -> None:
    for shape in sizes(structure):
        for tokens in (0, 1, 15, 33, 65, 130):
            check(structure, shape, dtype, tokens)


@needs_native
@pytest.mark.usefixtures("poisoned_memory", "threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("structure", ROWS, ids=lambda s: s.to_string())
@pytest.mark.parametrize(("into", "out"), AROUND)
def test_the_gradient_of_values_of_short_rows_between_permutations(
    structure: Structure, dtype: torch.dtype, into: bool, out: bool
) -> None:
    for shape in sizes(structure):
        for tokens in (1, 65):
            check(structure, shape, dtype, tokens, into=into, out=out)


@needs_native
@pytest.mark.usefixtures("poisoned_memory", "threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("structure", [s for s in ROWS if isinstance(s, NM)], ids=lambda s: s.to_string())
def test_the_gradient_of_an_n_m_layers_inputs(structure: NM, dtype: torch.dtype) -> None:
    """Whole numbers, on which float32 is exact, and 16-bit floats are after one rounding."""
    for shape in sizes(structure):
        topology = structure.choose(torch.rand(size(shape)), 0.0)
        weight = torch.randint(-3, 4, size(shape)).to(dtype)
        values = structure.pack(weight, topology)
        for tokens in ((0,), (1,), (15,), (2, 33), (130,)):
            grad = torch.randint(-3, 4, (*tokens, shape.out_features)).to(dtype)
            arguments = (grad, values, *topology, shape.in_features, structure.n, structure.m)
            found = torch.ops.padst_native.nm_input_gradient(*arguments)
            dense = structure.unpack(values, topology, shape).float()
            assert torch.equal(found, (grad.float() @ dense).to(dtype))
            before, behind = table(shape.out_features), table(shape.in_features)
            found = torch.ops.padst_native.nm_input_gradient(*arguments, before, behind)
            assert torch.equal(found, (grad[..., before.long()].float() @ dense)[..., behind.long()].to(dtype))


@needs_native
def test_opcheck_of_short_rows() -> None:
    grad, x = torch.randn(5, 24), torch.randn(5, 16)
    structure, diagonal = NM(1, 4, vector=2), Diagonal()
    topology, offsets = structure.choose(torch.rand(24, 16), 0.75), diagonal.choose(torch.rand(24, 16), 0.75)
    values = structure.pack(torch.randn(24, 16), topology)
    ops, tests = torch.ops.padst_native, ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.nm_input_gradient.default, (grad, values, *topology, 16, 1, 4), test_utils=tests)
    torch.library.opcheck(ops.nm_value_gradient.default, (grad, x, *topology, 1, 4, 2), test_utils=tests)
    torch.library.opcheck(ops.diagonal_value_gradient.default, (grad, x, *offsets), test_utils=tests)


@needs_native
def test_wrong_indices_of_short_rows_are_refused() -> None:
    grad, x, ops = torch.randn(5, 8), torch.randn(5, 8), torch.ops.padst_native
    with pytest.raises(RuntimeError, match="stay inside their group"):
        ops.nm_value_gradient(grad, x, torch.full((8, 2), 4, dtype=torch.uint8), 1, 4, 1)
    with pytest.raises(RuntimeError, match="offsets must be contiguous"):
        ops.nm_value_gradient(grad, x, torch.zeros(8, 3, dtype=torch.uint8), 1, 4, 1)
    with pytest.raises(RuntimeError, match="positive vector"):
        ops.nm_value_gradient(grad, x, torch.zeros(8, 2, dtype=torch.uint8), 1, 4, 0)
    with pytest.raises(RuntimeError, match="index outside"):
        ops.diagonal_value_gradient(grad, x, torch.tensor([8], dtype=torch.int32))
    with pytest.raises(RuntimeError, match="ascend"):
        ops.diagonal_value_gradient(grad, x, torch.tensor([3, 3], dtype=torch.int32))
    with pytest.raises(RuntimeError, match="but grad is"):
        ops.diagonal_value_gradient(grad.half(), x, torch.tensor([3], dtype=torch.int32))
