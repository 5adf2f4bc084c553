"""What a result was measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from padst_compile.autotune.environment import cpu_name
from padst_compile.kernels import native


def describe_machine() -> dict[str, Any]:
    """Processor, versions and threads, as JSON."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "vector": torch.backends.cpu.get_cpu_capability(),
        "amx": cpu_has("amx_bf16"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "native_kernels": native.load(),
    }


def cpu_has(flag: str) -> bool:
    """Whether the processor reports a feature flag (Linux)."""
    return flag in _cpuinfo("flags").split()


def _cpuinfo(field: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")
