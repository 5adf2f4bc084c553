"""`padst_triton::block_mlp`: the fused pair of block layers as an op."""

from __future__ import annotations

import torch

from padst_compile.kernels.block.triton_op import structure_of
from padst_compile.kernels.native.fakes import fake_block_mlp
from padst_compile.kernels.triton_product import check_like, check_operands
from padst_compile.structures import Block

WIDEST = 128
"""Hidden features of a block, for which registers are enough."""


def why_not(first: Block, second: Block) -> str | None:
    """Why the kernel cannot join two layers without permutations, if it cannot."""
    if first.rows != second.columns:
        return f"blocks of the first layer have {first.rows} rows, those of the second {second.columns} columns"
    return f"blocks of at most {WIDEST} hidden features fit into registers" if first.rows > WIDEST else None


@torch.library.custom_op("padst_triton::block_mlp", mutates_args=())
def block_mlp(
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
) -> torch.Tensor:
    """`block_linear(act(block_linear(x, first ..)), second ..) + residual`, see `block_linear` for its arguments.

    The arguments are those of `padst_native::block_mlp` up to `residual`. A block of the second layer reads a block of hidden
    features of the first, whole, so that permutations must be None.

    Raises:
        RuntimeError: an argument does not fit; the values of indices are not read.
    """
    from padst_compile.kernels.block import triton, triton_mlp  # where the op runs, there is a Triton
    from padst_compile.kernels.epilogue import ACTIVATIONS

    check_operands(x, first_values, hidden_features)
    check_operands(x, second_values, out_features)
    tables = (first_input_permutation, second_input_permutation, second_output_permutation)
    if any(table is not None for table in tables):
        raise RuntimeError("the fused kernel of two layers takes no permutations")
    if activation not in ACTIVATIONS:
        raise RuntimeError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    check_like("first_bias", first_bias, (hidden_features,), x)
    check_like("second_bias", second_bias, (out_features,), x)
    check_like("residual", residual, (*x.shape[:-1], out_features), x)
    rows = x.reshape(-1, x.shape[-1])
    first = structure_of(rows, first_values, first_row_pointers, first_columns, hidden_features)
    second = structure_of(rows, second_values, second_row_pointers, second_columns, out_features)
    reason = why_not(first, second)
    if reason is not None:
        raise RuntimeError(reason)
    y = triton_mlp.block_mlp(
        rows,
        triton.Blocks(first, first_values.contiguous(), first_row_pointers, first_columns),
        triton.Blocks(second, second_values.contiguous(), second_row_pointers, second_columns),
        hidden_features,
        out_features,
        activation=activation,
        first_bias=None if first_bias is None else first_bias.contiguous(),
        second_bias=None if second_bias is None else second_bias.contiguous(),
        residual=None if residual is None else residual.reshape(-1, out_features),
    )
    # Autograd forbids writing in place to a view that a custom op returns.
    result: torch.Tensor = torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], out_features))
    return result


block_mlp.register_fake(fake_block_mlp)

OP = torch.ops.padst_triton.block_mlp.default
