"""`padst_triton::nm_linear`, and the gradients of N:M products on a GPU."""

from __future__ import annotations

import torch

from padst_compile.kernels.extras import Extras
from padst_compile.kernels.gather_roof import gather_is_faster
from padst_compile.kernels.launch import Problem
from padst_compile.kernels.nm.tiles import LEAST_DOT, may_use_tensor_cores
from padst_compile.kernels.triton_product import TritonProduct, check_operands, new_outputs
from padst_compile.structures import NM, Topology


@torch.library.custom_op("padst_triton::nm_linear", mutates_args=())
def nm_linear(
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
    feature_major: bool = False,
) -> torch.Tensor:
    """`act(permute(permute(x, input) @ S.T, output) + bias) * gate + residual`, `[..., out_features]`.

    Args:
        x: `[..., in_features]` float32, float16 or bfloat16, with any strides.
        values: `[row_groups, slots, vector]`, same dtype.
        offsets: uint8 `[row_groups, slots]`, see `NM`.
        bias: `[out_features]` or None.
        input_permutation: int32 `[in_features]` or None.
        output_permutation: int32 `[out_features]` or None.
        out_features: rows of S.
        n: active inputs per group.
        m: size of a group.
        activation: one of `epilogue.ACTIVATIONS`.
        residual: `[..., out_features]` or None.
        gate: `[..., out_features]` or None.
        feature_major: whether the result lies in memory as `[out_features, tokens]`; else it is contiguous.

    Raises:
        RuntimeError: an argument does not fit; the values of indices are not read.
    """
    from padst_compile.kernels.nm import triton  # where the op runs, there is a Triton

    check_operands(x, values, out_features)
    structure = NM(n, m, values.shape[-1])
    _check_topology(structure, x, values, offsets, out_features)
    extras = Extras(bias, input_permutation, output_permutation, activation, gate, residual).checked(x, out_features)
    weight = values.contiguous(), offsets.contiguous()
    return triton.nm_linear(structure, x, *weight, out_features, extras, feature_major=feature_major)


@nm_linear.register_fake
def _nm_linear_fake(
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
    feature_major: bool = False,
) -> torch.Tensor:
    return new_outputs(x, out_features, feature_major=feature_major)


class NMProduct(TritonProduct):
    """N:M on Triton."""

    op = torch.ops.padst_triton.nm_linear.default

    def why_token_major(self, problem: Problem) -> str | None:
        """See `TritonProduct.why_token_major`: every input is found through an index."""
        return super().why_token_major(problem) if may_use_tensor_cores(problem) else None

    def input_gradient(
        self, structure: NM, grad: torch.Tensor, values: torch.Tensor, topology: Topology, in_features: int
    ) -> torch.Tensor:
        """See `TritonProduct.input_gradient`: no two inputs of a group meet the same rows, so nothing can be shared."""
        from padst_compile.kernels.nm import triton

        if not gather_is_faster(values.numel() / (grad.shape[1] * in_features), grad):
            return super().input_gradient(structure, grad, values, topology, in_features)
        return triton.nm_input_gradient(structure, grad, values.contiguous(), topology[0].contiguous(), in_features)

    def value_gradient(
        self, structure: NM, grad: torch.Tensor, x: torch.Tensor, values: torch.Tensor, topology: Topology
    ) -> torch.Tensor:
        """See `TritonProduct.value_gradient`."""
        from padst_compile.kernels.nm import triton

        shared = structure.vector >= LEAST_DOT
        if not shared and not gather_is_faster(values.numel() / (grad.shape[1] * x.shape[1]), x):
            return super().value_gradient(structure, grad, x, values, topology)
        return triton.nm_value_gradient(structure, grad, x, values.contiguous(), topology[0].contiguous())


PRODUCT = NMProduct()


def _check_topology(structure: NM, x: torch.Tensor, values: torch.Tensor, offsets: torch.Tensor, out_features: int) -> None:
    row_groups, slots = -(-out_features // structure.vector), structure.n * -(-x.shape[-1] // structure.m)
    if offsets.dtype != torch.uint8 or offsets.device != x.device or offsets.shape != (row_groups, slots):
        wanted = f"uint8 {(row_groups, slots)} on {x.device}"
        raise RuntimeError(f"offsets must be {wanted}, got {offsets.dtype} {tuple(offsets.shape)} on {offsets.device}")
    if values.shape != (row_groups, slots, structure.vector):
        raise RuntimeError(f"values must be {(row_groups, slots, structure.vector)}, got {tuple(values.shape)}")
