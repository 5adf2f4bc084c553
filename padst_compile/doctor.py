"""What this machine can do for sparse models, and what to install for the rest."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import platform
import shutil
from typing import Any, Literal, TypeAlias

import torch

from padst_compile.autotune.cache import cache_folder
from padst_compile.autotune.environment import cpu_name
from padst_compile.benchmarking.machine import cpu_has
from padst_compile.files import make_private
from padst_compile.kernels import native

Status: TypeAlias = Literal["ok", "missing", "note"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One fact about this machine.

    Args:
        topic: what was looked at.
        status: "ok", "missing" (something works slower or not at all), or "note".
        detail: what was found.
        fix: what to do about a missing thing; empty otherwise.
    """

    topic: str
    status: Status
    detail: str
    fix: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return dataclasses.asdict(self)


def examine() -> list[Finding]:
    """Everything `padst doctor` reports; builds the native kernels if they are not built yet."""
    return [_versions(), _compiler(), _processor(), _native(), *_micro_kernels(), _gpu(), _triton(), _cache(), *_packages()]


def _versions() -> Finding:
    return Finding("versions", "note", f"Python {platform.python_version()}, torch {torch.__version__}")


def _compiler() -> Finding:
    command = os.environ.get("CXX", "c++")
    path = shutil.which(command)
    if path is None:
        return Finding("C++ compiler", "missing", f"{command!r} not found", "install g++ (Debian: apt install g++), or set CXX")
    return Finding("C++ compiler", "ok", path)


def _processor() -> Finding:
    features = [name for name, flag in (("AVX2", "avx2"), ("AVX-512", "avx512f"), ("AVX512-BF16", "avx512_bf16"),
                ("AMX", "amx_bf16")) if cpu_has(flag)]  # fmt: skip
    return Finding("processor", "note", f"{cpu_name()} ({', '.join(features) or 'no vector extension reported'})")


def _native() -> Finding:
    if native.load():
        return Finding("native kernels", "ok", "built and loaded")
    reason = native.unavailable_reason() or "unknown reason"
    return Finding("native kernels", "missing", reason, "sparse layers use ATen until this is fixed")


def _micro_kernels() -> list[Finding]:
    findings = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        if native.supports("block", dtype):
            findings.append(Finding(f"block kernel, {name}", "ok", "GEMM micro-kernel available"))
        else:
            fix = "none on this processor; block layers in this dtype use ATen"
            findings.append(Finding(f"block kernel, {name}", "missing", "no GEMM micro-kernel", fix))
    return findings


def _gpu() -> Finding:
    if not torch.cuda.is_available():
        return Finding("GPU", "note", "none that torch can use")
    return Finding("GPU", "ok", f"{torch.cuda.get_device_name()}, capability {torch.cuda.get_device_capability()}")


def _triton() -> Finding:
    if importlib.util.find_spec("triton") is None:
        return Finding("Triton", "missing", "not installed", "pip install triton (Linux)")
    import triton

    return Finding("Triton", "ok", triton.__version__)


def _cache() -> Finding:
    folder = cache_folder()
    try:
        make_private(folder)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        return Finding("cache folder", "missing", f"{folder} is not writable", "set PADST_CACHE_DIR to a folder that is")
    return Finding("cache folder", "ok", str(folder))


def _packages() -> list[Finding]:
    findings = []
    for package in ("timm", "transformers"):
        if importlib.util.find_spec(package) is None:
            findings.append(Finding(package, "missing", "not installed", f"pip install padst_compile[{package}]"))
        else:
            findings.append(Finding(package, "ok", "installed"))
    return findings
