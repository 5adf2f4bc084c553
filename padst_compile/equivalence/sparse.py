"""This package's operators by their plain definition: the dense weight of the structure, two gathers and a product."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from padst_compile.equivalence.registry import definition
from padst_compile.structures import NM, Block, Diagonal, Shape, Structure, parse

_ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


@definition("padst::permute")
def _permute(x: Any, indices: Any) -> Any:
    return x.index_select(-1, indices)


@definition("padst::to_dense")
def _to_dense(values: Any, topology: Sequence[Any], out_features: int, in_features: int, structure: str) -> Any:
    return parse(structure).unpack(values, tuple(topology), Shape(out_features, in_features))


@definition("padst::two_of_four_pack")
def _two_of_four_pack(weight: Any) -> Any:
    return weight


@definition("padst::two_of_four_linear")
def _two_of_four_linear(x: Any, packed: Any, bias: Any, input_permutation: Any, out_features: int) -> Any:
    return F.linear(x if input_permutation is None else x.index_select(-1, input_permutation), packed, bias)


@definition("padst::structured_linear")
def _structured_linear(
    x: Any, values: Any, topology: Sequence[Any], bias: Any, input_permutation: Any, output_permutation: Any,
    out_features: int, structure: str, *epilogue: Any,
) -> Any:  # fmt: skip
    tables = (bias, input_permutation, output_permutation)
    return _product(parse(structure), x, values, topology, *tables, out_features, *epilogue)


@definition("padst_native::interleave_blocks")
def _interleave_blocks(values: Any, row_pointers: Any, columns: Any, in_features: int, out_features: int) -> Any:
    blocks, width, rows = values.shape
    return values.reshape(blocks, width // 2, 2, rows).transpose(2, 3)


@definition("padst_native::block_linear")
def _native_block_linear(
    x: Any, values: Any, row_pointers: Any, columns: Any, bias: Any, input_permutation: Any, output_permutation: Any,
    out_features: int, activation: str = "none", residual: Any = None, gate: Any = None, token_tile: int = 0,
) -> Any:  # fmt: skip
    if len(values.shape) == 4:  # interleaved: [blocks, pairs, rows, 2]
        values = values.transpose(2, 3).flatten(1, 2)
    tables = (bias, input_permutation, output_permutation)
    return _triton_block_linear(x, values, row_pointers, columns, *tables, out_features, activation, residual, gate)


@definition("padst_native::block_mlp", "padst_triton::block_mlp")
def _block_mlp(
    x: Any, first_values: Any, first_row_pointers: Any, first_columns: Any, first_bias: Any, first_input_permutation: Any,
    hidden_features: int, second_values: Any, second_row_pointers: Any, second_columns: Any,
    second_bias: Any, second_input_permutation: Any, second_output_permutation: Any, out_features: int,
    activation: str = "none", residual: Any = None, token_tile: int = 0,
) -> Any:  # fmt: skip
    first = (first_bias, first_input_permutation, None, hidden_features)
    second = (second_bias, second_input_permutation, second_output_permutation, out_features)
    hidden = _native_block_linear(x, first_values, first_row_pointers, first_columns, *first, activation)
    return _native_block_linear(hidden, second_values, second_row_pointers, second_columns, *second, "none", residual)


@definition("padst_triton::block_linear")
def _triton_block_linear(
    x: Any, values: Any, row_pointers: Any, columns: Any, bias: Any, input_permutation: Any, output_permutation: Any,
    out_features: int, activation: str = "none", residual: Any = None, gate: Any = None, equal_rows: bool = False,
    feature_major: bool = False,
) -> Any:  # fmt: skip
    if equal_rows:  # the pointers are not read
        rows = row_pointers.shape[0] - 1
        row_pointers = torch.arange(rows + 1, device=columns.device) * (columns.shape[0] // rows)
    around = (bias, input_permutation, output_permutation, out_features, activation, residual, gate)
    return _product(Block((values.shape[2], values.shape[1])), x, values, (row_pointers, columns), *around)


@definition("padst_native::nm_linear")
def _native_nm_linear(
    x: Any, values: Any, offsets: Any, bias: Any, input_permutation: Any, output_permutation: Any, out_features: int,
    n: int, m: int, activation: str = "none", residual: Any = None, gate: Any = None, panels_of: Any = None,
    to_panels: bool = False,
) -> Any:  # fmt: skip
    tables = (bias, input_permutation, output_permutation)
    x = x if panels_of is None else _from_panels(x, panels_of)
    gate = gate if gate is None or not to_panels else _from_panels(gate, x.shape[:-1])
    y = _triton_nm_linear(x, values.to(x.dtype), offsets, *tables, out_features, n, m, activation, residual, gate)
    return _to_panels(y) if to_panels else y


@definition("padst_triton::nm_linear")
def _triton_nm_linear(
    x: Any, values: Any, offsets: Any, bias: Any, input_permutation: Any, output_permutation: Any, out_features: int,
    n: int, m: int, activation: str = "none", residual: Any = None, gate: Any = None, feature_major: bool = False,
) -> Any:  # fmt: skip
    tables = (bias, input_permutation, output_permutation)
    return _product(NM(n, m, values.shape[2]), x, values, (offsets,), *tables, out_features, activation, residual, gate)


@definition("padst_native::diagonal_linear")
def _native_diagonal_linear(
    x: Any, values: Any, offsets: Any, bias: Any, input_permutation: Any, output_permutation: Any, out_features: int,
    activation: str = "none", residual: Any = None, gate: Any = None, panels_of: Any = None, to_panels: bool = False,
) -> Any:  # fmt: skip
    tables = (bias, input_permutation, output_permutation)
    x = x if panels_of is None else _from_panels(x, panels_of)
    gate = gate if gate is None or not to_panels else _from_panels(gate, x.shape[:-1])
    y = _triton_diagonal_linear(x, values.to(x.dtype), offsets, *tables, out_features, activation, residual, gate)
    return _to_panels(y) if to_panels else y


@definition("padst_triton::diagonal_linear")
def _triton_diagonal_linear(
    x: Any, values: Any, offsets: Any, bias: Any, input_permutation: Any, output_permutation: Any, out_features: int,
    activation: str = "none", residual: Any = None, gate: Any = None, feature_major: bool = False,
) -> Any:  # fmt: skip
    around = (bias, input_permutation, output_permutation, out_features, activation, residual, gate)
    return _product(Diagonal(), x, values, (offsets,), *around)


def _to_panels(y: Any) -> Any:
    """Tokens [..., features] as [panels, features, width], the tokens that the last panel lacks filled up."""
    width = torch.ops.padst_native.panel_tokens()
    rows = y.reshape(-1, y.shape[-1])
    padded = F.pad(rows, (0, 0, 0, -rows.shape[0] % width))
    return padded.reshape(-1, width, y.shape[-1]).transpose(1, 2)


def _from_panels(x: Any, sizes: Sequence[int]) -> Any:
    """The reverse of `_to_panels`, for tokens of these sizes."""
    rows = x.transpose(1, 2).reshape(-1, x.shape[1])[: math.prod(sizes)]
    return rows.reshape(*sizes, x.shape[1])


def _product(
    structure: Structure, x: Any, values: Any, topology: Sequence[Any], bias: Any, input_permutation: Any,
    output_permutation: Any, out_features: int, activation: str = "none", residual: Any = None, gate: Any = None,
) -> Any:  # fmt: skip
    """`act(permute(permute(x, input) @ S.T, output) + bias) * gate + residual`."""
    if activation not in _ACTIVATIONS:
        raise NotImplementedError(f"the activation {activation!r} of a product")
    weight = structure.unpack(values, tuple(topology), Shape(out_features, x.shape[-1]))
    y = F.linear(x if input_permutation is None else x.index_select(-1, input_permutation), weight)
    y = y if output_permutation is None else y.index_select(-1, output_permutation)
    y = _ACTIVATIONS[activation](y if bias is None else y + bias)
    y = y if gate is None else y * gate
    return y if residual is None else y + residual
