"""Whether sparse tensor cores can multiply a layer here, and what speaks against it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import TypeGuard

import torch

from padst_compile.errors import first_line
from padst_compile.kernels.cusparselt.legality import MOST, WINDOW, most_active
from padst_compile.kernels.cusparselt.op import DTYPES
from padst_compile.kernels.cusparselt.trial import assert_exact
from padst_compile.structures import NM, Shape, Structure

_OLDEST_CAPABILITY = (8, 0)
_TRIAL = 128  # outputs, inputs and tokens
_emulated: list[bool] = []


@contextlib.contextmanager
def emulated() -> Iterator[None]:
    """Within this, the CPU counts as a device with sparse tensor cores, and the reference multiplies. For tests."""
    _emulated.append(True)
    try:
        yield
    finally:
        _emulated.pop()


def considered(structure: Structure, device: torch.device) -> TypeGuard[NM]:
    """Whether sparse tensor cores come into question at all: for N:M on a GPU."""
    return isinstance(structure, NM) and (device.type == "cuda" or bool(_emulated))


def why_not(structure: NM, shape: Shape, device: torch.device, dtype: torch.dtype) -> str | None:
    """What keeps sparse tensor cores from a layer, or None; the first question about a device multiplies something there."""
    if dtype not in DTYPES:
        return f"it multiplies float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    active = most_active(structure, shape.in_features)
    if active > MOST:
        return f"{structure.to_string()} may keep {active} of {WINDOW} neighbouring inputs, and sparse tensor cores take {MOST}"
    return _why_gpu_cannot(device, dtype) if device.type == "cuda" else None


def _why_gpu_cannot(device: torch.device, dtype: torch.dtype) -> str | None:
    if torch.version.hip is not None:
        return "it is a library for NVIDIA's GPUs"
    if torch.cuda.get_device_capability(device) < _OLDEST_CAPABILITY:
        return "this GPU has no sparse tensor cores"
    if not torch.backends.cusparselt.is_available():
        return "PyTorch was built without it"
    if torch.cuda.is_current_stream_capturing():
        return "it was not tried before a CUDA graph was captured"
    return why_trial_fails(device, dtype)


@functools.cache
def why_trial_fails(device: torch.device, dtype: torch.dtype) -> str | None:
    """What a small product says about a device, which is asked once: what it raises, or that it is wrong; else None."""
    generator = torch.Generator(device).manual_seed(0)
    numbers = torch.randn(_TRIAL, _TRIAL, device=device, generator=generator)
    weight = (numbers * torch.tensor([1.0, 0.0, 0.0, 1.0], device=device).repeat(_TRIAL // WINDOW)).to(dtype)
    try:
        assert_exact(weight, numbers.to(dtype), None)
    except RuntimeError as error:
        return first_line(error)
    return None
