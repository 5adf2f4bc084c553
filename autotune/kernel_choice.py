"""Sparse kernel or dense product: measured once per layer shape, remembered, and explained."""

from __future__ import annotations

import dataclasses
import functools
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeGuard

import torch

from padst_compile.autotune.cache import JsonCache, cache_folder
from padst_compile.autotune.measure import interleaved_medians
from padst_compile.kernels import native

Kernel: TypeAlias = Literal["native", "triton", "aten", "dense"]

_REPETITIONS = 5
_MAX_TOKENS_MEASURED = 4096


@dataclasses.dataclass(frozen=True)
class LayerProblem:
    """All that the speed of a layer depends on, weights aside.

    Args:
        structure: short form of the structure.
        in_features: inputs.
        out_features: outputs.
        active: stored values.
        tokens: rows of the activations, as a power of two (`token_bucket`).
        dtype: dtype of the product.
        permuted: which tables the kernel applies ("", "in", "out", "in+out").
        training: whether gradients are computed as well.
        device: type of the device.
        sparse_kernel: what the sparse product would run on.
    """

    structure: str
    in_features: int
    out_features: int
    active: int
    tokens: int
    dtype: str
    permuted: str
    training: bool
    device: str
    sparse_kernel: Kernel

    def key(self) -> str:
        """The cache key: the problem, and what else could change its answer."""
        fields = ",".join(f"{name}={value}" for name, value in dataclasses.asdict(self).items())
        software = f"threads={torch.get_num_threads()},torch={torch.__version__},{_kernel_version()}"
        return f"{fields},{software},{_machine(self.device)}"


@dataclasses.dataclass(frozen=True)
class KernelChoice:
    """What runs a layer, and why.

    Args:
        kernel: "native" (C++), "triton", "aten" or "dense".
        reason: a sentence for the user.
        sparse_seconds: median time of the sparse product, where it was measured.
        dense_seconds: median time of the dense product, where it was measured.
    """

    kernel: Kernel
    reason: str
    sparse_seconds: float | None = None
    dense_seconds: float | None = None


def token_bucket(tokens: int) -> int:
    """The power of two that stands for a number of tokens: layers of like size share one measurement."""
    return 1 << (max(1, min(tokens, _MAX_TOKENS_MEASURED)) - 1).bit_length()


def choose_kernel(problem: LayerProblem, candidates: Callable[[], Mapping[str, Callable[[], Any]]]) -> KernelChoice:
    """The faster of "sparse" and "dense", from the cache or measured now; `candidates` makes them only for measuring."""
    cache, key = _cache(), problem.key()
    seconds = cache.get(key)
    if not _valid(seconds):
        seconds = interleaved_medians(candidates(), repetitions=_REPETITIONS)
        cache.put(key, seconds)
    sparse, dense = seconds["sparse"], seconds["dense"]
    ratio = dense / sparse
    if ratio >= 1.0:
        return KernelChoice(problem.sparse_kernel, f"{ratio:.1f}x faster than dense at {problem.tokens} tokens", sparse, dense)
    reason = f"sparse would be {1 / ratio:.1f}x slower than dense at {problem.tokens} tokens"
    return KernelChoice("dense", reason, sparse, dense)


def _valid(seconds: Any) -> TypeGuard[dict[str, float]]:
    return isinstance(seconds, dict) and all(
        isinstance(seconds.get(name), float) and seconds[name] > 0 for name in ("sparse", "dense")
    )


@functools.cache
def _cache_at(path: str) -> JsonCache:
    return JsonCache(Path(path))


def _cache() -> JsonCache:
    return _cache_at(str(cache_folder() / "kernel_choices.json"))


@functools.cache
def _machine(device: str) -> str:
    if device == "cuda":
        return f"{torch.cuda.get_device_name()},capability={torch.cuda.get_device_capability()}"
    return f"{platform.machine()},{cpu_name()},{torch.backends.cpu.get_cpu_capability()}"


def cpu_name() -> str:
    """The processor's name, as far as the system tells."""
    try:
        with Path("/proc/cpuinfo").open() as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@functools.cache
def _kernel_version() -> str:
    return f"kernels={native.source_hash()[:12]}"
