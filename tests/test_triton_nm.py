"""The Triton kernels for N:M: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import pytest
import torch

from padst_compile.kernels import dispatch, launch
from padst_compile.kernels.extras import Extras
from padst_compile.kernels.gather_roof import gather_is_faster
from padst_compile.kernels.launch import Problem, Tile
from padst_compile.kernels.nm import tiles as nm_tiles
from padst_compile.kernels.nm import triton_op
from padst_compile.kernels.structured_linear import structured_linear
from padst_compile.structures import NM, Shape
from padst_compile.testing.accuracy import error_bound
from padst_compile.testing.triton_products import ACTIVATIONS, TritonLayer, rounding_unit

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rows with a choice of their own; groups too small for tensor cores; groups that fill a tile, and that do not.
STRUCTURES = (NM(1, 10), NM(2, 7), NM(2, 4, vector=6), NM(1, 4, vector=16), NM(3, 8, vector=40))
SHAPES = (Shape(33, 67), Shape(70, 27), Shape(7, 83))
TOKENS = (0, 1, 19)
# Few launches cover much in the interpreter, where each takes its time by the number of programs.
SMALL = Tile(tokens=16, outputs=16, depth=16, warps=4, stages=2, variant="dot")

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_structure = pytest.mark.parametrize("structure", STRUCTURES, ids=lambda s: s.to_string())

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def layer_of(structure: NM, shape: Shape, dtype: torch.dtype, device: torch.device) -> TritonLayer:
    structure.check(shape, structure.natural_sparsity(), "layer")
    return TritonLayer.random(structure, shape, dtype, device)


def fitting(structure: NM) -> list[Shape]:
    return [shape for shape in SHAPES if not 0 < shape.in_features % structure.m < structure.n]


# ---- forward


@each_dtype
@each_structure
def test_sizes_token_counts_and_permutations(structure: NM, dtype: torch.dtype, triton_device: torch.device) -> None:
    extras = itertools.cycle(itertools.product((False, True), repeat=3))
    for shape, tokens in itertools.product(fitting(structure), TOKENS):
        bias, into, out = next(extras)
        layer = layer_of(structure, shape, dtype, triton_device).with_extras(bias=bias, into=into, out=out)
        layer.check(layer.random_input(tokens))


@each_structure
def test_every_combination_of_permutations(structure: NM, triton_device: torch.device) -> None:
    layer = layer_of(structure, Shape(33, 67), torch.float32, triton_device)
    for bias, into, out in itertools.product((False, True), repeat=3):
        layer.with_extras(bias=bias, into=into, out=out).check(layer.random_input(5))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@each_structure
def test_activation_gate_and_residual(structure: NM, activation: str, triton_device: torch.device) -> None:
    for dtype, (gate, residual) in zip((torch.float32, torch.bfloat16), ((True, False), (True, True)), strict=True):
        layer = layer_of(structure, Shape(33, 67), dtype, triton_device).with_extras(bias=True, out=residual)
        layer = dataclasses.replace(
            layer,
            activation=activation,
            gate=layer.random_output(5) if gate else None,
            residual=layer.random_output(5) if residual else None,
        )
        layer.check(layer.random_input(5) * 3)


@each_structure
def test_leading_dimensions_and_strides(structure: NM, triton_device: torch.device) -> None:
    layer = layer_of(structure, Shape(33, 67), torch.float32, triton_device).with_extras(bias=True, into=True, out=True)
    whole = layer.random_input(4, 2)
    for x in (
        layer.random_input(),
        layer.random_input(2, 3, 2),
        layer.random_input(5, 0),
        torch.randn(67, 9, device=triton_device).T,
        torch.randn(9, 134, device=triton_device)[:, ::2],
        whole[:, 1],
        whole[:1].expand(3, 2, 67),
    ):
        layer.check(x)


@each_structure
def test_residual_and_gate_with_other_strides(structure: NM, triton_device: torch.device) -> None:
    layer = layer_of(structure, Shape(33, 67), torch.float32, triton_device)
    transposed = torch.randn(33, 6, device=triton_device).T
    expanded = torch.randn(1, 33, device=triton_device).expand(6, 33)
    dataclasses.replace(layer, residual=transposed, gate=expanded).check(layer.random_input(6))


@each_dtype
@each_structure
def test_feature_major_on_either_side(structure: NM, dtype: torch.dtype, triton_device: torch.device) -> None:
    from padst_compile.kernels.nm import triton

    layer = layer_of(structure, Shape(33, 67), dtype, triton_device).with_extras(bias=True, into=True, out=True)
    layer = dataclasses.replace(layer, residual=layer.random_output(19))
    extras = Extras(layer.bias, layer.input_permutation, layer.output_permutation, residual=layer.residual)
    for feature_input, feature_output in itertools.product((False, True), repeat=2):
        x = layer.random_input(19)
        x = x.T.contiguous().T if feature_input else x
        y = triton.nm_linear(structure, x, layer.values, layer.topology[0], 33, extras, feature_major=feature_output)
        assert y.T.is_contiguous() if feature_output else y.is_contiguous()
        layer.assert_close(y, x)


@each_dtype
@each_structure
def test_nothing_is_read_past_the_input(structure: NM, dtype: torch.dtype, triton_device: torch.device) -> None:
    layer = layer_of(structure, Shape(33, 67), dtype, triton_device)
    buffer = torch.full((8, 67), float("nan"), dtype=dtype, device=triton_device)
    buffer[:5] = layer.random_input(5)
    layer.check(buffer[:5])


@each_structure
def test_padding_of_the_last_group_of_rows_is_never_used(structure: NM, triton_device: torch.device) -> None:
    layer = layer_of(structure, Shape(33, 67), torch.float32, triton_device)
    x, members = layer.random_input(5), torch.arange(structure.vector, device=triton_device)
    clean = layer.op(*layer.arguments(x))
    layer.values[-1].masked_fill_((layer.values.shape[0] - 1) * structure.vector + members >= 33, float("nan"))
    assert torch.equal(layer.op(*layer.arguments(x)), clean)


# ---- every tile that a tuner may choose gives the same


def tiles_of(kernel: str, structure: NM, tokens: int) -> list[Tile]:
    """Few of the search space, among them every variant and the smallest and largest of each size."""
    problem = Problem(kernel, structure.to_string(), 67, 33, 1, tokens, "float32")
    found = nm_tiles.tiles(problem)
    assert nm_tiles.default_tile(problem).variant in {tile.variant for tile in found}
    keys = ("tokens", "outputs", "depth")
    ends = [end(found, key=lambda tile: getattr(tile, key)) for key in keys for end in (min, max)]
    return list(dict.fromkeys([nm_tiles.default_tile(problem), *ends]))


@pytest.fixture
def forced_tile(monkeypatch: pytest.MonkeyPatch) -> Callable[[Tile], None]:
    """Makes every kernel take one tile, whatever was tuned."""
    monkeypatch.setattr(launch, "_chooser", [])
    return lambda tile: launch.set_chooser(lambda problem: tile)


@pytest.mark.parametrize("structure", [NM(1, 10), NM(1, 4, vector=16), NM(2, 7, vector=24)], ids=lambda s: s.to_string())
def test_forward_with_other_tiles(structure: NM, forced_tile, triton_device: torch.device) -> None:
    layer = layer_of(structure, Shape(17, 35), torch.float32, triton_device).with_extras(bias=True, into=True, out=True)
    for tile in tiles_of("nm_forward", structure, 64):
        forced_tile(tile)
        layer.check(layer.random_input(37))


@pytest.mark.parametrize("structure", [NM(1, 10), NM(1, 4, vector=16), NM(2, 7, vector=24)], ids=lambda s: s.to_string())
def test_gradients_with_other_tiles(structure: NM, forced_tile, triton_device: torch.device) -> None:
    for kernel in ("nm_input_gradient", "nm_value_gradient"):
        for tile in tiles_of(kernel, structure, 64):
            forced_tile(tile)
            check_gradients(structure, Shape(17, 35), 37, torch.float32, triton_device, only=kernel)


def test_a_dot_serves_rows_that_share_nothing(forced_tile, triton_device: torch.device) -> None:
    """The search space leaves that out because it is slow, not because it is wrong."""
    forced_tile(SMALL)
    layer = layer_of(NM(2, 7), Shape(33, 67), torch.float32, triton_device).with_extras(bias=True, into=True, out=True)
    layer.check(layer.random_input(5))
    check_gradients(NM(2, 7), Shape(33, 67), 19, torch.float32, triton_device, only="nm_value_gradient")


def test_a_tile_wider_than_a_group_and_a_group_wider_than_a_tile(forced_tile, triton_device: torch.device) -> None:
    forced_tile(SMALL)
    for structure, rows in ((NM(1, 4, vector=5), 13), (NM(1, 4, vector=40), 90)):
        layer = layer_of(structure, Shape(rows, 29), torch.float32, triton_device).with_extras(bias=True, out=True)
        layer.check(layer.random_input(17))


# ---- gradients


def check_gradients(
    structure: NM, shape: Shape, tokens: int, dtype: torch.dtype, device: torch.device, *, only: str = "", strided: bool = False
) -> None:
    from padst_compile.kernels.nm import triton

    layer = layer_of(structure, shape, dtype, device)
    x, grad = layer.random_input(tokens), layer.random_output(tokens)
    if strided:
        x, grad = x.T.contiguous().T, grad.repeat_interleave(2, dim=1)[:, ::2]
    (offsets,), values = layer.topology, layer.values
    weight = structure.unpack(values.double(), (offsets,), shape)
    if only != "nm_value_gradient":
        found = triton.nm_input_gradient(structure, grad, values, offsets, shape.in_features)
        assert found.is_contiguous()
        exact, size = grad.double() @ weight, grad.double().abs() @ weight.abs()
        assert_sums(found, exact, size, shape.out_features)
    if only != "nm_input_gradient":
        found = triton.nm_value_gradient(structure, grad, x, values, offsets)
        assert found.is_contiguous()
        exact, size = grad.double().T @ x.double(), grad.double().abs().T @ x.double().abs()
        assert_sums(found, structure.pack(exact, (offsets,)), structure.pack(size, (offsets,)), tokens)


def assert_sums(found: torch.Tensor, exact: torch.Tensor, magnitude: torch.Tensor, terms: int) -> None:
    """Sums in float32, rounded once to the dtype of the result."""
    bound = error_bound(magnitude, terms + 2, torch.float32)
    bound = bound + rounding_unit(found) * (exact.abs() + bound) + torch.finfo(found.dtype).tiny
    assert bool(((found.double() - exact).abs() <= bound).all())


@each_dtype
@each_structure
def test_gradient_kernels(structure: NM, dtype: torch.dtype, triton_device: torch.device) -> None:
    for shape, tokens in itertools.product(fitting(structure), TOKENS):
        check_gradients(structure, shape, tokens, dtype, triton_device)


@each_structure
def test_gradient_kernels_with_other_strides(structure: NM, triton_device: torch.device) -> None:
    check_gradients(structure, Shape(33, 67), 9, torch.float32, triton_device, strided=True)


@each_structure
def test_value_gradients_over_several_shares_of_the_tokens(structure: NM, triton_device: torch.device) -> None:
    check_gradients(structure, Shape(9, 27), 1100, torch.float32, triton_device, only="nm_value_gradient")


def test_gradients_are_the_same_in_every_run(triton_device: torch.device) -> None:
    from padst_compile.kernels.nm import triton

    for structure in (NM(1, 10), NM(1, 4, vector=16)):
        layer = layer_of(structure, Shape(9, 27), torch.float32, triton_device)
        x, grad, (offsets,) = layer.random_input(300), layer.random_output(300), layer.topology
        into = [triton.nm_input_gradient(structure, grad, layer.values, offsets, 27) for _ in range(2)]
        kept = [triton.nm_value_gradient(structure, grad, x, layer.values, offsets) for _ in range(2)]
        assert torch.equal(*into)
        assert torch.equal(*kept)


def test_transposed_lists_name_every_entry_once(triton_device: torch.device) -> None:
    from padst_compile.kernels.nm import triton

    structure, shape = NM(2, 7, vector=3), Shape(20, 30)
    (offsets,) = structure.choose(torch.rand(20, 30, device=triton_device), 0.0)
    starts, entries = triton.transposed_lists(structure, offsets, shape.in_features)
    columns = structure.input_columns((offsets,)).flatten()
    assert torch.equal(entries.long().sort().values, torch.arange(offsets.numel(), device=triton_device))
    for column in range(shape.in_features):
        of_column = entries[starts[column] : starts[column + 1]].long()
        assert bool((columns[of_column] == column).all())
        assert bool((of_column.diff() > 0).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("structure", [NM(1, 4), NM(1, 4, vector=16)], ids=lambda s: s.to_string())
def test_training_goes_through_the_kernels(structure: NM, dtype: torch.dtype, triton_device: torch.device) -> None:
    """`padst::structured_linear` with both permutations, forward and backward, against float64."""
    layer = layer_of(structure, Shape(33, 40), dtype, triton_device).with_extras(bias=True, into=True, out=True)
    assert dispatch.kernel_for(structure, triton_device, dtype) == "triton"
    inputs = [layer.random_input(2, 3), layer.values, layer.bias]
    direction, results = layer.random_output(2, 3), []
    for kind in (dtype, torch.float64):
        x, values, bias = (tensor.detach().to(kind).requires_grad_() for tensor in inputs)
        tables = (layer.input_permutation, layer.output_permutation)
        y = structured_linear(x, values, list(layer.topology), bias, *tables, 33, structure.to_string())
        results.append([y, *torch.autograd.grad(y, (x, values, bias), direction.to(kind))])
    for found, exact in zip(*results, strict=True):
        allowed = 60 * torch.finfo(dtype).eps * exact.detach().abs().max().item()
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=allowed)


def test_gathering_is_left_where_dense_is_faster() -> None:
    few, many = torch.empty(8, 16), torch.empty(4096, 16)
    assert gather_is_faster(0.9, few)
    assert gather_is_faster(0.1, many)
    assert not gather_is_faster(0.5, many)
    assert not gather_is_faster(0.1, many.bfloat16())
    assert gather_is_faster(0.01, many.bfloat16())


# ---- the op


@pytest.mark.parametrize("structure", [NM(1, 4), NM(1, 4, vector=16)], ids=lambda s: s.to_string())
def test_the_operator_is_sound(structure: NM, triton_device: torch.device) -> None:
    layer = layer_of(structure, Shape(33, 40), torch.float16, triton_device).with_extras(bias=True, into=True, out=True)
    layer = dataclasses.replace(layer, activation="gelu", gate=layer.random_output(2, 3), residual=layer.random_output(2, 3))
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(layer.op, layer.arguments(layer.random_input(2, 3)), test_utils=tests)


def test_the_operator_takes_what_the_native_one_takes() -> None:
    native = [
        "x", "values", "offsets", "bias", "input_permutation", "output_permutation", "out_features", "n", "m", "activation",
        "residual",
    ]  # fmt: skip
    schema = triton_op.PRODUCT.op._schema
    assert [argument.name for argument in schema.arguments] == [*native, "gate", "feature_major"]


def test_wrong_arguments_are_named(triton_device: torch.device) -> None:
    layer = layer_of(NM(1, 4), Shape(33, 40), torch.float32, triton_device)
    x = layer.random_input(3)
    wrong = {
        "values": {"values": layer.values[:-1]},
        "offsets": {"topology": (layer.topology[0].int(),)},
        "bias": {"bias": torch.zeros(32, device=triton_device)},
        "input_permutation": {"input_permutation": torch.arange(40, device=triton_device)},
        "output_permutation": {"output_permutation": torch.arange(32, device=triton_device).int()},
        "activation": {"activation": "tanh"},
        "residual": {"residual": torch.zeros(3, 32, device=triton_device)},
        "gate": {"gate": torch.zeros(33, device=triton_device)},
    }
    for name, change in wrong.items():
        with pytest.raises(RuntimeError, match=name):
            layer.op(*dataclasses.replace(layer, **change).arguments(x))
    with pytest.raises(RuntimeError, match="values"):
        layer.op(*layer.arguments(x.half()))
