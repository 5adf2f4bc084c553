"""Two block layers in one C++ kernel, against float64 and against two kernels."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch

from padst_compile.kernels import native
from padst_compile.structures import Block, Shape
from padst_compile.testing.native_products import ACTIVATIONS, DTYPES, UNIT, Layer

pytestmark = [
    pytest.mark.skipif(
        not (native.load() and native.supports("block", torch.float32)), reason="no native kernel for blocks here"
    ),
    pytest.mark.usefixtures("poisoned_memory"),
]

# Blocks of both layers; inputs, hidden and output features. The last has odd numbers of all of them.
CASES = (
    (Block(64), Block(64), (128, 192, 64)),
    (Block((16, 32)), Block((32, 16)), (70, 90, 53)),
    (Block((6, 5)), Block((20, 7)), (31, 33, 45)),
)
Case = tuple[Block, Block, tuple[int, int, int]]


def layers(case: Case, dtype: torch.dtype) -> tuple[Layer, Layer]:
    torch.manual_seed(0)
    first, second, (inputs, hidden, outputs) = case
    return Layer.random(first, Shape(hidden, inputs), dtype), Layer.random(second, Shape(outputs, hidden), dtype)


def operands(first: Layer, second: Layer) -> tuple[Any, ...]:
    """Of both layers; an order of the hidden features is the second layer's."""
    assert first.output_permutation is None
    one, two = ((layer.values, *layer.topology, layer.bias, layer.input_permutation) for layer in (first, second))
    return *one, first.shape.out_features, *two, second.output_permutation, second.shape.out_features


def mlp(x: torch.Tensor, first: Layer, second: Layer, **options: Any) -> torch.Tensor:
    result: torch.Tensor = torch.ops.padst_native.block_mlp(
        x, *operands(first, second), first.activation, second.residual, **options
    )
    return result


def product(layer: Layer, x: torch.Tensor, off: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer up to its bias in float64, and how far float32 may be from that if `x` is off by up to `off`."""
    weight = layer.structure.unpack(layer.values.double(), layer.topology, layer.shape)
    if layer.input_permutation is not None:
        x, off = x[..., layer.input_permutation.long()], off[..., layer.input_permutation.long()]
    terms = (layer.shape.in_features + 2) * UNIT
    exact, bound = x @ weight.T, (x.abs() + off) @ weight.abs().T * terms / (1 - terms) + off @ weight.abs().T
    if layer.output_permutation is not None:
        exact, bound = exact[..., layer.output_permutation.long()], bound[..., layer.output_permutation.long()]
    if layer.bias is not None:
        exact = exact + layer.bias.double()
        bound = bound + (exact.abs() + bound + layer.bias.double().abs()) * UNIT
    return exact, bound


def check(x: torch.Tensor, first: Layer, second: Layer) -> None:
    """Within the bounds of two float32 sums and the roundings of the hidden features and the result."""
    rounding = torch.finfo(x.dtype)

    def rounded(exact: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
        return bound + (exact.abs() + bound) * rounding.eps / 2 + rounding.smallest_normal * rounding.eps

    hidden, off = product(first, x.double(), torch.zeros_like(x, dtype=torch.float64))
    activation = ACTIVATIONS[first.activation]
    off = activation.slope * off + activation.error(hidden, off)
    hidden = activation.exact(hidden)
    exact, off = product(second, hidden, rounded(hidden, off))
    if second.residual is not None:
        exact = exact + second.residual.double()
        off = off + (exact.abs() + off) * UNIT
    y = mlp(x, first, second)
    assert y.dtype == x.dtype and y.shape == exact.shape and y.is_contiguous()
    excess = (y.double() - exact).abs() - rounded(exact, off)
    assert bool((excess <= 0).all()), f"over the bound by {excess.max()}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_both_layers_at_once(case: Case, dtype: torch.dtype) -> None:
    first, second = layers(case, dtype)
    options = itertools.product((False, True), repeat=3)
    for (between, around, add), tokens in itertools.product(options, (0, 1, 3, 17, 29, 70)):
        one = dataclasses.replace(first.with_extras(around, around, False), activation="gelu" if add else "relu")
        two = second.with_extras(around, between, around)
        residual = torch.randn(tokens, second.shape.out_features).to(dtype) if add else None
        check(torch.randn(tokens, first.shape.in_features).to(dtype), one, dataclasses.replace(two, residual=residual))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_kernel_gives_what_two_do(dtype: torch.dtype, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first, second = layers(CASES[1], dtype)
        first, second = first.with_extras(True, True, False), second.with_extras(True, True, True)
        for name, tokens in itertools.product(ACTIVATIONS, (5, 200)):
            x, residual = torch.randn(2, tokens, 70).to(dtype), torch.randn(2, tokens, 53).to(dtype)
            one, two = dataclasses.replace(first, activation=name), dataclasses.replace(second, residual=residual)
            expected = two(one(x))
            assert torch.equal(mlp(x, one, two), expected)
            assert torch.equal(mlp(x, one, two, token_tile=7), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_leading_dimensions_and_interleaved_blocks(dtype: torch.dtype) -> None:
    first, second = layers(CASES[0], dtype)
    for x in (torch.randn(128), torch.randn(2, 0, 128), torch.randn(128, 9).T, torch.randn(9, 256)[:, ::2]):
        check(x.to(dtype), first, second)
    if native.interleaves(dtype):
        x = torch.randn(20, 128).to(dtype)
        arrange = torch.ops.padst_native.interleave_blocks
        one, two = (
            dataclasses.replace(
                layer, values=arrange(layer.values, *layer.topology, *reversed(dataclasses.astuple(layer.shape)))
            )
            for layer in (first, second)
        )
        assert torch.equal(mlp(x, one, two), mlp(x, first, second))


def test_wrong_operands_are_refused() -> None:
    first, second = layers(CASES[1], torch.float32)
    x = torch.randn(4, 70)
    wrong = torch.zeros(89, dtype=torch.int32)
    for one, two, message in (
        (dataclasses.replace(first, bias=torch.randn(89)), second.with_extras(False, True, False), r"bias must be \[90\]"),
        (dataclasses.replace(first, input_permutation=wrong), second, "first_input_permutation"),
        (first, dataclasses.replace(second, input_permutation=wrong), "second_input_permutation"),
        (first, dataclasses.replace(second, residual=torch.randn(4, 52)), "residual"),
        (first, dataclasses.replace(second, values=second.values[:-1]), "columns"),
        (dataclasses.replace(first, activation="tanh"), second, "activation"),
    ):
        with pytest.raises(RuntimeError, match=message):
            mlp(x, one, two)
    with pytest.raises(RuntimeError, match="token_tile must not be negative"):
        mlp(x, first, second, token_tile=-1)


def test_opcheck() -> None:
    first, second = layers(CASES[1], torch.bfloat16)
    both = operands(first.with_extras(True, True, False), second.with_extras(True, True, True))
    arguments = (*both, "silu", torch.randn(2, 5, 53).bfloat16())
    torch.library.opcheck(
        torch.ops.padst_native.block_mlp.default,
        (torch.randn(2, 5, 70).bfloat16(), *arguments),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )
