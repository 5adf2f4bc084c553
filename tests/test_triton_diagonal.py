"""The Triton kernels for diagonals: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import pytest
import torch

from padst_compile.kernels import dispatch, launch
from padst_compile.kernels.diagonal import tiles as diagonal_tiles
from padst_compile.kernels.diagonal import triton_op
from padst_compile.kernels.extras import Extras
from padst_compile.kernels.launch import Problem, Tile
from padst_compile.kernels.structured_linear import structured_linear
from padst_compile.structures import Diagonal, Shape
from padst_compile.testing.accuracy import error_bound
from padst_compile.testing.triton_products import ACTIVATIONS, TritonLayer, rounding_unit

FREE = Diagonal()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Square, wide and tall; far from square, so that most places of the long side meet few diagonals; a single feature.
SHAPES = (Shape(33, 33), Shape(29, 67), Shape(67, 29), Shape(130, 7), Shape(5, 90), Shape(1, 9), Shape(9, 1))
TOKENS = (0, 1, 19)

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
sides = pytest.mark.parametrize("shape", [Shape(29, 67), Shape(67, 29)], ids=["wide", "tall"])

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def forced_tile(monkeypatch: pytest.MonkeyPatch) -> Callable[[Tile], None]:
    """Makes every kernel take one tile, whatever was tuned."""
    monkeypatch.setattr(launch, "_chooser", [])
    return lambda tile: launch.set_chooser(lambda problem: tile)


def layer_of(shape: Shape, dtype: torch.dtype, device: torch.device, sparsity: float = 0.8) -> TritonLayer:
    return TritonLayer.random(FREE, shape, dtype, device, sparsity)


# ---- forward


@each_dtype
@each_shape
def test_sizes_token_counts_and_permutations(shape: Shape, dtype: torch.dtype, triton_device: torch.device) -> None:
    extras = itertools.cycle([(True, True, True), (False, False, False), (True, False, True), (False, True, False)])
    for sparsity, tokens in itertools.product((0.0, 0.8), TOKENS):
        bias, into, out = next(extras)
        layer = layer_of(shape, dtype, triton_device, sparsity).with_extras(bias=bias, into=into, out=out)
        layer.check(layer.random_input(tokens))


@sides
def test_every_combination_of_permutations(shape: Shape, triton_device: torch.device) -> None:
    layer = layer_of(shape, torch.float32, triton_device)
    for bias, into, out in itertools.product((False, True), repeat=3):
        layer.with_extras(bias=bias, into=into, out=out).check(layer.random_input(5))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@sides
def test_activation_gate_and_residual(shape: Shape, activation: str, triton_device: torch.device) -> None:
    for dtype, (gate, residual) in zip((torch.float32, torch.bfloat16), ((True, False), (True, True)), strict=True):
        layer = layer_of(shape, dtype, triton_device).with_extras(bias=True, out=residual)
        layer = dataclasses.replace(
            layer,
            activation=activation,
            gate=layer.random_output(5) if gate else None,
            residual=layer.random_output(5) if residual else None,
        )
        layer.check(layer.random_input(5) * 3)


@sides
def test_leading_dimensions_and_strides(shape: Shape, triton_device: torch.device) -> None:
    layer = layer_of(shape, torch.float32, triton_device).with_extras(bias=True, into=True, out=True)
    features = shape.in_features
    whole = layer.random_input(4, 2)
    for x in (
        layer.random_input(),
        layer.random_input(2, 3, 2),
        layer.random_input(5, 0),
        torch.randn(features, 9, device=triton_device).T,
        torch.randn(9, 2 * features, device=triton_device)[:, ::2],
        whole[:, 1],
        whole[:1].expand(3, 2, features),
    ):
        layer.check(x)


@each_dtype
@sides
def test_feature_major_on_either_side(shape: Shape, dtype: torch.dtype, triton_device: torch.device) -> None:
    from padst_compile.kernels.diagonal import triton

    layer = layer_of(shape, dtype, triton_device).with_extras(bias=True, into=True, out=True)
    layer = dataclasses.replace(layer, residual=layer.random_output(19), gate=layer.random_output(19))
    extras = Extras(layer.bias, layer.input_permutation, layer.output_permutation, residual=layer.residual, gate=layer.gate)
    for feature_input, feature_output in itertools.product((False, True), repeat=2):
        x = layer.random_input(19)
        x = x.T.contiguous().T if feature_input else x
        y = triton.diagonal_linear(x, layer.values, layer.topology[0], shape.out_features, extras, feature_major=feature_output)
        assert y.T.is_contiguous() if feature_output else y.is_contiguous()
        layer.assert_close(y, x)


@each_dtype
@sides
def test_nothing_is_read_past_the_input(shape: Shape, dtype: torch.dtype, triton_device: torch.device) -> None:
    layer = layer_of(shape, dtype, triton_device)
    buffer = torch.full((8, shape.in_features), float("nan"), dtype=dtype, device=triton_device)
    buffer[:5] = layer.random_input(5)
    layer.check(buffer[:5])


@pytest.mark.parametrize("offsets", [[0], [66], [0, 66], [33, 34, 35], list(range(67))], ids=str)
@sides
def test_where_diagonals_wrap_around(shape: Shape, offsets: list[int], triton_device: torch.device) -> None:
    topology = (torch.tensor(offsets, dtype=torch.int32, device=triton_device),)
    values = FREE.pack(torch.randn(shape.out_features, shape.in_features, device=triton_device), topology)
    layer = TritonLayer(FREE, shape, values, topology)
    layer.check(layer.random_input(3))
    check_gradients(layer, 3)


@sides
def test_no_diagonals_at_all_give_the_bias(shape: Shape, triton_device: torch.device) -> None:
    topology = (torch.empty(0, dtype=torch.int32, device=triton_device),)
    values = torch.empty(0, min(shape.out_features, shape.in_features), device=triton_device)
    layer = TritonLayer(FREE, shape, values, topology).with_extras(bias=True, out=True)
    layer.check(layer.random_input(3))
    check_gradients(layer, 3)


# ---- every tile that a tuner may choose gives the same


def tiles_of(kernel: str, shape: Shape) -> list[Tile]:
    """Few of the search space, among them the smallest and largest of each size."""
    problem = Problem(kernel, "diagonal", shape.in_features, shape.out_features, 1, 64, "float32")
    found = diagonal_tiles.tiles(problem)
    keys = ("tokens", "outputs", "depth")
    ends = [end(found, key=lambda tile: getattr(tile, key)) for key in keys for end in (min, max)]
    return list(dict.fromkeys([diagonal_tiles.default_tile(problem), *ends]))


@sides
def test_forward_with_other_tiles(shape: Shape, forced_tile, triton_device: torch.device) -> None:
    layer = layer_of(shape, torch.float32, triton_device).with_extras(bias=True, into=True, out=True)
    for tile in tiles_of("diagonal_forward", shape):
        forced_tile(tile)
        layer.check(layer.random_input(37))


@sides
def test_gradients_with_other_tiles(shape: Shape, forced_tile, triton_device: torch.device) -> None:
    layer = layer_of(shape, torch.float32, triton_device)
    for kernel in ("diagonal_input_gradient", "diagonal_value_gradient"):
        for tile in tiles_of(kernel, shape):
            forced_tile(tile)
            check_gradients(layer, 37, only=kernel)


# ---- gradients


def check_gradients(layer: TritonLayer, tokens: int, *, only: str = "", strided: bool = False) -> None:
    from padst_compile.kernels.diagonal import triton

    x, grad = layer.random_input(tokens), layer.random_output(tokens)
    if strided:
        x, grad = x.T.contiguous().T, grad.repeat_interleave(2, dim=1)[:, ::2]
    (offsets,), values, shape = layer.topology, layer.values, layer.shape
    weight = FREE.unpack(values.double(), (offsets,), shape)
    if only != "diagonal_value_gradient":
        found = triton.diagonal_input_gradient(grad, values, offsets, shape.in_features)
        assert found.is_contiguous()
        assert_sums(found, grad.double() @ weight, grad.double().abs() @ weight.abs(), shape.out_features)
    if only != "diagonal_input_gradient":
        found = triton.diagonal_value_gradient(grad, x, values, offsets)
        assert found.is_contiguous()
        exact, size = grad.double().T @ x.double(), grad.double().abs().T @ x.double().abs()
        assert_sums(found, FREE.pack(exact, (offsets,)), FREE.pack(size, (offsets,)), tokens)


def assert_sums(found: torch.Tensor, exact: torch.Tensor, magnitude: torch.Tensor, terms: int) -> None:
    """Sums in float32, rounded once to the dtype of the result."""
    bound = error_bound(magnitude, terms + 2, torch.float32)
    bound = bound + rounding_unit(found) * (exact.abs() + bound) + torch.finfo(found.dtype).tiny
    assert bool(((found.double() - exact).abs() <= bound).all())


@each_dtype
@each_shape
def test_gradient_kernels(shape: Shape, dtype: torch.dtype, triton_device: torch.device) -> None:
    for tokens in TOKENS:
        check_gradients(layer_of(shape, dtype, triton_device), tokens)


@sides
def test_gradient_kernels_with_other_strides(shape: Shape, triton_device: torch.device) -> None:
    check_gradients(layer_of(shape, torch.float32, triton_device), 9, strided=True)


@pytest.mark.parametrize("shape", [Shape(9, 27), Shape(27, 9)], ids=["wide", "tall"])
def test_value_gradients_over_several_shares_of_the_tokens(shape: Shape, triton_device: torch.device) -> None:
    check_gradients(layer_of(shape, torch.float32, triton_device), 700, only="diagonal_value_gradient")


@pytest.mark.parametrize("shape", [Shape(9, 27), Shape(27, 9)], ids=["wide", "tall"])
def test_gradients_are_the_same_in_every_run(shape: Shape, triton_device: torch.device) -> None:
    from padst_compile.kernels.diagonal import triton

    layer = layer_of(shape, torch.float32, triton_device)
    x, grad, (offsets,) = layer.random_input(300), layer.random_output(300), layer.topology
    into = [triton.diagonal_input_gradient(grad, layer.values, offsets, shape.in_features) for _ in range(2)]
    kept = [triton.diagonal_value_gradient(grad, x, layer.values, offsets) for _ in range(2)]
    assert torch.equal(*into)
    assert torch.equal(*kept)


@each_dtype
@pytest.mark.parametrize("shape", [Shape(24, 60), Shape(60, 24)], ids=["wide", "tall"])
def test_training_goes_through_the_kernels(shape: Shape, dtype: torch.dtype, triton_device: torch.device) -> None:
    """`padst::structured_linear` with both permutations, forward and backward, against float64."""
    layer = layer_of(shape, dtype, triton_device).with_extras(bias=True, into=True, out=True)
    assert dispatch.kernel_for(FREE, triton_device, dtype) == "triton"
    inputs = [layer.random_input(2, 3), layer.values, layer.bias]
    direction, results = layer.random_output(2, 3), []
    for kind in (dtype, torch.float64):
        x, values, bias = (tensor.detach().to(kind).requires_grad_() for tensor in inputs)
        tables = (layer.input_permutation, layer.output_permutation)
        y = structured_linear(x, values, list(layer.topology), bias, *tables, shape.out_features, FREE.to_string())
        results.append([y, *torch.autograd.grad(y, (x, values, bias), direction.to(kind))])
    for found, exact in zip(*results, strict=True):
        allowed = 60 * torch.finfo(dtype).eps * exact.detach().abs().max().item()
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=allowed)


@each_dtype
@pytest.mark.parametrize("shape", [Shape(32, 64), Shape(64, 32)], ids=["wide", "tall"])
def test_whole_classes_run_on_the_block_kernels(shape: Shape, dtype: torch.dtype, triton_device: torch.device) -> None:
    """Whole numbers, few of which are added up: exact in every dtype."""
    structure = Diagonal(16)
    assert dispatch.folds_into_blocks(structure, shape, triton_device, dtype)
    topology = structure.choose(torch.rand(shape.out_features, shape.in_features, device=triton_device), 0.5)
    weight = torch.randint(-1, 2, (shape.out_features, shape.in_features), device=triton_device)
    x = torch.randint(-1, 2, (520, shape.in_features), device=triton_device)
    direction = torch.randint(0, 2, (520, shape.out_features), device=triton_device) * (torch.rand(520, 1).to(x.device) < 0.1)
    results = []
    for kind in (dtype, torch.float64):
        inputs, values = x.to(kind).requires_grad_(), structure.pack(weight.to(kind), topology).requires_grad_()
        y = structured_linear(inputs, values, list(topology), None, None, None, shape.out_features, structure.to_string())
        results.append([y, *torch.autograd.grad(y, (inputs, values), direction.to(kind))])
    for found, exact in zip(*results, strict=True):
        assert torch.equal(found.double(), exact)


# ---- the op


@sides
def test_the_operator_is_sound(shape: Shape, triton_device: torch.device) -> None:
    layer = layer_of(shape, torch.float16, triton_device).with_extras(bias=True, into=True, out=True)
    layer = dataclasses.replace(layer, activation="gelu", gate=layer.random_output(2, 3), residual=layer.random_output(2, 3))
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(layer.op, layer.arguments(layer.random_input(2, 3)), test_utils=tests)


def test_the_operator_takes_what_the_native_one_takes() -> None:
    native = [
        "x", "values", "offsets", "bias", "input_permutation", "output_permutation", "out_features", "activation", "residual",
    ]  # fmt: skip
    schema = triton_op.PRODUCT.op._schema
    assert [argument.name for argument in schema.arguments] == [*native, "gate", "feature_major"]


def test_wrong_arguments_are_named(triton_device: torch.device) -> None:
    layer = layer_of(Shape(29, 67), torch.float32, triton_device)
    x = layer.random_input(3)
    wrong = {
        "values": {"values": layer.values[:-1]},
        "offsets": {"topology": (layer.topology[0].long(),)},
        "bias": {"bias": torch.zeros(28, device=triton_device)},
        "input_permutation": {"input_permutation": torch.arange(67, device=triton_device)},
        "output_permutation": {"output_permutation": torch.arange(28, device=triton_device).int()},
        "activation": {"activation": "tanh"},
        "residual": {"residual": torch.zeros(3, 28, device=triton_device)},
        "gate": {"gate": torch.zeros(29, device=triton_device)},
    }
    for name, change in wrong.items():
        with pytest.raises(RuntimeError, match=name):
            layer.op(*dataclasses.replace(layer, **change).arguments(x))
