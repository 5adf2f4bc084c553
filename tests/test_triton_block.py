"""The Triton block kernels against float64: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import pytest
import torch

from padst_compile.kernels import dispatch, launch
from padst_compile.kernels.block import tiles as block_tiles
from padst_compile.kernels.block.triton_op import PRODUCT
from padst_compile.kernels.extras import Extras
from padst_compile.kernels.launch import Problem, Tile
from padst_compile.structures import Block, Shape
from padst_compile.testing.triton_products import ACTIVATIONS, TritonLayer, rounding_unit

pytestmark = pytest.mark.usefixtures("poisoned_memory", "triton_device")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = (
    (Block(16), Shape(48, 32)),
    (Block(32), Shape(70, 45)),
    (Block((5, 7)), Shape(23, 31)),
    (Block((64, 16)), Shape(100, 33)),
    (Block((16, 128)), Shape(17, 200)),
)
UNIT = torch.finfo(torch.float32).eps / 2


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def use_tile(monkeypatch: pytest.MonkeyPatch) -> Callable[[Tile], None]:
    """Launches every kernel with the given tile from now on."""
    return lambda tile: monkeypatch.setattr(launch, "_chooser", [lambda problem: tile])


def weight_of(layer: TritonLayer) -> torch.Tensor:
    """S in float64."""
    return layer.structure.unpack(layer.values.double(), layer.topology, layer.shape)


def extras_of(layer: TritonLayer) -> Extras:
    """What a layer does besides multiplying, as the kernels' own functions take it."""
    names = ("bias", "input_permutation", "output_permutation", "activation", "gate", "residual")
    return Extras(**{name: getattr(layer, name) for name in names})


