"""Picks, per call, the native kernel where there is one, else the ATen path."""

from __future__ import annotations

from typing import Any

import torch

from padst_compile.kernels import native
from padst_compile.kernels.block import aten as block_aten
from padst_compile.kernels.formats import format_of, register_format
from padst_compile.structures import NM, Block, Structure, Topology

register_format(Block.kind, block_aten.BlockFormat())


def has_native_kernel(structure: Structure, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a native kernel multiplies this structure here; builds the kernels at first use on a CPU."""
    return device.type == "cpu" and structure.kind in _NATIVE_OPS and native.load() and native.supports(structure.kind, dtype)


def native_op(structure: Structure) -> Any:
    """The native op of a structure: `(x, values, *topology, bias, input_permutation, output_permutation, out, *sizes)`."""
    return getattr(torch.ops.padst_native, _NATIVE_OPS[structure.kind]).default


def native_sizes(structure: Structure) -> tuple[int, ...]:
    """The integers that a native op takes after `out_features`."""
    return (structure.n, structure.m) if isinstance(structure, NM) else ()


def forward(
    structure: Structure,
    x: torch.Tensor,
    values: torch.Tensor,
    topology: Topology,
    bias: torch.Tensor | None,
    input_permutation: torch.Tensor | None,
    output_permutation: torch.Tensor | None,
    out_features: int,
) -> torch.Tensor:
    """`padst::structured_linear`, see there."""
    if has_native_kernel(structure, x.device, x.dtype):
        y: torch.Tensor = native_op(structure)(
            x, values, *topology, bias, input_permutation, output_permutation, out_features, *native_sizes(structure)
        )
        return y
    if input_permutation is not None:
        x = x.index_select(-1, input_permutation)
    y = format_of(structure).forward(structure, x.reshape(-1, x.shape[-1]), values, topology, out_features)
    # Autograd forbids writing in place to a view that a custom op returns, as `ReLU(inplace=True)` behind a layer would.
    y = torch.ops.aten._unsafe_view.default(y.contiguous(), (*x.shape[:-1], out_features))
    if output_permutation is not None:
        y = y.index_select(-1, output_permutation)
    return (y if bias is None else y + bias).contiguous()


def input_gradient(
    structure: Structure, grad: torch.Tensor, values: torch.Tensor, topology: Topology, in_features: int
) -> torch.Tensor:
    """`grad @ S` for `grad` [tokens, out]."""
    if isinstance(structure, Block) and has_native_kernel(structure, grad.device, grad.dtype):
        # S.T is block-sparse too: the forward kernel on the transposed blocks.
        transposed, blocks, index = block_aten.transpose(structure, values, topology, grad.shape[1], in_features)
        return forward(transposed, grad, blocks, index, None, None, None, in_features)
    return format_of(structure).input_gradient(structure, grad, values, topology, in_features)


def value_gradient(
    structure: Structure, grad: torch.Tensor, x: torch.Tensor, values: torch.Tensor, topology: Topology
) -> torch.Tensor:
    """The active entries of `grad.T @ x` for `grad` [tokens, out] and `x` [tokens, in]."""
    return format_of(structure).value_gradient(structure, grad, x, values, topology)


_NATIVE_OPS = {"block": "block_linear", "nm": "nm_linear", "diagonal": "diagonal_linear"}
