"""The Triton block kernels against float64: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from padst_compile.kernels import dispatch, launch
from padst_compile.kernels.block import tiles as block_tiles
from padst_compile.kernels.block.triton_op import PRODUCT
from padst_compile.kernels.extras import Extras
from padst_compile.kernels.launch import Problem, Tile
from padst_compile.structures import Block, Shape, Topology

pytestmark = pytest.mark.usefixtures("poisoned_memory", "triton_device")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = (
    (Block(16), Shape(48, 32)),
    (Block(32), Shape(70, 45)),
    (Block((5, 7)), Shape(23, 31)),
    (Block((64, 16)), Shape(100, 33)),
    (Block((16, 128)), Shape(17, 200)),
)
NOTHING = Extras()
UNIT = torch.finfo(torch.float32).eps / 2
# In units of 2^-24 of the argument: an exp whose argument is rounded, or an erf, a sum, a quotient and a product or two.
ACTIVATION_ROUNDINGS = 16
STEEPEST = 1.13  # slope of any activation
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda z: z,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def use_tile(monkeypatch: pytest.MonkeyPatch) -> Callable[[Tile], None]:
    """Launches every kernel with the given tile from now on."""
    return lambda tile: monkeypatch.setattr(launch, "_chooser", [lambda problem: tile])


@dataclasses.dataclass(frozen=True)
class Layer:
    """A random block-sparse layer on the device of the kernels."""

    structure: Block
    shape: Shape
    values: torch.Tensor
    topology: Topology
    extras: Extras = NOTHING

    @classmethod
    def random(cls, structure: Block, shape: Shape, dtype: torch.dtype, device: torch.device, sparsity: float = 0.5) -> Layer:
        topology = structure.choose(torch.rand(shape.out_features, shape.in_features), sparsity)
        values = structure.pack(torch.randn(shape.out_features, shape.in_features), topology)
        return cls(structure, shape, values.to(device, dtype), tuple(index.to(device) for index in topology))

    def having(
        self, bias: bool = False, permute_in: bool = False, permute_out: bool = False, activation: str = "none"
    ) -> Layer:
        """The same layer with a random bias and random permutations."""
        device, dtype = self.values.device, self.values.dtype
        extras = Extras(
            bias=torch.randn(self.shape.out_features, device=device).to(dtype) if bias else None,
            input_permutation=torch.randperm(self.shape.in_features).int().to(device) if permute_in else None,
            output_permutation=torch.randperm(self.shape.out_features).int().to(device) if permute_out else None,
            activation=activation,
        )
        return dataclasses.replace(self, extras=extras)

    def adding(self, gate: torch.Tensor | None, residual: torch.Tensor | None) -> Layer:
        """The same layer with a gate and a residual."""
        return dataclasses.replace(self, extras=dataclasses.replace(self.extras, gate=gate, residual=residual))

    @property
    def weight(self) -> torch.Tensor:
        """S in float64."""
        return self.structure.unpack(self.values.double(), self.topology, self.shape)

    def x(self, *sizes: int) -> torch.Tensor:
        """Random activations `[*sizes, in]`."""
        return torch.randn(*sizes, self.shape.in_features, device=self.values.device).to(self.values.dtype)

    def y(self, *sizes: int) -> torch.Tensor:
        """A random tensor like the outputs `[*sizes, out]`."""
        return torch.randn(*sizes, self.shape.out_features, device=self.values.device).to(self.values.dtype)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        e = self.extras
        tables = (e.bias, e.input_permutation, e.output_permutation)
        result: torch.Tensor = torch.ops.padst_triton.block_linear(
            x, self.values, *self.topology, *tables, self.shape.out_features, e.activation, e.residual, e.gate
        )
        return result

    def check(self, x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        """Compares `y`, by default the op's, with float64."""
        y = self(x) if y is None else y
        assert y.dtype == x.dtype and y.shape == (*x.shape[:-1], self.shape.out_features)
        e, wide, weight = self.extras, x.double(), self.weight
        wide = wide if e.input_permutation is None else wide[..., e.input_permutation.long()]
        exact, off = wide @ weight.T, wide.abs() @ weight.abs().T
        if e.output_permutation is not None:
            exact, off = exact[..., e.output_permutation.long()], off[..., e.output_permutation.long()]
        if e.bias is not None:
            exact, off = exact + e.bias.double(), off + e.bias.double().abs()
        off = off * sum_error(self.shape.in_features)
        off = STEEPEST * off + (0.0 if e.activation == "none" else ACTIVATION_ROUNDINGS * UNIT) * (exact.abs() + off)
        exact = ACTIVATIONS[e.activation](exact)
        if e.gate is not None:
            exact, off = exact * e.gate.double(), (off + exact.abs() * UNIT) * e.gate.double().abs() * (1 + UNIT)
        if e.residual is not None:
            exact = exact + e.residual.double()
            off = off + (exact.abs() + off) * UNIT
        assert_within(y, exact, off)


