"""Builds the C++ kernels at first use, keeps them in a per-user cache, and says what is missing where that fails.

Environment:
    PADST_NATIVE=0             never use them.
    PADST_CACHE_DIR            cache folder, instead of the user's.
    PADST_FORCE_NO_BRGEMM=1    behave as on a CPU without ATen's GEMM micro-kernel, which block layers need.
"""

from __future__ import annotations

import functools
import hashlib
import os
import pathlib
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import filelock
import platformdirs
import torch

from padst_compile.files import make_private
from padst_compile.kernels.native import fakes

_FOLDER = pathlib.Path(__file__).parent
_NAME = "padst_native"
_LIBRARY = f"{_NAME}.so"
_DIGEST = f"{_NAME}.sha256"
_KINDS = ("block", "nm", "diagonal")
# The second set is for compilers that cannot name, or assemblers that do not know, this machine.
_FLAG_SETS = (("-O3", "-march=native", "-fopenmp"), ("-O3", "-fopenmp"))
_BUILD_SECONDS = 600.0

_lock = threading.RLock()
_loaded: bool | None = None
_reason: str | None = None
_warned = False


class NativeKernelsUnavailable(UserWarning):
    """The C++ kernels cannot be used here, so the slower ATen path runs."""


class _BuildError(Exception):
    """Why there is no library, in words for the user."""


def load() -> bool:
    """Makes `torch.ops.padst_native` available: from the cache, or by compiling it (about 20 s, once per machine).

    Safe to call from several threads and processes at once. Warns once per process where it fails.

    Returns:
        Whether the operators are there. The first answer holds for the life of the process.
    """
    global _loaded, _reason
    with _lock:
        if _loaded is None:
            try:
                _load_library()
                fakes.register(_NAME)
                _loaded = True
            except _BuildError as error:
                _loaded, _reason = False, str(error)
                _warn_once(str(error))
        return _loaded


def unavailable_reason() -> str | None:
    """What keeps the kernels from being used, or None where they are loaded or nothing has asked for them yet."""
    return _reason


def interleaves(dtype: torch.dtype) -> bool:
    """Whether `block_linear` should be given blocks from `interleave_blocks`; False where the library is not loaded."""
    return bool(_loaded) and bool(torch.ops.padst_native.block_linear_interleaves(dtype))


def supports(kind: str, dtype: torch.dtype) -> bool:
    """Whether there is a kernel for a structure and a dtype on this CPU; False where the library is not loaded.

    Args:
        kind: `Structure.kind`: "block", "nm" or "diagonal"; any other has no native kernel.
        dtype: of activations and values.
    """
    if kind not in _KINDS or not _loaded:
        return False
    supported = _supports(kind, dtype)
    if not supported and kind == "block" and not _supports(kind, torch.float32):
        _warn_once("this CPU, or this build of PyTorch, has no GEMM micro-kernel (oneDNN brgemm) for block layers")
    return supported


