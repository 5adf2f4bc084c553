"""Results of the Triton products that lie in memory as [out_features, tokens]: right tensors, wherever they are read."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import pytest
import torch

from padst_compile.kernels import dispatch, triton_support
from padst_compile.kernels.structured_linear import structured_linear
from padst_compile.structures import NM, Block, Diagonal, Shape, Structure
from padst_compile.testing.triton_products import TritonLayer

# Whole blocks and odd ones; rows that share their choice and that do not.
STRUCTURES: tuple[Structure, ...] = (Block(16), Block((24, 40)), NM(1, 4), NM(1, 4, vector=16), Diagonal())
SHAPE = Shape(48, 40)
SIZES = ((), (1,), (0,), (5, 0), (19,), (2, 16), (3, 1, 5))

each_structure = pytest.mark.parametrize("structure", STRUCTURES, ids=lambda s: s.to_string())
pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def layer_of(structure: Structure, dtype: torch.dtype, device: torch.device, shape: Shape = SHAPE) -> TritonLayer:
    dispatch.kernel_op(structure, "triton")  # defines the op
    return TritonLayer.random(structure, shape, dtype, device).with_extras(bias=True, into=True, out=True)


def feature_major(layer: TritonLayer, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = layer.op(*layer.arguments(x), feature_major=True)
    return y


@pytest.mark.parametrize("dtype", triton_support.DTYPES, ids=str)
@each_structure
def test_the_layout_changes_no_number(structure: Structure, dtype: torch.dtype, triton_device: torch.device) -> None:
    layer = layer_of(structure, dtype, triton_device)
    for sizes in SIZES:
        x = layer.random_input(*sizes)
        y = feature_major(layer, x)
        assert y.shape == (*sizes, SHAPE.out_features) and y.dtype == dtype and not y._is_view()
        tokens = y.reshape(-1, SHAPE.out_features)
        assert tokens.T.is_contiguous() and (tokens.numel() == 0 or tokens.data_ptr() == y.data_ptr())
        layer.assert_close(y, x)


@each_structure
def test_gate_and_residual_in_either_layout(structure: Structure, triton_device: torch.device) -> None:
    layer = dataclasses.replace(layer_of(structure, torch.bfloat16, triton_device), activation="silu")
    x = layer.random_input(2, 16)
    for gate_major, residual_major, result_major in itertools.product((False, True), repeat=3):
        gate, residual = (
            feature_major(layer, x) if major else layer.random_output(2, 16) for major in (gate_major, residual_major)
        )
        gated = dataclasses.replace(layer, gate=gate, residual=residual)
        gated.assert_close(gated.op(*gated.arguments(x), feature_major=result_major), x)


@each_structure
def test_the_next_product_reads_it_where_it_lies(structure: Structure, triton_device: torch.device) -> None:
    layer, second = (layer_of(structure, torch.float32, triton_device, Shape(*sizes)) for sizes in ((48, 40), (40, 48)))
    y = feature_major(layer, layer.random_input(2, 16))
    assert triton_support.layout(y.view(-1, 48)) == "feature"
    second.check(y)


@each_structure
def test_fake_and_real_agree(structure: Structure, triton_device: torch.device) -> None:
    layer = dataclasses.replace(layer_of(structure, torch.float16, triton_device), activation="gelu")
    tests = ("test_schema", "test_faketensor")
    for sizes, more in (((), ()), ((1,), ()), ((0,), ()), ((2, 3), ("test_aot_dispatch_dynamic",))):
        around = dataclasses.replace(layer, gate=layer.random_output(*sizes), residual=layer.random_output(*sizes))
        call = around.op, around.arguments(around.random_input(*sizes)), {"feature_major": True}
        torch.library.opcheck(*call, test_utils=(*tests, *more))


@each_structure
def test_inductor_reads_it_through_its_strides(structure: Structure, triton_device: torch.device) -> None:
    layer = layer_of(structure, torch.float32, triton_device)

    def around(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(feature_major(layer, x * 2)) + 1

    compiled = torch.compile(around, fullgraph=True, dynamic=True)
    for sizes in ((3, 16), (2, 5)):
        x = layer.random_input(*sizes)
        torch.testing.assert_close(compiled(x), around(x), rtol=0, atol=0)


@each_structure
def test_gradients_of_feature_major_activations(structure: Structure, triton_device: torch.device) -> None:
    layer = layer_of(structure, torch.float32, triton_device)
    whole = functools.partial(torch.randint, -2, 3, device=triton_device)  # numbers, whose sums are exact
    x, grad = (whole((size, 32)).T.view(2, 16, size) for size in (SHAPE.in_features, SHAPE.out_features))
    weight, rest = whole(tuple(layer.values.shape)), (SHAPE.out_features, structure.to_string())
    tables = layer.input_permutation, layer.output_permutation
    results = []
    for dtype in (torch.float32, torch.float64):
        inputs, values = x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        y = structured_linear(inputs, values, list(layer.topology), None, *tables, *rest)
        results.append(torch.autograd.grad(y, (inputs, values), grad.to(dtype)))
    for gradient, exact in zip(*results, strict=True):
        assert torch.equal(gradient.double(), exact)