def sum_error(terms: int) -> float:
    """The relative error of a float32 sum of products in any order, with a bias (Higham, section 3.1)."""
    return (terms + 2) * UNIT / (1 - (terms + 2) * UNIT)


def assert_within(found: torch.Tensor, exact: torch.Tensor, off: torch.Tensor) -> None:
    """`found` is off by no more than `off` and one rounding to its dtype."""
    # Triton's interpreter cuts the last digits of a bfloat16 off; hardware rounds to the nearest.
    cut = found.dtype == torch.bfloat16 and found.device.type == "cpu"
    rounding = torch.finfo(found.dtype)
    bound = off + (exact.abs() + off) * rounding.eps * (1 if cut else 0.5) + rounding.smallest_normal * rounding.eps
    excess = (found.double() - exact).abs() - bound
    assert bool((excess <= 0).all()), f"over the bound by {excess.max()}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("structure", "shape"), CASES, ids=str)
class TestForward:
    def test_permutations_and_token_counts(
        self, structure: Block, shape: Shape, dtype: torch.dtype, triton_device: torch.device
    ) -> None:
        layer = Layer.random(structure, shape, dtype, triton_device)
        for tokens, extras in zip((0, 1, 3, 16, 17, 33, 130, 2), itertools.product((False, True), repeat=3), strict=True):
            layer.having(*extras).check(layer.x(tokens))

    def test_layouts_of_the_inputs(
        self, structure: Block, shape: Shape, dtype: torch.dtype, triton_device: torch.device
    ) -> None:
        layer = Layer.random(structure, shape, dtype, triton_device)
        feature_major = layer.x(19).T.contiguous().T
        assert feature_major.stride() == (1, 19)
        for x in (feature_major, layer.x(5).repeat_interleave(2, 1)[:, ::2], layer.x(2, 3, 4), layer.x(5, 0), layer.x()):
            layer.having(True, permute_in=True).check(x)
            layer.check(x)

    def test_epilogues(self, structure: Block, shape: Shape, dtype: torch.dtype, triton_device: torch.device) -> None:
        layer = Layer.random(structure, shape, dtype, triton_device)
        for activation, (bias, permute_out) in zip(ACTIVATIONS, [(True, False), (True, True)] * 3, strict=False):
            finished = layer.having(bias, False, permute_out, activation)
            finished.check(layer.x(20))
            finished.adding(layer.y(20), None).check(layer.x(20))
            finished.adding(layer.y(20), layer.y(20)).check(layer.x(20))

    def test_gradients(self, structure: Block, shape: Shape, dtype: torch.dtype, triton_device: torch.device) -> None:
        layer = Layer.random(structure, shape, dtype, triton_device)
        for tokens in (0, 1, 37):
            x, grad = layer.x(tokens), layer.y(tokens)
            for inputs, outputs in ((x, grad), (x.T.contiguous().T, grad.T.contiguous().T)):
                found = PRODUCT.input_gradient(structure, outputs, layer.values, layer.topology, shape.in_features)
                off = grad.double().abs() @ layer.weight.abs() * sum_error(shape.out_features)
                assert_within(found, grad.double() @ layer.weight, off)
                found = PRODUCT.value_gradient(structure, outputs, inputs, layer.values, layer.topology)
                assert found.dtype == dtype
                exact, size = grad.double().T @ x.double(), grad.double().abs().T @ x.double().abs()
                pack = lambda weight: structure.pack(weight, layer.topology)  # noqa: E731
                assert_within(found, pack(exact), pack(size) * sum_error(tokens))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestEdges:
    def test_what_lies_beyond_is_not_read(self, dtype: torch.dtype, triton_device: torch.device) -> None:
        structure, shape = Block(16), Shape(21, 23)
        layer = Layer.random(structure, shape, dtype, triton_device, sparsity=0.1)
        buffer = torch.full((7, 23), torch.nan, device=triton_device).to(dtype)
        buffer[:3] = layer.x(3)
        rows, columns = structure.block_rows(layer.topology), layer.topology[1]
        layer.values[rows == 1, :, 5:] = torch.nan
        layer.values[columns == 1, 7:] = torch.nan
        clean = Layer(structure, shape, structure.pack(layer.weight, layer.topology).to(dtype), layer.topology)
        clean.check(buffer[:3], layer(buffer[:3]))
        gradient = PRODUCT.input_gradient(structure, layer.y(3), layer.values, layer.topology, 23)
        assert gradient.isfinite().all()

    def test_rows_without_blocks_are_the_bias(self, dtype: torch.dtype, triton_device: torch.device) -> None:
        pointers = torch.tensor([0, 0, 1, 1, 1], dtype=torch.int32, device=triton_device)
        columns = torch.zeros(1, dtype=torch.int32, device=triton_device)
        values = torch.randn(1, 16, 16, device=triton_device).to(dtype)
        layer = Layer(Block(16), Shape(64, 48), values, (pointers, columns)).having(True, False, True)
        layer.check(layer.x(5))
        gradient = PRODUCT.input_gradient(layer.structure, layer.y(5), values, layer.topology, 48)
        assert not gradient[:, 16:].any() and gradient[:, :16].all()

    def test_no_blocks_at_all(self, dtype: torch.dtype, triton_device: torch.device) -> None:
        pointers = torch.zeros(3, dtype=torch.int32, device=triton_device)
        values = torch.empty(0, 16, 16, dtype=dtype, device=triton_device)
        layer = Layer(Block(16), Shape(32, 48), values, (pointers, pointers[:0])).having(True, True, True)
        layer.check(layer.x(5))
        assert not PRODUCT.input_gradient(layer.structure, layer.y(5), values, layer.topology, 48).any()
        assert PRODUCT.value_gradient(layer.structure, layer.y(5), layer.x(5), values, layer.topology).shape == (0, 16, 16)


