"""C++ kernels for the CPU, built at first use."""

from __future__ import annotations

from padst_compile.kernels.native.build import (
    NativeKernelsUnavailable,
    interleaves,
    load,
    source_hash,
    supports,
    unavailable_reason,
)

__all__ = ["NativeKernelsUnavailable", "interleaves", "load", "source_hash", "supports", "unavailable_reason"]
