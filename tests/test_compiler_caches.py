"""Inductor's caches between processes: what the passes make must be cacheable, and the same in every process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import padst_compile

ROOT = Path(padst_compile.__file__).parent.parent

_COMPILE = """
import json

import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

import padst_compile as padst
from padst_compile.backend import padst as backend


class Model(nn.Module):
    # Patches that the passes unfold, both kinds of GELU that they rewrite, and sparse layers of which one runs dense.
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 64, 8, stride=8)
        self.norm, self.head = nn.LayerNorm(64), nn.Linear(64, 32)
        self.first, self.second = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, images):
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = x + self.second(F.gelu(self.first(self.norm(x)), approximate="tanh"))
        return F.gelu(self.head(x), approximate="tanh")


def result(dtype, kernels, training):
    torch.manual_seed(0)
    model = padst.sparsify(
        Model().to(dtype), padst.SparsitySpec("block:16", sparsity=0.75, permutation="random", targets=("first", "second"))
    )
    torch._dynamo.reset()
    compiled = torch.compile(model.train(training), backend=backend, options={"kernels": kernels})
    with torch.set_grad_enabled(training):
        y = compiled(torch.randn(2, 3, 16, 16, dtype=dtype))
    if training:
        y.sum().backward()
        y = model.first.values.grad
    return y.double().sum().item()


cases = (torch.bfloat16, "measure", False), (torch.float32, "dense", False), (torch.float32, "sparse", True)
results = [result(*case) for case in cases]
print(json.dumps({"results": results, **{name: counters[name] for name in ("inductor", "aot_autograd")}}))
"""


@pytest.mark.slow
def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    first, second = (_run(environment) for _ in range(2))
    assert second["results"] == first["results"]
    assert first["aot_autograd"]["autograd_cache_miss"] == second["aot_autograd"]["autograd_cache_hit"] == 3
    assert first["inductor"]["fxgraph_cache_miss"] == second["inductor"]["fxgraph_cache_hit"] == 4  # two graphs for training
    for counters in (first, second):
        assert "fxgraph_cache_bypass" not in counters["inductor"]
        assert "autograd_cache_bypass" not in counters["aot_autograd"]
    assert "fxgraph_cache_miss" not in second["inductor"]
    assert "autograd_cache_miss" not in second["aot_autograd"]


@pytest.mark.slow
def test_other_sources_of_the_ops_compile_anew(tmp_path: Path) -> None:
    """A program of the last version would keep the last version's gradients."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    _run(environment)
    changed = "import padst_compile.backend\npadst_compile.backend.ops_version = lambda: 'another'\n"
    second = _run(environment, changed)
    assert second["aot_autograd"]["autograd_cache_miss"] == 3
    assert "autograd_cache_hit" not in second["aot_autograd"]


def _run(environment: dict[str, str], before: str = "") -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", before + _COMPILE],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    counters: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return counters
