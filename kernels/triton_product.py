"""What a structure's Triton kernels offer to `dispatch.py`, and the checks of arguments that they share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from padst_compile.kernels.formats import format_of
from padst_compile.kernels.launch import Problem
from padst_compile.kernels.triton_limits import takes_transposed
from padst_compile.structures import Structure, Topology


class TritonProduct:
    """Products of one kind of structure on tensors for which `triton_support.usable` says yes.

    A module `kernels/<kind>/triton_op.py` defines the op `padst_triton::<kind>_linear`, with the arguments of
    `padst_native::<kind>_linear` (`native/library.cpp`) up to `gate` and at last `feature_major`, and `PRODUCT`, an instance of
    a subclass. It imports its kernels inside functions, because the op must exist where Triton does not.

    Attributes:
        op: the forward op.
    """

    op: Any

    def supports(self, structure: Structure, dtype: torch.dtype) -> bool:
        """Whether the kernels multiply this structure in this dtype, one of `triton_support.DTYPES`."""
        return True

    def why_token_major(self, problem: Problem) -> str | None:
        """Why `problem` is as well off with features adjacent in its inputs; None where it gains by adjacent tokens.

        It does where inputs come one by one otherwise, and 16 bytes at a time then: `offline.py` checks that.
        """
        return None if takes_transposed(problem) else "its tensor cores take TF32 inputs with features adjacent"

    def input_gradient(
        self, structure: Any, grad: torch.Tensor, values: torch.Tensor, topology: Topology, in_features: int
    ) -> torch.Tensor:
        """`grad` [tokens, out] -> `grad @ S` [tokens, in]; by ATen unless a subclass has a kernel."""
        return format_of(structure).input_gradient(structure, grad, values, topology, in_features)

    def value_gradient(
        self, structure: Any, grad: torch.Tensor, x: torch.Tensor, values: torch.Tensor, topology: Topology
    ) -> torch.Tensor:
        """The active entries of `grad.T @ x`, packed like `values`; by ATen unless a subclass has a kernel."""
        return format_of(structure).value_gradient(structure, grad, x, values, topology)


def new_outputs(x: torch.Tensor, out_features: int, *, feature_major: bool = False) -> torch.Tensor:
    """Uninitialised `[..., out_features]` for `x` `[..., in]`; if `feature_major`, it lies as `[out_features, tokens]`."""
    sizes = (*x.shape[:-1], out_features)
    if not feature_major:
        return x.new_empty(sizes)
    strides, tokens = [], 1
    for size in reversed(x.shape[:-1]):
        strides.append(tokens)
        tokens = tokens * size
    return x.new_empty_strided(sizes, (*reversed(strides), tokens))


def check_operands(x: torch.Tensor, values: torch.Tensor, out_features: int) -> None:
    """Checks what every product takes, without reading values.

    Raises:
        RuntimeError: naming the argument that does not fit, as the native kernels do.
    """
    if x.dim() == 0 or x.shape[-1] == 0:
        raise RuntimeError(f"x must be [..., in_features], got {tuple(x.shape)}")
    if out_features <= 0:
        raise RuntimeError(f"out_features must be positive, got {out_features}")
    if x.dtype != values.dtype:
        raise RuntimeError(f"x is {x.dtype} but values are {values.dtype}")
    if x.device != values.device:
        raise RuntimeError(f"x is on {x.device} but values are on {values.device}")


def check_index(name: str, index: torch.Tensor | None, device: torch.device, entries: int | None = None) -> None:
    """Checks an index tensor or permutation, but not its values, which are on the device.

    Raises:
        RuntimeError: where it is not int32 [entries] and contiguous on `device`.
    """
    if index is None:
        return
    if index.dtype != torch.int32 or index.device != device or not index.is_contiguous():
        raise RuntimeError(f"{name} must be contiguous int32 on {device}, got {index.dtype} on {index.device}")
    if entries is not None and index.shape != (entries,):
        raise RuntimeError(f"{name} must have {entries} entries, got {tuple(index.shape)}")


def check_like(name: str, tensor: torch.Tensor | None, shape: Sequence[int], x: torch.Tensor) -> None:
    """Checks a bias, gate or residual.

    Raises:
        RuntimeError: where it has another shape, or another dtype or device than `x`.
    """
    if tensor is not None and (tensor.shape != torch.Size(shape) or tensor.dtype != x.dtype or tensor.device != x.device):
        wanted = f"{tuple(shape)} {x.dtype} on {x.device}"
        raise RuntimeError(f"{name} must be {wanted}, got {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}")
