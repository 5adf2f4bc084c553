"""What the cost model must know of a machine: how fast it computes and moves data.

Rates of GPUs are those of their data sheets, for dense matrices; cache bandwidths were rounded from published measurements.
Rates of CPUs follow from the width of their vectors, for a typical clock. The model ranks, and decides between alternatives
that differ by factors, so that neither needs to be exact.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path

import torch

from padst_compile.kernels import triton_limits

_KIB, _GIGA, _TERA = 1024, 1e9, 1e12


@dataclasses.dataclass(frozen=True)
class Machine:
    """A processor, as the cost model sees it.

    Args:
        name: for messages.
        units: cores that are used, or streaming multiprocessors.
        rates: floating-point operations per second of matrix products, by dtype, and "tf32".
        vector_rate: the same of float32 without matrix units.
        bandwidth: bytes per second to and from memory.
        cache_bandwidth: bytes per second to and from the cache that all programs share (GPU), or that a core has (CPU).
        cache_bytes: of that cache, per core of a CPU.
        launch_seconds: of a call that computes nothing.
        shared_bytes: shared memory that one program may have (GPU).
        registers: of one multiprocessor (GPU).
    """

    name: str
    units: int
    rates: Mapping[str, float]
    vector_rate: float
    bandwidth: float
    cache_bandwidth: float
    cache_bytes: int
    launch_seconds: float
    shared_bytes: int = 0
    registers: int = 0

    def rate(self, dtype: str) -> float:
        """Operations per second of a product in `dtype`; an unknown one computes like float32."""
        return self.rates.get(dtype, self.rates["float32"])


def machine(device: str) -> Machine:
    """The machine behind a type of device."""
    if device == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties()
        return gpu(properties.name, (properties.major, properties.minor), properties.multi_processor_count)
    return cpu(torch.get_num_threads(), torch.backends.cpu.get_cpu_capability(), amx=torch.cpu._is_amx_tile_supported())


# --- CPUs ---

_CLOCK = 2.5e9
_LANES = {"AVX512": 16, "AVX2": 8}
_OTHER_LANES = 4  # a vector of 16 bytes
_FMA_PER_CYCLE = 2
_AMX_GAIN = 8.0  # of 16-bit products over float32, as oneDNN reaches it
_CORE_BANDWIDTH, _CORE_CACHE_BANDWIDTH = 10 * _GIGA, 60 * _GIGA
_CALL_SECONDS = 5e-6


def cpu(cores: int, capability: str, *, amx: bool = False) -> Machine:
    """A CPU of which `cores` are used, by the name of its vector extension in PyTorch."""
    vector = cores * _CLOCK * _LANES.get(capability, _OTHER_LANES) * _FMA_PER_CYCLE * 2
    half = vector * _AMX_GAIN if amx else vector
    return Machine(
        name=f"{cores} cores with {capability}",
        units=cores,
        rates={"float32": vector, "bfloat16": half, "float16": half, "float64": vector / 2},
        vector_rate=vector,
        bandwidth=cores * _CORE_BANDWIDTH,
        cache_bandwidth=cores * _CORE_CACHE_BANDWIDTH,
        cache_bytes=cpu_cache_bytes(),
        launch_seconds=_CALL_SECONDS,
    )


@functools.cache
def cpu_cache_bytes() -> int:
    """Size of the second-level cache of one core; 1 MiB where the system does not tell."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text().strip()
        return int(text.removesuffix("K")) * _KIB
    except (OSError, ValueError):
        return 1024 * _KIB


# --- GPUs ---

_GPU_LAUNCH_SECONDS = 5e-6
_GPU_REGISTERS = 65536


@dataclasses.dataclass(frozen=True)
class _Sheet:
    """A data sheet: teraflops by dtype, bandwidths in terabytes per second, cache in MiB."""

    float32: float
    tf32: float
    half: float
    bandwidth: float
    cache_bandwidth: float
    cache: int


# fmt: off
_SHEETS = {  # the first whose name is part of the device's
    "B200": _Sheet(75, 1100, 2250, 8.0, 10.0, 126),
    "GH200": _Sheet(67, 494, 989, 4.0, 5.5, 50),
    "H200": _Sheet(67, 494, 989, 4.8, 5.5, 50),
    "H100": _Sheet(67, 494, 989, 3.35, 5.5, 50),
    "A100": _Sheet(19.5, 156, 312, 2.0, 4.5, 40),
    "L40": _Sheet(90, 90, 181, 0.86, 3.5, 96),
    "L4": _Sheet(30, 60, 121, 0.3, 2.0, 48),
    "4090": _Sheet(82, 82, 165, 1.0, 5.0, 72),
}
# fmt: on
_UNKNOWN_PER_UNIT = _Sheet(0.2, 1.0, 2.0, 0.02, 0.04, 1)  # a GPU of no list, by its multiprocessors: between the above


def gpu(name: str, capability: tuple[int, int], units: int) -> Machine:
    """A GPU by its name, as CUDA reports it."""
    sheet = next((sheet for part, sheet in _SHEETS.items() if part in name), None) or _scaled(_UNKNOWN_PER_UNIT, units)
    half, full = sheet.half * _TERA, sheet.float32 * _TERA
    return Machine(
        name=name,
        units=units,
        rates={"float32": full, "tf32": sheet.tf32 * _TERA, "bfloat16": half, "float16": half, "float64": full / 2},
        vector_rate=full,
        bandwidth=sheet.bandwidth * _TERA,
        cache_bandwidth=sheet.cache_bandwidth * _TERA,
        cache_bytes=sheet.cache * _KIB * _KIB,
        launch_seconds=_GPU_LAUNCH_SECONDS,
        shared_bytes=triton_limits.limits_of(f"{name} ({capability[0]}.{capability[1]})").shared_bytes,
        registers=_GPU_REGISTERS,
    )


def _scaled(sheet: _Sheet, units: int) -> _Sheet:
    return _Sheet(*(value * units for value in dataclasses.astuple(sheet)))
