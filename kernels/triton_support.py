"""What surrounds the launch of a Triton kernel: whether it can run here, how exactly it multiplies, and for which problem.

Imports no Triton, which exists on Linux alone: modules that hold kernels are imported where `usable` says yes.

Offsets: a kernel multiplies token indices by strides in int64 (`tokens.to(tl.int64) * stride`) once, before its loop, where
that costs nothing; indices of features and blocks fit in int32.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Literal, TypeAlias

import torch

from padst_compile.kernels.launch import Problem

Precision: TypeAlias = Literal["ieee", "tf32", "tf32x3"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_MOST_TOKENS = 1 << 16
_OLDEST_CAPABILITY = (8, 0)  # bfloat16 and asynchronous copies
_interpreted: list[bool] = []
_split: list[bool] = []


@functools.cache
def installed() -> bool:
    """Whether there is a Triton to import."""
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton runs its kernels in its interpreter, which takes CPU tensors; set before Triton is first imported."""
    return installed() and os.environ.get("TRITON_INTERPRET", "0").lower() in {"1", "true", "yes", "on", "y"}


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Within this, products on the CPU run the Triton kernels in the interpreter. Slow; for tests.

    Raises:
        RuntimeError: where `TRITON_INTERPRET=1` was not in the environment from the start.
    """
    if not interpreting():
        raise RuntimeError("set TRITON_INTERPRET=1 before Triton is first imported")
    _interpreted.append(True)
    try:
        yield
    finally:
        _interpreted.pop()


def usable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Triton kernels run on tensors of this device and dtype."""
    if dtype not in DTYPES or not installed():
        return False
    return _capable(device) if device.type == "cuda" else bool(_interpreted) and device.type == "cpu"


@functools.cache
def _capable(device: torch.device) -> bool:
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= _OLDEST_CAPABILITY


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch of a Triton kernel: what a call does, and, made from meta tensors, what `offline.py` compiles.

    Args:
        kernel: the `triton.jit` function.
        grid: programs along each axis.
        arguments: by the names of the kernel's parameters; None where a pointer is optional.
        warps: per program.
        stages: of the software pipeline.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    warps: int
    stages: int

    def __call__(self) -> None:
        """Launch, on the current device."""
        self.kernel[self.grid](**self.arguments, **self.options)

    @property
    def options(self) -> dict[str, Any]:
        """What the compiler is told beside the arguments; products and sums fuse, whatever a version's default is."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


def on_device(x: torch.Tensor) -> AbstractContextManager[object]:
    """Makes the device of `x` the current one, on which Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@contextlib.contextmanager
def split_tf32() -> Iterator[None]:
    """Within this, exact float32 products of Triton kernels are sums of three TF32 products: tensor cores, 20 bits or so.

    For the whole process, backward passes included. Products that PyTorch's own setting lets run in TF32 do so still, and
    dense products, which PyTorch computes, stay what they are. AMD GPUs multiply exactly.
    """
    _split.append(True)
    try:
        yield
    finally:
        _split.pop()


def precision(dtype: torch.dtype) -> Precision:
    """How `tl.dot` multiplies: float32 as PyTorch's dense products are set to, or split; "ieee" for other dtypes.

    `fp32_precision` is also what `allow_tf32` and `torch.set_float32_matmul_precision` set: "high" and "medium" are TF32.
    """
    if dtype != torch.float32:
        return "ieee"
    if torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "tf32x3" if _split and torch.version.hip is None else "ieee"


def precision_on(device: torch.device, dtype: torch.dtype) -> Precision:
    """`precision` where Triton kernels run, and "ieee" elsewhere: what a layer's speed depends on there."""
    return precision(dtype) if usable(device, dtype) else "ieee"


def token_bucket(tokens: int) -> int:
    """The power of two that stands for a number of tokens, from 1 to 65536: problems of like size share a tile."""
    return 1 << (max(1, min(tokens, _MOST_TOKENS)) - 1).bit_length()


@functools.cache
def device_name(device: torch.device) -> str:
    """Name and capability of a device, as in "NVIDIA H200 (9.0)"."""
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} ({major}.{minor})"


def layout(x: torch.Tensor) -> str:
    """The order of two-dimensional activations [tokens, features] in memory: "feature" where tokens are adjacent."""
    return "feature" if x.stride(0) == 1 and x.stride(1) != 1 else "token"


def epilogue_name(bias: torch.Tensor | None, activation: str, gate: torch.Tensor | None, residual: torch.Tensor | None) -> str:
    """What follows the sums, as `Problem.epilogue` spells it."""
    parts = (
        "bias" if bias is not None else "",
        "" if activation == "none" else activation,
        "gate" if gate is not None else "",
        "residual" if residual is not None else "",
    )
    return "+".join(part for part in parts if part)


def permuted_name(input_permutation: torch.Tensor | None, output_permutation: torch.Tensor | None) -> str:
    """Which index tables are applied, as `Problem.permuted` spells it."""
    sides = ("in" if input_permutation is not None else "", "out" if output_permutation is not None else "")
    return "+".join(side for side in sides if side)


def problem(
    kernel: str,
    structure: str,
    x: torch.Tensor,
    values: torch.Tensor,
    out_features: int,
    *,
    permuted: str = "",
    epilogue: str = "",
    output_layout: str = "token",
) -> Problem:
    """The problem of multiplying `x` [tokens, in] with packed `values`, for `launch.tile_for`."""
    return Problem(
        kernel=kernel,
        structure=structure,
        in_features=x.shape[1],
        out_features=out_features,
        active=values.numel(),
        tokens=token_bucket(x.shape[0]),
        dtype=str(x.dtype).removeprefix("torch."),
        precision=precision(x.dtype),
        permuted=permuted,
        epilogue=epilogue,
        layout=f"{layout(x)}/{output_layout}",
        device=device_name(x.device),
    )
