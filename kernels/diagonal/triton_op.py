"""`padst_triton::diagonal_linear`, and the gradients of diagonal products on a GPU."""

from __future__ import annotations

import torch

from padst_compile.kernels.extras import Extras
from padst_compile.kernels.gather_roof import gather_is_faster
from padst_compile.kernels.launch import Problem
from padst_compile.kernels.triton_product import TritonProduct, check_index, check_operands, new_outputs
from padst_compile.structures import Diagonal, Topology


@torch.library.custom_op("padst_triton::diagonal_linear", mutates_args=())
def diagonal_linear(
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
    feature_major: bool = False,
) -> torch.Tensor:
    """`act(permute(permute(x, input) @ S.T, output) + bias) * gate + residual`, `[..., out_features]`.

    Args:
        x: `[..., in_features]` float32, float16 or bfloat16, with any strides.
        values: `[diagonals, min(in_features, out_features)]`, same dtype.
        offsets: int32 `[diagonals]`, ascending, see `Diagonal`.
        bias: `[out_features]` or None.
        input_permutation: int32 `[in_features]` or None.
        output_permutation: int32 `[out_features]` or None.
        out_features: rows of S.
        activation: one of `epilogue.ACTIVATIONS`.
        residual: `[..., out_features]` or None.
        gate: `[..., out_features]` or None.
        feature_major: whether the result lies in memory as `[out_features, tokens]`; else it is contiguous.

    Raises:
        RuntimeError: an argument does not fit; the values of indices are not read.
    """
    from padst_compile.kernels.diagonal import triton  # where the op runs, there is a Triton

    check_operands(x, values, out_features)
    check_index("offsets", offsets, x.device)
    length = min(x.shape[-1], out_features)
    if values.shape != (offsets.numel(), length):
        raise RuntimeError(f"values must be {(offsets.numel(), length)}, got {tuple(values.shape)}")
    extras = Extras(bias, input_permutation, output_permutation, activation, gate, residual).checked(x, out_features)
    return triton.diagonal_linear(x, values.contiguous(), offsets, out_features, extras, feature_major=feature_major)


@diagonal_linear.register_fake
def _diagonal_linear_fake(
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
    feature_major: bool = False,
) -> torch.Tensor:
    return new_outputs(x, out_features, feature_major=feature_major)


class DiagonalProduct(TritonProduct):
    """Free diagonals on Triton."""

    op = torch.ops.padst_triton.diagonal_linear.default

    def why_token_major(self, problem: Problem) -> str | None:
        """See `TritonProduct.why_token_major`: runs along a diagonal start anywhere, and no tensor cores read them."""
        return None

    def input_gradient(
        self, structure: Diagonal, grad: torch.Tensor, values: torch.Tensor, topology: Topology, in_features: int
    ) -> torch.Tensor:
        """See `TritonProduct.input_gradient`."""
        from padst_compile.kernels.diagonal import triton

        if not gather_is_faster(values.numel() / (grad.shape[1] * in_features), grad):
            return super().input_gradient(structure, grad, values, topology, in_features)
        return triton.diagonal_input_gradient(grad, values.contiguous(), topology[0].contiguous(), in_features)

    def value_gradient(
        self, structure: Diagonal, grad: torch.Tensor, x: torch.Tensor, values: torch.Tensor, topology: Topology
    ) -> torch.Tensor:
        """See `TritonProduct.value_gradient`."""
        from padst_compile.kernels.diagonal import triton

        if not gather_is_faster(values.numel() / (grad.shape[1] * x.shape[1]), x):
            return super().value_gradient(structure, grad, x, values, topology)
        return triton.diagonal_value_gradient(grad, x, values.contiguous(), topology[0].contiguous())


PRODUCT = DiagonalProduct()
