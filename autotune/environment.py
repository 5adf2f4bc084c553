"""What a measurement holds for, besides the problem: the device, its threads, and the software."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import platform
from pathlib import Path

import torch

from padst_compile import registered
from padst_compile.kernels import native

_KERNELS = Path(native.__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Environment:
    """Whatever else could change the answer.

    Args:
        processor: name of the processor or GPU: an H100 and an H200 share their capability, not their speed.
        capability: its instruction set or compute capability.
        threads: of the CPU; 0 for a GPU.
        kernels: hash of the kernels' sources; behind it that of the code that others registered for the structure.
        torch: its version.
        triton: its version, empty where it is not installed.
    """

    processor: str
    capability: str
    threads: int
    kernels: str
    torch: str
    triton: str


def environment(device: str, structure: str = "") -> Environment:
    """Where this process runs, for a type of device and the short form of a structure."""
    threads = torch.get_num_threads() if device == "cpu" else 0
    found, version = _environment(device, threads), registered.version_of(structure.partition(":")[0])
    return dataclasses.replace(found, kernels=f"{found.kernels}-{version[:12]}") if version else found


@functools.cache
def cpu_name() -> str:
    """The processor's name, as far as the system tells."""
    try:
        with Path("/proc/cpuinfo").open() as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@functools.cache
def _environment(device: str, threads: int) -> Environment:
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        name, capability, sources = torch.cuda.get_device_name(), f"{major}.{minor}", _source_hash()
    else:
        name, capability = cpu_name(), f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
        sources = native.source_hash()
    return Environment(name, capability, threads, sources[:12], torch.__version__, _triton_version())


def _source_hash() -> str:
    """A hash of all Python sources of the kernels, Triton's among them."""
    digest = hashlib.sha256()
    for path in sorted(_KERNELS.rglob("*.py")):
        digest.update(path.relative_to(_KERNELS).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""
