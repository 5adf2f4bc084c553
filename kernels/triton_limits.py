"""What a GPU offers to one program: facts by which search spaces leave out what cannot run. Needs no Triton.

Shared memory per program: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; AMD CDNA3 ISA (LDS).
"""

from __future__ import annotations

import dataclasses
import functools
import re

from padst_compile.kernels.launch import Problem

ELEMENT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclasses.dataclass(frozen=True)
class Limits:
    """Of one device.

    Args:
        shared_bytes: that one program can have.
        descriptors: whether it copies tiles by descriptor (TMA).
    """

    shared_bytes: int
    descriptors: bool


_OLD = Limits(99 * 1024, descriptors=False)
_BY_CAPABILITY = {
    (8, 0): Limits(163 * 1024, descriptors=False),
    (9, 0): Limits(227 * 1024, descriptors=True),
    (10, 0): Limits(227 * 1024, descriptors=True),
    (10, 3): Limits(227 * 1024, descriptors=True),
}
_AMD = Limits(64 * 1024, descriptors=False)


@functools.cache
def limits_of(device: str) -> Limits:
    """The limits of a device named as in `Problem.device`, "NVIDIA H200 (9.0)"; those of a small GPU where none is known."""
    if "gfx" in device:
        return _AMD
    capability = re.search(r"\((\d+)\.(\d+)\)$", device)
    return _OLD if capability is None else _BY_CAPABILITY.get((int(capability[1]), int(capability[2])), _OLD)


def takes_transposed(problem: Problem) -> bool:
    """Whether tensor cores take operands with tokens adjacent, copied 16 bytes at a time without waiting.

    Those of Hopper and later do not in TF32: every number would need a copy of its own.
    """
    return not (problem.precision == "tf32" and limits_of(problem.device).descriptors)


def sums_per_thread(problem: Problem) -> int:
    """How many float32 sums a thread can hold beside what it multiplies, without spilling.

    Tensor cores read their operands from shared memory or in small fragments. Exact float32 products run on ordinary cores,
    whose operands take registers too.
    """
    return 64 if problem.dtype == "float32" else 128
