"""Shapes and dtypes of what the C++ kernels return, for tracing; the structure's tensors do not matter to them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def register(library: str) -> None:
    """Give the ops of a loaded library their fake implementations."""
    torch.library.register_fake(f"{library}::interleave_blocks", _fake_interleave_blocks)
    torch.library.register_fake(f"{library}::block_linear", _fake_block_linear)
    torch.library.register_fake(f"{library}::block_mlp", fake_block_mlp)
    torch.library.register_fake(f"{library}::block_input_gradient", _fake_block_input_gradient)
    torch.library.register_fake(f"{library}::block_value_gradient", _fake_block_value_gradient)
    torch.library.register_fake(f"{library}::nm_linear", _fake_nm_linear)
    torch.library.register_fake(f"{library}::nm_input_gradient", _fake_nm_input_gradient)
    torch.library.register_fake(f"{library}::nm_value_gradient", _fake_nm_value_gradient)
    torch.library.register_fake(f"{library}::diagonal_linear", _fake_diagonal_linear)
    torch.library.register_fake(f"{library}::diagonal_value_gradient", _fake_diagonal_value_gradient)


def _fake_row_gather(x: torch.Tensor, out_features: int, panels_of: Sequence[int] | None, to_panels: bool) -> torch.Tensor:
    leading = x.shape[:-1] if panels_of is None else panels_of
    if to_panels:
        width = torch.ops.padst_native.panel_tokens()
        return x.new_empty(((math.prod(leading) + width - 1) // width, out_features, width))
    return x.new_empty((*leading, out_features))


def _fake_interleave_blocks(
    values: torch.Tensor, row_pointers: torch.Tensor, columns: torch.Tensor, in_features: int, out_features: int
) -> torch.Tensor:
    return values.new_empty((values.shape[0], values.shape[1] // 2, values.shape[2], 2))


def _fake_block_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    row_pointers: torch.Tensor,
    columns: torch.Tensor,
    bias: torch.Tensor | None,
    input_permutation: torch.Tensor | None,
    output_permutation: torch.Tensor | None,
    out_features: int,
    activation: str = "none",
    residual: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    token_tile: int = 0,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def fake_block_mlp(
    x: torch.Tensor,
    first_values: torch.Tensor,
    first_row_pointers: torch.Tensor,
    first_columns: torch.Tensor,
    first_bias: torch.Tensor | None,
    first_input_permutation: torch.Tensor | None,
    hidden_features: int,
    second_values: torch.Tensor,
    second_row_pointers: torch.Tensor,
    second_columns: torch.Tensor,
    second_bias: torch.Tensor | None,
    second_input_permutation: torch.Tensor | None,
    second_output_permutation: torch.Tensor | None,
    out_features: int,
    activation: str = "none",
    residual: torch.Tensor | None = None,
    token_tile: int = 0,
) -> torch.Tensor:
    """Of `block_mlp`, in C++ and in Triton."""
    return x.new_empty((*x.shape[:-1], out_features))


def _fake_block_input_gradient(
    grad: torch.Tensor,
    values: torch.Tensor,
    row_pointers: torch.Tensor,
    columns: torch.Tensor,
    in_features: int,
    input_permutation: torch.Tensor | None = None,
    output_permutation: torch.Tensor | None = None,
    token_tile: int = 0,
) -> torch.Tensor:
    return grad.new_empty((*grad.shape[:-1], in_features))


def _fake_block_value_gradient(
    grad: torch.Tensor,
    x: torch.Tensor,
    row_pointers: torch.Tensor,
    columns: torch.Tensor,
    block_rows: int,
    block_columns: int,
    input_permutation: torch.Tensor | None = None,
    output_permutation: torch.Tensor | None = None,
) -> torch.Tensor:
    return x.new_empty((columns.shape[0], block_columns, block_rows))


def _fake_nm_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    offsets: torch.Tensor,
    bias: torch.Tensor | None,
    input_permutation: torch.Tensor | None,
    output_permutation: torch.Tensor | None,
    out_features: int,
    n: int,
    m: int,
    activation: str = "none",
    residual: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    panels_of: Sequence[int] | None = None,
    to_panels: bool = False,
) -> torch.Tensor:
    return _fake_row_gather(x, out_features, panels_of, to_panels)


def _fake_diagonal_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    offsets: torch.Tensor,
    bias: torch.Tensor | None,
    input_permutation: torch.Tensor | None,
    output_permutation: torch.Tensor | None,
    out_features: int,
    activation: str = "none",
    residual: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    panels_of: Sequence[int] | None = None,
    to_panels: bool = False,
) -> torch.Tensor:
    return _fake_row_gather(x, out_features, panels_of, to_panels)


def _fake_nm_input_gradient(
    grad: torch.Tensor,
    values: torch.Tensor,
    offsets: torch.Tensor,
    in_features: int,
    n: int,
    m: int,
    grad_permutation: torch.Tensor | None = None,
    result_permutation: torch.Tensor | None = None,
) -> torch.Tensor:
    return grad.new_empty((*grad.shape[:-1], in_features))


def _fake_nm_value_gradient(
    grad: torch.Tensor,
    x: torch.Tensor,
    offsets: torch.Tensor,
    n: int,
    m: int,
    vector: int,
    input_permutation: torch.Tensor | None = None,
    output_permutation: torch.Tensor | None = None,
) -> torch.Tensor:
    return x.new_empty((*offsets.shape, vector))


def _fake_diagonal_value_gradient(
    grad: torch.Tensor,
    x: torch.Tensor,
    offsets: torch.Tensor,
    input_permutation: torch.Tensor | None = None,
    output_permutation: torch.Tensor | None = None,
) -> torch.Tensor:
    return x.new_empty((offsets.shape[0], min(grad.shape[1], x.shape[1])))