def run(layer: TritonLayer, x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = layer.op(*layer.arguments(x))
    return result


def sum_error(terms: int) -> float:
    """The relative error of a float32 sum of products in any order, with a bias (Higham, section 3.1)."""
    return (terms + 2) * UNIT / (1 - (terms + 2) * UNIT)


def assert_within(found: torch.Tensor, exact: torch.Tensor, off: torch.Tensor) -> None:
    """`found` is off by no more than `off` and one rounding to its dtype."""
    rounding = torch.finfo(found.dtype)
    bound = off + (exact.abs() + off) * rounding_unit(found) + rounding.smallest_normal * rounding.eps
    excess = (found.double() - exact).abs() - bound
    assert bool((excess <= 0).all()), f"over the bound by {excess.max()}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("structure", "shape"), CASES, ids=str)
class TestForward:
    def test_permutations_and_token_counts(
        self, structure: Block, shape: Shape, dtype: torch.dtype, triton_device: torch.device
    ) -> None:
        layer = TritonLayer.random(structure, shape, dtype, triton_device)
        for tokens, extras in zip((0, 1, 3, 16, 17, 33, 130, 2), itertools.product((False, True), repeat=3), strict=True):
            layer.with_extras(bias=extras[0], into=extras[1], out=extras[2]).check(layer.random_input(tokens))

    def test_layouts_of_the_inputs(
        self, structure: Block, shape: Shape, dtype: torch.dtype, triton_device: torch.device
    ) -> None:
        layer = TritonLayer.random(structure, shape, dtype, triton_device)
        feature_major = layer.random_input(19).T.contiguous().T
        assert feature_major.stride() == (1, 19)
        for x in (
            feature_major,
            layer.random_input(5).repeat_interleave(2, 1)[:, ::2],
            layer.random_input(2, 3, 4),
            layer.random_input(5, 0),
            layer.random_input(),
        ):
            layer.with_extras(bias=True, into=True).check(x)
            layer.check(x)

    def test_epilogues(self, structure: Block, shape: Shape, dtype: torch.dtype, triton_device: torch.device) -> None:
        layer = TritonLayer.random(structure, shape, dtype, triton_device)
        for activation, (bias, permute_out) in zip(ACTIVATIONS, [(True, False), (True, True)] * 3, strict=False):
            finished = dataclasses.replace(layer.with_extras(bias=bias, out=permute_out), activation=activation)
            finished.check(layer.random_input(20))
            gated = dataclasses.replace(finished, gate=layer.random_output(20))
            gated.check(layer.random_input(20))
            dataclasses.replace(gated, residual=layer.random_output(20)).check(layer.random_input(20))

    def test_gradients(self, structure: Block, shape: Shape, dtype: torch.dtype, triton_device: torch.device) -> None:
        layer = TritonLayer.random(structure, shape, dtype, triton_device)
        for tokens in (0, 1, 37):
            x, grad = layer.random_input(tokens), layer.random_output(tokens)
            for inputs, outputs in ((x, grad), (x.T.contiguous().T, grad.T.contiguous().T)):
                found = PRODUCT.input_gradient(structure, outputs, layer.values, layer.topology, shape.in_features)
                off = grad.double().abs() @ weight_of(layer).abs() * sum_error(shape.out_features)
                assert_within(found, grad.double() @ weight_of(layer), off)
                found = PRODUCT.value_gradient(structure, outputs, inputs, layer.values, layer.topology)
                assert found.dtype == dtype
                exact, size = grad.double().T @ x.double(), grad.double().abs().T @ x.double().abs()
                pack = lambda weight: structure.pack(weight, layer.topology)  # noqa: E731
                assert_within(found, pack(exact), pack(size) * sum_error(tokens))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestEdges:
    def test_what_lies_beyond_is_not_read(self, dtype: torch.dtype, triton_device: torch.device) -> None:
        structure, shape = Block(16), Shape(21, 23)
        layer = TritonLayer.random(structure, shape, dtype, triton_device, sparsity=0.1)
        buffer = torch.full((7, 23), torch.nan, device=triton_device).to(dtype)
        buffer[:3] = layer.random_input(3)
        rows, columns = structure.block_rows(layer.topology), layer.topology[1]
        layer.values[rows == 1, :, 5:] = torch.nan
        layer.values[columns == 1, 7:] = torch.nan
        clean = TritonLayer(structure, shape, structure.pack(weight_of(layer), layer.topology).to(dtype), layer.topology)
        clean.assert_close(run(layer, buffer[:3]), buffer[:3])
        gradient = PRODUCT.input_gradient(structure, layer.random_output(3), layer.values, layer.topology, 23)
        assert gradient.isfinite().all()

    def test_rows_without_blocks_are_the_bias(self, dtype: torch.dtype, triton_device: torch.device) -> None:
        pointers = torch.tensor([0, 0, 1, 1, 1], dtype=torch.int32, device=triton_device)
        columns = torch.zeros(1, dtype=torch.int32, device=triton_device)
        values = torch.randn(1, 16, 16, device=triton_device).to(dtype)
        layer = TritonLayer(Block(16), Shape(64, 48), values, (pointers, columns)).with_extras(bias=True, out=True)
        layer.check(layer.random_input(5))
        gradient = PRODUCT.input_gradient(layer.structure, layer.random_output(5), values, layer.topology, 48)
        assert not gradient[:, 16:].any() and gradient[:, :16].all()

    def test_no_blocks_at_all(self, dtype: torch.dtype, triton_device: torch.device) -> None:
        pointers = torch.zeros(3, dtype=torch.int32, device=triton_device)
        values = torch.empty(0, 16, 16, dtype=dtype, device=triton_device)
        layer = TritonLayer(Block(16), Shape(32, 48), values, (pointers, pointers[:0])).with_extras(
            bias=True, into=True, out=True
        )
        layer.check(layer.random_input(5))
        assert not PRODUCT.input_gradient(layer.structure, layer.random_output(5), values, layer.topology, 48).any()
        assert PRODUCT.value_gradient(
            layer.structure, layer.random_output(5), layer.random_input(5), values, layer.topology
        ).shape == (0, 16, 16)


def test_offsets_beyond_31_bits(triton_device: torch.device) -> None:
    torch.utils.deterministic.fill_uninitialized_memory = False  # 4 GiB of which only a few pages are touched
    structure, shape, far = Block(16), Shape(16, 16), 1 << 31
    layer = TritonLayer.random(structure, shape, torch.float16, triton_device, sparsity=0.0)
    memory = torch.empty(far + 16, dtype=torch.float16, device=triton_device)
    x = memory.as_strided((2, 16), (far, 1)).copy_(layer.random_input(2))
    layer.check(x)
    weight = weight_of(layer)
    found = PRODUCT.input_gradient(structure, x, layer.values, layer.topology, 16)
    assert_within(found, x.double() @ weight, x.double().abs() @ weight.abs() * sum_error(16))
    found = PRODUCT.value_gradient(structure, x, x, layer.values, layer.topology)
    exact, size = x.double().T @ x.double(), x.double().abs().T @ x.double().abs()
    assert_within(found, structure.pack(exact, layer.topology), structure.pack(size, layer.topology) * sum_error(2))


# A block cut into parts along both sides, with more stages than steps; and tiles larger than what there is.
TILES = (Tile(16, 16, 16, 1, 4, 2), Tile(32, 16, 32, 3, 4, 3), Tile(64, 64, 16, 8, 8, 3), Tile(16, 128, 128, 8, 4, 5))


@pytest.mark.parametrize("tile", TILES, ids=str)
class TestTiles:
    def test_any_tile_is_right(self, tile: Tile, triton_device: torch.device, use_tile: Callable[[Tile], None]) -> None:
        use_tile(tile)
        for structure, shape in ((Block(64), Shape(130, 70)), (Block((40, 24)), Shape(80, 72))):
            layer = TritonLayer.random(structure, shape, torch.float32, triton_device)
            layer.with_extras(bias=True, into=True, out=True).check(layer.random_input(70))
            layer.check(layer.random_input(70))
            found = PRODUCT.input_gradient(structure, layer.random_output(5), layer.values, layer.topology, shape.in_features)
            assert found.isfinite().all()

    def test_tokens_are_shared_out(self, tile: Tile, triton_device: torch.device, use_tile: Callable[[Tile], None]) -> None:
        use_tile(tile)
        structure, shape, tokens = Block(32), Shape(32, 32), 16 * tile.tokens + 3
        layer = TritonLayer.random(structure, shape, torch.bfloat16, triton_device, sparsity=0.0)
        x, grad = layer.random_input(tokens), layer.random_output(tokens)
        first, second = (PRODUCT.value_gradient(structure, grad, x, layer.values, layer.topology) for _ in range(2))
        exact, size = grad.double().T @ x.double(), grad.double().abs().T @ x.double().abs()
        assert_within(first, structure.pack(exact, layer.topology), structure.pack(size, layer.topology) * sum_error(tokens))
        assert torch.equal(first, second)


# Blocks are joined only where they divide the inputs.
WHOLE_CASES = ((Block(16), Shape(50, 96)), (Block((5, 7)), Shape(23, 49)), (Block((24, 40)), Shape(48, 120)))
VARIANTS = [("joined", *case) for case in WHOLE_CASES] + [("ahead", *case) for case in CASES]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("depth", [16, 64])
class TestVariants:
    """Several blocks in one step, whole or in part; and inputs that are loaded a step before they are multiplied."""

    @pytest.mark.parametrize(("variant", "structure", "shape"), VARIANTS, ids=str)
    def test_forward_and_input_gradient(
        self,
        variant: str,
        structure: Block,
        shape: Shape,
        depth: int,
        dtype: torch.dtype,
        triton_device: torch.device,
        use_tile,
    ) -> None:
        use_tile(Tile(16, 16, depth, variant=variant))
        layer = TritonLayer.random(structure, shape, dtype, triton_device)
        full = dataclasses.replace(layer.with_extras(bias=True, into=True, out=True), residual=layer.random_output(19))
        for x in (layer.random_input(19), layer.random_input(19).T.contiguous().T):
            layer.check(x)
            full.check(x)
        # Blocks of the transposed product are joined too where they divide the outputs.
        grad, weight = layer.random_output(19), weight_of(layer)
        found = PRODUCT.input_gradient(structure, grad, layer.values, layer.topology, shape.in_features)
        assert_within(found, grad.double() @ weight, grad.double().abs() @ weight.abs() * sum_error(shape.out_features))

    @pytest.mark.parametrize(("variant", "in_features"), [("joined", 48), ("ahead", 48), ("ahead", 43)])
    def test_rows_without_blocks_and_what_lies_beyond(
        self, variant: str, in_features: int, depth: int, dtype: torch.dtype, triton_device: torch.device, use_tile
    ) -> None:
        use_tile(Tile(16, 16, depth, variant=variant))
        pointers = torch.tensor([0, 0, 3, 3, 4], dtype=torch.int32, device=triton_device)
        columns = torch.tensor([0, 1, 2, 1], dtype=torch.int32, device=triton_device)
        values = torch.randn(4, 16, 16, device=triton_device).to(dtype)
        layer = TritonLayer(Block(16), Shape(64, in_features), values, (pointers, columns))
        layer = layer.with_extras(bias=True, into=True, out=True)
        x = layer.random_input(5)
        layer.check(x)
        values[2, in_features - 32 :] = torch.nan  # of inputs that are not there
        assert torch.equal(run(layer, x), run(dataclasses.replace(layer, values=values.nan_to_num(0.0)), x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestForms:
    """What the op does not offer, and what a caller may know."""

    def test_feature_major_outputs(self, dtype: torch.dtype, triton_device: torch.device) -> None:
        from padst_compile.kernels.block.triton import Blocks, block_linear

        layer = TritonLayer.random(Block(16), Shape(40, 48), dtype, triton_device).with_extras(bias=True, out=True)
        layer = dataclasses.replace(layer, activation="silu", gate=layer.random_output(20), residual=layer.random_output(20))
        x = layer.random_input(20)
        y = block_linear(x, Blocks(layer.structure, layer.values, *layer.topology), 40, extras_of(layer), feature_major=True)
        assert y.stride() == (1, 20)
        layer.assert_close(y, x)

    @pytest.mark.parametrize(
        ("tile", "per_row", "reads_pointers"),
        [
            (Tile(16, 16, 16, variant="joined"), 2, False),
            (Tile(16, 16, 64, variant="joined"), 2, False),  # one step
            (Tile(16, 16, 16), 1, False),
            (Tile(16, 16, 16), 2, True),
            (Tile(16, 16, 16, variant="ahead"), 1, False),
            (Tile(16, 16, 16, variant="ahead"), 2, True),
        ],
        ids=str,
    )
    def test_equally_many_blocks_need_no_pointers_without_a_loop(
        self, tile: Tile, per_row: int, reads_pointers: bool, dtype: torch.dtype, triton_device: torch.device, use_tile
    ) -> None:
        use_tile(tile)
        pointers = per_row * torch.arange(4, dtype=torch.int32, device=triton_device)
        columns = torch.tensor([0, 2, 1, 2, 0, 1], dtype=torch.int32, device=triton_device)[: 3 * per_row]
        values = torch.randn(3 * per_row, 16, 16, device=triton_device).to(dtype)
        layer = TritonLayer(Block(16), Shape(48, 48), values, (pointers, columns)).with_extras(bias=True, into=True, out=True)
        x = layer.random_input(20)
        layer.assert_close(layer.op(*layer.arguments(x), equal_rows=True), x)
        empty = dataclasses.replace(layer, topology=(torch.zeros_like(pointers), columns))
        assert torch.equal(layer.op(*empty.arguments(x), equal_rows=True), run(empty if reads_pointers else layer, x))

    def test_descriptors(self, dtype: torch.dtype, triton_device: torch.device, use_tile: Callable[[Tile], None]) -> None:
        if triton_device.type == "cuda" and torch.cuda.get_device_capability() < (9, 0):
            pytest.skip("descriptors need compute capability 9.0")
        layer = TritonLayer.random(Block((32, 16)), Shape(96, 64), dtype, triton_device).with_extras(bias=True, out=True)
        x, grad = layer.random_input(37), layer.random_output(37)
        for outputs in (32, 16):
            use_tile(Tile(16, outputs, 16, variant="descriptor"))
            layer.check(x)
            layer.check(x[:, None].expand(37, 2, 64))
            found = PRODUCT.input_gradient(layer.structure, grad, layer.values, layer.topology, 64)
            off = grad.double().abs() @ weight_of(layer).abs() * sum_error(96)
            assert_within(found, grad.double() @ weight_of(layer), off)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kernel", ["block_forward", "block_input_gradient", "block_value_gradient"])
@pytest.mark.parametrize("structure", ["block:64x64", "block:16x16", "block:5x7", "block:128x32"])
def test_the_search_space_has_its_default_and_nothing_twice(kernel: str, structure: str, dtype: str) -> None:
    for tokens, device in itertools.product((1, 64, 65536), ("NVIDIA H200 (9.0)", "NVIDIA A100 (8.0)", "unheard of")):
        problem = Problem(kernel, structure, 768, 3072, 1 << 16, tokens, dtype, device=device)
        tiles = block_tiles.tiles(problem)
        assert tiles and len(set(tiles)) == len(tiles)
        assert block_tiles.default_tile(problem) == tiles[0]
        for tile in tiles:
            assert all(side >= 16 and side & (side - 1) == 0 for side in (tile.tokens, tile.outputs, tile.depth))


class TestArguments:
    def test_what_does_not_fit_raises(self, triton_device: torch.device) -> None:
        layer = TritonLayer.random(Block(16), Shape(64, 48), torch.float32, triton_device)
        x = layer.random_input(8)
        with pytest.raises(RuntimeError, match="values"):
            run(layer, x.bfloat16())
        with pytest.raises(RuntimeError, match="x must be"):
            run(layer, torch.tensor(1.0, device=triton_device))
        with pytest.raises(RuntimeError, match="row_pointers"):
            run(dataclasses.replace(layer, shape=Shape(100, 48)), x)
        with pytest.raises(RuntimeError, match="columns"):
            run(dataclasses.replace(layer, values=layer.values[:-1]), x)
        with pytest.raises(RuntimeError, match="row_pointers"):
            run(dataclasses.replace(layer, topology=(layer.topology[0].long(), layer.topology[1])), x)
        assert layer.values.shape[0] % 4
        with pytest.raises(RuntimeError, match="not equally many in each of 4 block rows"):
            layer.op(*layer.arguments(x), equal_rows=True)
        for name, wrong in (
            ("bias", layer.random_output()[1:]), ("gate", layer.random_output(7)),
            ("residual", layer.random_output(8).double()), ("activation", "tanh"),
            ("input_permutation", torch.arange(48, device=triton_device)),
            ("output_permutation", torch.arange(63, device=triton_device).int()),
        ):  # fmt: skip
            with pytest.raises(RuntimeError, match=name):
                run(dataclasses.replace(layer, **{name: wrong}), x)


class TestOperator:
    def test_fake_agrees_with_real(self, triton_device: torch.device) -> None:
        layer = TritonLayer.random(Block(16), Shape(48, 32), torch.bfloat16, triton_device).with_extras(
            bias=True, into=True, out=True
        )
        layer = dataclasses.replace(
            layer, activation="gelu", gate=layer.random_output(2, 5), residual=layer.random_output(2, 5)
        )
        torch.library.opcheck(
            layer.op,
            layer.arguments(layer.random_input(2, 5)),
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )

    def test_dispatch_takes_it_and_gradients_flow(self, triton_device: torch.device) -> None:
        layer = TritonLayer.random(Block(16), Shape(48, 32), torch.float32, triton_device).with_extras(
            bias=True, into=True, out=True
        )
        assert dispatch.kernel_for(layer.structure, triton_device, torch.float32) == "triton"
        assert dispatch.triton_product(layer.structure, triton_device, torch.float64) is None
        x, grad = layer.random_input(2, 9), layer.random_output(2, 9)
        leaves = [x.requires_grad_(), layer.values.requires_grad_(), layer.bias.requires_grad_()]
        y = torch.ops.padst.structured_linear(
            x, layer.values, layer.topology, layer.bias, layer.input_permutation, layer.output_permutation, 48, "block:16"
        )
        exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
        weight = layer.structure.unpack(exact[1], layer.topology, layer.shape)
        product = exact[0][..., layer.input_permutation.long()] @ weight.T
        expected = product[..., layer.output_permutation.long()] + exact[2]
        torch.testing.assert_close(y.double(), expected, rtol=0, atol=100 * UNIT * 10)
        found = torch.autograd.grad(y, leaves, grad)
        for gradient, reference in zip(found, torch.autograd.grad(expected, exact, grad.double()), strict=True):
            torch.testing.assert_close(gradient.double(), reference, rtol=0, atol=100 * UNIT * 10)

    def test_tokens_may_change_without_recompilation(self, triton_device: torch.device) -> None:
        layer = TritonLayer.random(Block(16), Shape(48, 32), torch.float32, triton_device)
        compiled = torch.compile(lambda x: run(layer, x) + 1, dynamic=True, fullgraph=True, backend="aot_eager")
        for tokens in (3, 20):
            x = layer.random_input(tokens)
            assert torch.equal(compiled(x), run(layer, x) + 1)