# A block cut into parts along both sides, with more stages than steps; and tiles larger than what there is.
TILES = (Tile(16, 16, 16, 1, 4, 2), Tile(32, 16, 32, 3, 4, 3), Tile(64, 64, 16, 8, 8, 3), Tile(16, 128, 128, 8, 4, 5))


@pytest.mark.parametrize("tile", TILES, ids=str)
class TestTiles:
    def test_any_tile_is_right(self, tile: Tile, triton_device: torch.device, use_tile: Callable[[Tile], None]) -> None:
        use_tile(tile)
        for structure, shape in ((Block(64), Shape(130, 70)), (Block((40, 24)), Shape(80, 72))):
            layer = Layer.random(structure, shape, torch.float32, triton_device)
            layer.having(True, True, True).check(layer.x(70))
            layer.check(layer.x(70))
            found = PRODUCT.input_gradient(structure, layer.y(5), layer.values, layer.topology, shape.in_features)
            assert found.isfinite().all()

    def test_tokens_are_shared_out(self, tile: Tile, triton_device: torch.device, use_tile: Callable[[Tile], None]) -> None:
        use_tile(tile)
        structure, shape, tokens = Block(32), Shape(32, 32), 16 * tile.tokens + 3
        layer = Layer.random(structure, shape, torch.bfloat16, triton_device, sparsity=0.0)
        x, grad = layer.x(tokens), layer.y(tokens)
        first, second = (PRODUCT.value_gradient(structure, grad, x, layer.values, layer.topology) for _ in range(2))
        exact, size = grad.double().T @ x.double(), grad.double().abs().T @ x.double().abs()
        assert_within(first, structure.pack(exact, layer.topology), structure.pack(size, layer.topology) * sum_error(tokens))
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestForms:
    """What the op does not offer, and what a caller may know."""

    def test_feature_major_outputs(self, dtype: torch.dtype, triton_device: torch.device) -> None:
        from padst_compile.kernels.block.triton import Blocks, block_linear

        layer = Layer.random(Block(16), Shape(40, 48), dtype, triton_device).having(True, False, True, "silu")
        layer = layer.adding(layer.y(20), layer.y(20))
        x = layer.x(20)
        y = block_linear(x, Blocks(layer.structure, layer.values, *layer.topology), 40, layer.extras, feature_major=True)
        assert y.stride() == (1, 20)
        layer.check(x, y)

    def test_equally_many_blocks_need_no_pointers(self, dtype: torch.dtype, triton_device: torch.device) -> None:
        from padst_compile.kernels.block.triton import Blocks, block_linear

        pointers = torch.tensor([0, 2, 4, 6], dtype=torch.int32, device=triton_device)
        columns = torch.tensor([0, 2, 1, 2, 0, 1], dtype=torch.int32, device=triton_device)
        values = torch.randn(6, 16, 16, device=triton_device).to(dtype)
        layer = Layer(Block(16), Shape(48, 48), values, (pointers, columns))
        x = layer.x(20)
        assert torch.equal(block_linear(x, Blocks(layer.structure, values, None, columns), 48), layer(x))

    def test_descriptors(self, dtype: torch.dtype, triton_device: torch.device, use_tile: Callable[[Tile], None]) -> None:
        if triton_device.type == "cuda" and torch.cuda.get_device_capability() < (9, 0):
            pytest.skip("descriptors need compute capability 9.0")
        layer = Layer.random(Block((32, 16)), Shape(96, 64), dtype, triton_device).having(True, False, True, "gelu")
        x, grad = layer.x(37), layer.y(37)
        for outputs in (32, 16):
            use_tile(Tile(16, outputs, 16, variant="descriptor"))
            layer.check(x)
            layer.check(x[:, None].expand(37, 2, 64))
            found = PRODUCT.input_gradient(layer.structure, grad, layer.values, layer.topology, 64)
            off = grad.double().abs() @ layer.weight.abs() * sum_error(96)
            assert_within(found, grad.double() @ layer.weight, off)


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
        layer = Layer.random(Block(16), Shape(64, 48), torch.float32, triton_device)
        x = layer.x(8)
        with pytest.raises(RuntimeError, match="values"):
            layer(x.bfloat16())
        with pytest.raises(RuntimeError, match="x must be"):
            layer(torch.tensor(1.0, device=triton_device))
        with pytest.raises(RuntimeError, match="row_pointers"):
            dataclasses.replace(layer, shape=Shape(100, 48))(x)
        with pytest.raises(RuntimeError, match="columns"):
            dataclasses.replace(layer, values=layer.values[:-1])(x)
        with pytest.raises(RuntimeError, match="row_pointers"):
            dataclasses.replace(layer, topology=(layer.topology[0].long(), layer.topology[1]))(x)
        for name, wrong in (
            ("bias", layer.y()[1:]), ("gate", layer.y(7)), ("residual", layer.y(8).double()), ("activation", "tanh"),
            ("input_permutation", torch.arange(48, device=triton_device)),
            ("output_permutation", torch.arange(63, device=triton_device).int()),
        ):  # fmt: skip
            with pytest.raises(RuntimeError, match=name):
                dataclasses.replace(layer, extras=dataclasses.replace(NOTHING, **{name: wrong}))(x)


