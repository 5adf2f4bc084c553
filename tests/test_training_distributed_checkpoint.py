"""Checkpoints across ranks: another number of them goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this PyTorch has no gloo"),
]

SCRIPT = Path(__file__).parent / "distributed" / "checkpoints.py"
STEPS = 12


def torchrun(ranks: int, *arguments: object) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [str(SCRIPT), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            _, errors = process.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail(f"did not end in time: {process.communicate()[1]}")
    assert process.returncode == 0, errors


def weights(file: Path) -> dict[str, torch.Tensor]:
    return {name.removeprefix("module."): value for name, value in load_file(file).items()}


def assert_alike(one: Path, other: Path, tolerance: float) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        if tensor.is_floating_point():
            assert torch.allclose(tensor, second[name], rtol=0, atol=tolerance), name
        else:
            assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_another_number_of_ranks_goes_on(kind: str, tmp_path: Path) -> None:
    torchrun(2, tmp_path / "unbroken", kind, 0, STEPS, tmp_path / "unbroken.safetensors")
    place = 0
    for ranks, end in ((2, 4), (1, 8), (4, STEPS)):
        torchrun(ranks, tmp_path / "broken", kind, place, end, tmp_path / "broken.safetensors")
        place = end
    # Sums over ranks round otherwise: in float64 that is 1e-16 of weights of about 1, which AdamW's ratio may enlarge.
    assert_alike(tmp_path / "unbroken.safetensors", tmp_path / "broken.safetensors", 1e-9)
