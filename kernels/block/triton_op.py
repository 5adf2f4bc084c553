"""`padst_triton::block_linear`, and the gradients of block products on a GPU."""

from __future__ import annotations

import dataclasses
import functools

import torch

from padst_compile.kernels.block import aten
from padst_compile.kernels.block.tiles import element_by_element
from padst_compile.kernels.extras import Extras
from padst_compile.kernels.launch import Problem
from padst_compile.kernels.remembered import remembered
from padst_compile.kernels.triton_product import TritonProduct, check_index, check_operands, new_outputs
from padst_compile.structures import Block, Topology


@torch.library.custom_op("padst_triton::block_linear", mutates_args=())
def block_linear(
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
    equal_rows: bool = False,
    feature_major: bool = False,
) -> torch.Tensor:
    """`act(permute(permute(x, input) @ S.T, output) + bias) * gate + residual`, `[..., out_features]`.

    Args:
        x: `[..., in_features]` float32, float16 or bfloat16, with any strides.
        values: `[blocks, columns, rows]`, same dtype, see `Block`.
        row_pointers: int32 `[block rows + 1]`.
        columns: int32 `[blocks]`.
        bias: `[out_features]` or None.
        input_permutation: int32 `[in_features]` or None.
        output_permutation: int32 `[out_features]` or None.
        out_features: rows of S.
        activation: one of `epilogue.ACTIVATIONS`.
        residual: `[..., out_features]` or None.
        gate: `[..., out_features]` or None.
        equal_rows: whether every block row holds equally many blocks, which are not looked up then.
        feature_major: whether the result lies in memory as `[out_features, tokens]`; else it is contiguous.

    Raises:
        RuntimeError: an argument does not fit; the values of indices are not read.
    """
    from padst_compile.kernels.block import triton  # where the op runs, there is a Triton

    check_operands(x, values, out_features)
    structure = structure_of(x, values, row_pointers, columns, out_features)
    extras = Extras(bias, input_permutation, output_permutation, activation, gate, residual).checked(x, out_features)
    if equal_rows and columns.numel() % (row_pointers.numel() - 1):
        raise RuntimeError(f"{columns.numel()} blocks are not equally many in each of {row_pointers.numel() - 1} block rows")
    blocks = triton.Blocks(structure, values.contiguous(), row_pointers, columns, equal_rows=equal_rows)
    return triton.block_linear(x, blocks, out_features, extras, feature_major=feature_major)


@block_linear.register_fake
def _block_linear_fake(
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
    equal_rows: bool = False,
    feature_major: bool = False,
) -> torch.Tensor:
    return new_outputs(x, out_features, feature_major=feature_major)


class BlockProduct(TritonProduct):
    """Blocks of any size on Triton."""

    op = torch.ops.padst_triton.block_linear.default

    def why_token_major(self, problem: Problem) -> str | None:
        """See `TritonProduct.why_token_major`: through a table, inputs come one by one."""
        tokens, features = (dataclasses.replace(problem, layout=f"{side}/token") for side in ("feature", "token"))
        if not element_by_element(features):
            return "it reads runs of features"
        return "no 16 bytes align with its sizes" if element_by_element(tokens) else super().why_token_major(problem)

    def input_gradient(
        self, structure: Block, grad: torch.Tensor, values: torch.Tensor, topology: Topology, in_features: int
    ) -> torch.Tensor:
        """See `TritonProduct.input_gradient`: the forward kernel on the blocks of S.T, read where they lie."""
        from padst_compile.kernels.block import triton

        sizes = grad.shape[1], in_features
        index = remembered(
            (aten.transposed_index, structure, *sizes), topology, lambda: aten.transposed_index(structure, topology, *sizes)
        )
        transposed = Block((structure.columns, structure.rows))
        blocks = triton.Blocks(transposed, values.contiguous(), *index, transposed=True)
        return triton.block_linear(grad, blocks, in_features, kernel="block_input_gradient")

    def value_gradient(
        self, structure: Block, grad: torch.Tensor, x: torch.Tensor, values: torch.Tensor, topology: Topology
    ) -> torch.Tensor:
        """See `TritonProduct.value_gradient`."""
        from padst_compile.kernels.block import triton

        return triton.block_value_gradient(structure, x, grad, values, topology)


PRODUCT = BlockProduct()


def structure_of(
    x: torch.Tensor, values: torch.Tensor, row_pointers: torch.Tensor, columns: torch.Tensor, out_features: int
) -> Block:
    """The structure of `values`.

    Raises:
        RuntimeError: the shapes of the arguments do not fit together.
    """
    if values.dim() != 3:
        raise RuntimeError(f"values must be [blocks, columns, rows], got {tuple(values.shape)}")
    blocks, width, rows = values.shape
    if blocks and not (width and rows):
        raise RuntimeError(f"values must be [blocks, columns, rows], got {tuple(values.shape)}")
    structure = _block(max(rows, 1), max(width, 1))
    check_index("row_pointers", row_pointers, x.device, -(-out_features // structure.rows) + 1)
    check_index("columns", columns, x.device, blocks)
    return structure


@functools.cache
def _block(rows: int, columns: int) -> Block:
    return Block((rows, columns))