class TestOperator:
    def test_fake_agrees_with_real(self, triton_device: torch.device) -> None:
        layer = Layer.random(Block(16), Shape(48, 32), torch.bfloat16, triton_device).having(True, True, True)
        e = layer.extras
        arguments = (
            layer.x(2, 5), layer.values, *layer.topology, e.bias, e.input_permutation, e.output_permutation, 48,
            "gelu", layer.y(2, 5), layer.y(2, 5),
        )  # fmt: skip
        op = torch.ops.padst_triton.block_linear.default
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))

    def test_dispatch_takes_it_and_gradients_flow(self, triton_device: torch.device) -> None:
        layer = Layer.random(Block(16), Shape(48, 32), torch.float32, triton_device).having(True, True, True)
        assert dispatch.kernel_for(layer.structure, triton_device, torch.float32) == "triton"
        assert dispatch.triton_product(layer.structure, triton_device, torch.float64) is None
        e, x, grad = layer.extras, layer.x(2, 9), layer.y(2, 9)
        leaves = [x.requires_grad_(), layer.values.requires_grad_(), e.bias.requires_grad_()]
        y = torch.ops.padst.structured_linear(
            x, layer.values, layer.topology, e.bias, e.input_permutation, e.output_permutation, 48, "block:16"
        )
        exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
        weight = layer.structure.unpack(exact[1], layer.topology, layer.shape)
        product = exact[0][..., e.input_permutation.long()] @ weight.T
        expected = product[..., e.output_permutation.long()] + exact[2]
        torch.testing.assert_close(y.double(), expected, rtol=0, atol=100 * UNIT * 10)
        found = torch.autograd.grad(y, leaves, grad)
        for gradient, reference in zip(found, torch.autograd.grad(expected, exact, grad.double()), strict=True):
            torch.testing.assert_close(gradient.double(), reference, rtol=0, atol=100 * UNIT * 10)

    def test_tokens_may_change_without_recompilation(self, triton_device: torch.device) -> None:
        layer = Layer.random(Block(16), Shape(48, 32), torch.float32, triton_device)
        compiled = torch.compile(lambda x: layer(x) + 1, dynamic=True, fullgraph=True, backend="aot_eager")
        for tokens in (3, 20):
            x = layer.x(tokens)
            assert torch.equal(compiled(x), layer(x) + 1)
