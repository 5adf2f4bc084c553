"""Training on several ranks: real processes with gloo, which run `distributed/agreement.py` once for each number of ranks."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this PyTorch has no gloo")

FOLDER = Path(__file__).parent / "distributed"
SCENARIOS = (
    "ddp block rigl",
    "ddp nm rigl regroup",
    "ddp block rigl regroup output",
    "ddp block set autoshuffle",
    "ddp diagonal mest sinkhorn",
    "ddp block rigl sinkhorn output",
    "ddp block magnitude",
    "ddp diagonal dynadiag",
    "fsdp block rigl",
    "fsdp even block rigl",
    "fsdp root nm rigl regroup",
    "fsdp unstructured set",
    "fsdp block set autoshuffle output",
    "fsdp diagonal mest sinkhorn",
    "fsdp block magnitude",
    "fsdp diagonal dynadiag",
    "fsdp bfloat16 block rigl sinkhorn",
    "fsdp bfloat16 diagonal dynadiag",
    "different models",
    "one rank sees nan",
    "tensor parallel",
)


def torchrun(ranks: int, script: str, *arguments: str, restarts: int = 0) -> str:
    """What a script writes to stderr, run on so many ranks; fails with it if the script does."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return run([*command, f"--max-restarts={restarts}", str(FOLDER / script), *arguments])


def run(command: Sequence[str]) -> str:
    """Run a command in a process group of its own, which is killed as a whole after three minutes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER.parents[1])}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            _, errors = process.communicate(timeout=180)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail(f"{' '.join(command)} did not end in time: {process.communicate()[1]}")
    assert process.returncode == 0, errors
    return errors


@functools.cache
def results(ranks: int) -> dict[str, str | None]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.json"
        torchrun(ranks, "agreement.py", str(file))
        found: dict[str, str | None] = json.loads(file.read_text())
        return found


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_ranks_agree_and_two_compute_what_one_does(scenario: str, ranks: int) -> None:
    assert results(ranks)[scenario] is None, results(ranks)[scenario]


@pytest.mark.slow
def test_every_scenario_is_named_here() -> None:
    assert tuple(results(2)) == SCENARIOS


@pytest.mark.slow
def test_compiled_models_train_as_eager_ones_and_no_update_compiles_anew(tmp_path: Path) -> None:
    torchrun(2, "compiled.py", str(tmp_path / "results.json"))
    found: dict[str, str | None] = json.loads((tmp_path / "results.json").read_text())
    assert found
    assert all(problem is None for problem in found.values()), "\n".join(filter(None, found.values()))
