"""Two block layers in one Triton kernel, against float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from padst_compile.kernels import dispatch
from padst_compile.structures import Block, Shape
from padst_compile.testing.triton_products import TritonLayer, rounding_unit

pytestmark = pytest.mark.usefixtures("poisoned_memory", "triton_device")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Blocks of both layers, and inputs, hidden and output features.
CASES = (
    (Block(16), Block(16), (32, 64, 48)),
    (Block((32, 16)), Block((16, 32)), (40, 70, 23)),
    (Block((6, 5)), Block((20, 6)), (31, 33, 45)),
)
OP = dispatch.mlp_op("triton")
UNIT = torch.finfo(torch.float32).eps / 2


def layers(case: tuple[Block, Block, tuple[int, int, int]], dtype: torch.dtype, device: torch.device) -> list[TritonLayer]:
    """Both layers of a case; the hidden features of the first include some that it has no blocks for."""
    torch.manual_seed(0)
    first, second, (inputs, hidden, outputs) = case
    return [
        TritonLayer.random(first, Shape(hidden, inputs), dtype, device, sparsity=0.8),
        TritonLayer.random(second, Shape(outputs, hidden), dtype, device, sparsity=0.4),
    ]


def operands(first: TritonLayer, second: TritonLayer) -> tuple[Any, ...]:
    """What the op takes of two layers."""
    one, two = ((layer.values, *layer.topology, layer.bias, None) for layer in (first, second))
    return *one, first.shape.out_features, *two, None, second.shape.out_features


def check(first: TritonLayer, second: TritonLayer, x: torch.Tensor, activation: str, residual: torch.Tensor | None) -> None:
    """The fused result is as close to float64 as rounding of the hidden tensor and two float32 sums allow."""
    hidden_features, out_features = first.shape.out_features, second.shape.out_features
    y = OP(x, *operands(first, second), activation, residual)
    weights = [layer.structure.unpack(layer.values.double(), layer.topology, layer.shape) for layer in (first, second)]
    act = {"none": lambda z: z, "gelu": F.gelu, "silu": F.silu}[activation]
    biases = [0.0 if layer.bias is None else layer.bias.double() for layer in (first, second)]

    hidden = x.double() @ weights[0].T + biases[0]
    off = (x.double().abs() @ weights[0].abs().T + abs(biases[0])) * (first.shape.in_features + 2) * UNIT * 1.01
    off = 1.13 * off + 8 * UNIT * (hidden.abs() + off) + 1e-35
    hidden = act(hidden)
    off = off + (hidden.abs() + off) * rounding_unit(y)
    exact = hidden @ weights[1].T + biases[1]
    size = (hidden.abs() + off) @ weights[1].abs().T + abs(biases[1])
    off = off @ weights[1].abs().T + size * (hidden_features + 2) * UNIT * 1.01
    exact = exact if residual is None else exact + residual.double()
    off = off + (exact.abs() + off) * (rounding_unit(y) + UNIT)
    off = off + torch.finfo(y.dtype).tiny
    assert y.shape == (x.shape[0], out_features) and y.dtype == x.dtype and y.is_contiguous()
    excess = (y.double() - exact).abs() - off
    assert bool((excess <= 0).all()), f"over the bound by {excess.max()}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_both_layers_at_once(case: tuple[Block, Block, tuple[int, int, int]], dtype: torch.dtype, triton_device) -> None:
    first, second = layers(case, dtype, triton_device)
    for tokens, (bias, activation) in zip(
        (0, 1, 17, 130, 33, 5), itertools.product((False, True), ("none", "gelu", "silu")), strict=True
    ):
        one, two = first.with_extras(bias=bias), second.with_extras(bias=bias)
        x, residual = one.random_input(tokens), two.random_output(tokens)
        check(one, two, x, activation, None)
        check(one, two, x, activation, residual)


def test_strided_tokens_and_edges_are_masked(triton_device: torch.device) -> None:
    first, second = layers(CASES[2], torch.float32, triton_device)
    wide = torch.full((9, 2 * 31), torch.nan, device=triton_device)
    wide[:, :31] = first.random_input(9)
    check(first, second, wide[:, :31], "gelu", second.random_output(18)[::2])


def test_blocks_that_do_not_meet_are_refused(triton_device: torch.device) -> None:
    for rows, columns, message in ((16, 32, "16 rows"), (256, 256, "at most 128")):
        first, second = layers((Block((rows, 16)), Block((16, columns)), (32, 512, 48)), torch.float32, triton_device)
        with pytest.raises(RuntimeError, match=message):
            OP(first.random_input(3), *operands(first, second))


def test_operands_that_do_not_fit_are_refused(triton_device: torch.device) -> None:
    first, second = layers(CASES[0], torch.float32, triton_device)
    x, both = first.random_input(3), operands(first, second)
    table = torch.arange(64, dtype=torch.int32, device=triton_device)
    for arguments, message in (
        ((*both[:4], table, *both[5:]), "takes no permutations"),
        ((*both, "tanh"), "activation must be one of"),
        ((*both, "none", x), "residual must be"),
        ((*both[:3], x, *both[4:]), "first_bias must be"),
    ):
        with pytest.raises(RuntimeError, match=message):
            OP(x, *arguments)


def test_leading_dimensions_and_opcheck(triton_device: torch.device) -> None:
    first, second = layers(CASES[0], torch.float32, triton_device)
    x, arguments = first.random_input(6).reshape(2, 3, -1), (*operands(first, second), "gelu")
    torch.testing.assert_close(OP(x, *arguments), OP(x.reshape(6, -1), *arguments).reshape(2, 3, -1))
    torch.library.opcheck(OP, (x, *arguments), test_utils=("test_schema", "test_faketensor"))