@functools.cache
def source_hash() -> str:
    """A short hash of the C++ sources: what was measured with other sources is out of date."""
    digest = hashlib.sha256()
    for path in sorted([*_FOLDER.glob("*.cpp"), *_FOLDER.glob("*.h")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@functools.cache
def _supports(kind: str, dtype: torch.dtype) -> bool:
    if kind == "block" and os.environ.get("PADST_FORCE_NO_BRGEMM") == "1":
        return False
    return bool(getattr(torch.ops.padst_native, f"{kind}_linear_supports")(dtype))


def _warn_once(reason: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"native CPU kernels are unavailable: {reason}. Sparse layers on the CPU run through ATen instead, several times "
            "slower. Needed: g++ or clang++ (CXX names another), ninja, and a CPU with AVX2 or better.",
            NativeKernelsUnavailable,
            stacklevel=3,
        )


def _load_library() -> None:
    """Loads the operators.

    Raises:
        _BuildError: there is no usable library and none could be built.
    """
    if os.environ.get("PADST_NATIVE") == "0":
        raise _BuildError("PADST_NATIVE=0 turns them off")
    compiler = _compiler()
    root = _cache_root()
    folder = root / _key(compiler)
    if _load_cached(folder):
        return
    try:
        with filelock.FileLock(root / f"{folder.name}.lock", timeout=_BUILD_SECONDS, mode=0o600):
            if not _load_cached(folder):
                _build(folder)
    except filelock.Timeout:
        raise _BuildError(f"another process has been building them for {_BUILD_SECONDS:.0f} s in {root}") from None
    except OSError as error:
        raise _BuildError(f"the cache folder {root} cannot be used ({error}); PADST_CACHE_DIR names another") from error


def _compiler() -> str:
    """The path of the C++ compiler that PyTorch's extension builder will call; the builder quotes it as one word."""
    command = os.environ.get("CXX", "c++")
    path = shutil.which(command)
    if path is None and len(command.split()) > 1:
        raise _BuildError(f"CXX is {command!r}, but PyTorch's builder takes no arguments there: name a script that passes them")
    if path is None:
        raise _BuildError(f"there is no C++ compiler ({command!r} was not found)")
    return path


def _cache_root() -> pathlib.Path:
    """The folder of all builds: created private, and refused where others could plant a library in it."""
    base = os.environ.get("PADST_CACHE_DIR") or platformdirs.user_cache_dir("padst_compile")
    root = pathlib.Path(base) / "native"
    try:
        make_private(root)
        status, above = root.stat(), root.parent.stat()
    except OSError as error:
        raise _BuildError(f"the cache folder {root} cannot be created ({error}); PADST_CACHE_DIR names another") from error
    planted = hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & 0o022)
    exchanged = above.st_mode & stat.S_IWOTH and not above.st_mode & stat.S_ISVTX
    if planted or exchanged:
        open_to_others = root if planted else root.parent
        raise _BuildError(
            f"the cache folder {open_to_others} can be written by others, who could put a library of theirs there; make it "
            "yours alone (chmod go-w), or let PADST_CACHE_DIR name another"
        )
    return root


def _key(compiler: str) -> str:
    """Names everything that the machine code depends on."""
    parts = (source_hash(), torch.__version__, compiler, _compiler_version(compiler), _cpu(), repr(_FLAG_SETS))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


def _compiler_version(compiler: str) -> str:
    try:
        answer = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise _BuildError(f"the C++ compiler {compiler} does not answer --version ({error})") from error
    return answer.stdout


def _cpu() -> str:
    """Name and instruction sets of the CPU: code for one need not run on another that shares the cache folder."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    names = ("model name", "flags", "Features", "CPU part")
    found = {line.split(":")[0].strip(): line for line in reversed(lines) if line.startswith(names)}
    return "\n".join([platform.machine(), *(found[name] for name in sorted(found))])


def _load_cached(folder: pathlib.Path) -> bool:
    """Loads the library in `folder`; False where there is none or it is damaged."""
    library = folder / _LIBRARY
    try:
        if hashlib.sha256(library.read_bytes()).hexdigest() != (folder / _DIGEST).read_text():
            return False
        torch.ops.load_library(str(library))
    except OSError:
        return False
    return True


def _build(folder: pathlib.Path) -> None:
    """Compiles and loads the library, then publishes it as `folder`. The caller holds the lock of `folder`."""
    for stale in folder.parent.glob(f"{folder.name}.*-build"):  # of processes that were killed
        shutil.rmtree(stale, ignore_errors=True)
    workspace = pathlib.Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix="-build", dir=folder.parent))
    try:
        library = _compile(workspace)
        published = workspace / "published"
        published.mkdir(mode=0o700)
        (published / _DIGEST).write_text(hashlib.sha256(library.read_bytes()).hexdigest())
        for file in (library, published / _DIGEST):
            file.chmod(0o600)  # whatever the umask is; loading asks for no right to execute
        library.replace(published / _LIBRARY)
        shutil.rmtree(folder, ignore_errors=True)
        published.replace(folder)
    finally:
        shutil.rmtree(workspace, ignore_errors=True)


def _compile(workspace: pathlib.Path) -> pathlib.Path:
    """The library, compiled in `workspace` and loaded."""
    from torch.utils import cpp_extension

    failure: Exception | None = None
    for attempt, flags in enumerate(_FLAG_SETS):
        folder = workspace / str(attempt)
        folder.mkdir()
        try:
            with _ninja_on_path():
                cpp_extension.load(
                    name=_NAME,
                    sources=[str(path) for path in sorted(_FOLDER.glob("*.cpp"))],
                    extra_cflags=list(flags),
                    extra_ldflags=["-fopenmp"],
                    build_directory=str(folder),
                    is_python_module=False,
                )
            return folder / _LIBRARY
        except (RuntimeError, OSError, ImportError, subprocess.SubprocessError) as error:
            failure = error
    raise _BuildError(f"they did not compile: {_summary(failure)}") from failure


@contextmanager
def _ninja_on_path() -> Iterator[None]:
    """Lets the builder find a ninja that was installed beside this interpreter, where its folder is not on PATH."""
    before = os.environ.get("PATH", "")
    if shutil.which("ninja") is None:
        os.environ["PATH"] = os.pathsep.join([before, str(pathlib.Path(sys.executable).parent)])
    try:
        yield
    finally:
        os.environ["PATH"] = before


def _summary(failure: Exception | None) -> str:
    """The first error of a compiler's output, or the first line of any other message."""
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
    return next((line for line in lines if "error:" in line), lines[0] if lines else repr(failure))
