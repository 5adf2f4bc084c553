"""What a result was measured on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from padst_compile.autotune.environment import cpu_name
from padst_compile.kernels import native

_PACKAGES = ("triton", "timm", "transformers")


def describe_machine() -> dict[str, Any]:
    """Processor, versions and threads, as JSON; None for what is not there."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "vector": torch.backends.cpu.get_cpu_capability(),
        "amx": cpu_has("amx_bf16"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: _version(package) for package in _PACKAGES},
        "compiler": _compiler(),
        "native_kernels": native.load(),
    }


def cpu_has(flag: str) -> bool:
    """Whether the processor reports a feature flag (Linux)."""
    return flag in _cpuinfo("flags").split()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _compiler() -> str | None:
    """What the C++ compiler calls itself, which builds the native kernels."""
    command = [os.environ.get("CXX", "c++"), "--version"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def _cpuinfo(field: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")
