"""Other libraries as peers of a layer, each in a process that finds its packages before those of this environment.

What a library needs is installed from PyPI into build/peers/LIBRARY, when a benchmark is asked for it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers import Layer

from padst_compile.autotune.effort import Budget
from padst_compile.autotune.machine import cpu_cache_bytes
from padst_compile.autotune.measure import raced_samples

# What pip is asked for. sparselab needs torch, which is here.
REQUIREMENTS: Mapping[str, tuple[str, ...]] = {
    "onnxruntime": ("onnxruntime", "onnx"),
    "deepsparse": ("deepsparse==1.8.0",),
    "sparselab": ("sparselab", "--no-deps"),
}
INSTALLED = Path(__file__).resolve().parents[1] / "build" / "peers"
_PROGRAM = Path(__file__).parent / "foreign_process.py"
_GONE = "the process ended without an answer"
_ONE_ROUND = Budget(None, 1, 0.0)
_FLUSH = 2  # times the size of the cache, as between our own candidates


class ForeignError(RuntimeError):
    """Why a library does not take part."""


def install(library: str) -> None:
    """Make a library available, unless it is already.

    Raises:
        ForeignError: it does not install here, with pip's last words.
    """
    target = INSTALLED / library
    if target.exists():
        return
    INSTALLED.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=INSTALLED) as draft:
        pip = (
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--target",
            f"{draft}/packages",
        )
        done = subprocess.run([*pip, *REQUIREMENTS[library]], check=False, capture_output=True, text=True)
        if done.returncode:
            raise ForeignError(f"does not install: {(done.stderr.strip() or 'no reason').splitlines()[-1]}")
        (Path(draft) / "packages").rename(target)


class Foreign:
    """A layer in another library, until it is closed.

    Args:
        library: one of `REQUIREMENTS`.
        layer: float32, on the CPU.

    Raises:
        ForeignError: the library does not take the layer, or does not run here.
    """

    def __init__(self, library: str, layer: Layer) -> None:
        if layer.x.dtype != torch.float32:
            raise ForeignError("float32 alone")
        self._open = ExitStack()
        self.library = library
        try:
            folder = Path(self._open.enter_context(tempfile.TemporaryDirectory()))
            for name, tensor in (("weight", layer.weight), ("bias", layer.bias), ("x", layer.x)):
                np.save(folder / f"{name}.npy", tensor.numpy())
            self._process = self._open.enter_context(self._start(folder))
            self.version: str = self._answer()["version"]
            self.result = torch.from_numpy(np.load(folder / "y.npy"))
        except BaseException:
            self._open.close()
            raise

    def close(self) -> None:
        """End the process, which ends with its input."""
        self._open.close()

    def seconds(self) -> float:
        """Of one call with a cold cache."""
        try:
            os.write(self._process.stdin.fileno(), f"{_FLUSH * cpu_cache_bytes()}\n".encode())  # nothing stays in a buffer
        except OSError:
            raise ForeignError(_GONE) from None
        return float(self._answer()["seconds"])

    def _start(self, folder: Path) -> subprocess.Popen[str]:
        paths = [str(INSTALLED / self.library), os.environ.get("PYTHONPATH")]
        return subprocess.Popen(
            [sys.executable, _PROGRAM, self.library, folder],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": _GONE}
        if "error" in answer:
            raise ForeignError(answer["error"])
        return answer


def in_turns(ours: Mapping[str, Callable[[], Any]], foreign: Mapping[str, Foreign], budget: Budget) -> dict[str, list[float]]:
    """Seconds of every call with a cold cache; in each round all of ours run, then every foreign one.

    Args:
        ours: candidates of this process, on the CPU.
        foreign: by name.
        budget: how often, and for how long.
    """
    samples: dict[str, list[float]] = {name: [] for name in (*ours, *foreign)}
    deadline = time.perf_counter() + budget.seconds
    for _ in range(budget.repetitions):
        for name, times in raced_samples(ours, "cpu", _ONE_ROUND).items():
            samples[name] += times
        for name, peer in foreign.items():
            samples[name].append(peer.seconds())
        if time.perf_counter() > deadline:
            break
    return samples
