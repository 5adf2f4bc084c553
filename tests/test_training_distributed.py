"""Training on several ranks: real processes with gloo, which run `distributed/agreement.py` once for each number of ranks."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path

import pytest
import torch

from padst_compile.testing.ranks import crashed_in_collective, torchrun

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
    "fsdp and others",
    "hsdp block rigl",
    "fsdp accumulates",
    "fsdp accumulates in another dtype",
    "hsdp accumulates without all-reduce",
)


@functools.cache
def results(ranks: int) -> dict[str, str | None]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.json"
        torchrun(FOLDER / "agreement.py", ranks, file)
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
    torchrun(FOLDER / "compiled.py", 2, tmp_path / "results.json")
    found: dict[str, str | None] = json.loads((tmp_path / "results.json").read_text())
    assert found
    assert all(problem is None for problem in found.values()), "\n".join(filter(None, found.values()))


STACK = """\
Fatal Python error: Segmentation fault

Thread 0x00007f16fbdc5b80 (most recent call first):
  File "{inner}", line 926 in redispatch
  File "/usr/lib/python3/site-packages/torch/_library/autograd.py", line 43 in redispatch_no_grad
  File "/usr/lib/python3/site-packages/torch/distributed/_functional_collectives.py", line 143 in wait_tensor
  File "/home/me/tests/distributed/agreement.py", line 100 in _feed
"""


def test_only_a_crash_inside_a_collective_is_put_down_to_pytorch() -> None:
    assert crashed_in_collective(STACK.format(inner="/usr/lib/python3/site-packages/torch/_ops.py"))
    assert not crashed_in_collective(STACK.format(inner="/home/me/padst_compile/kernels/ops.py"))
    assert not crashed_in_collective(STACK.replace("wait_tensor", "all_reduce"))


def test_a_job_that_crashes_elsewhere_fails(tmp_path: Path) -> None:
    script = tmp_path / "crash.py"
    script.write_text("import ctypes, faulthandler\nfaulthandler.enable()\nctypes.string_at(0)\n")
    with pytest.raises(AssertionError, match="Segmentation fault"):
        torchrun(script, 1)


def test_a_job_that_pytorch_crashes_runs_once_more(tmp_path: Path) -> None:
    script, inner = tmp_path / "crash.py", "/usr/lib/python3/site-packages/torch/_ops.py"
    script.write_text(
        "import pathlib, sys\nruns = pathlib.Path(sys.argv[1])\nwith runs.open('a') as file:\n    file.write('+')\n"
        f"sys.stderr.write({STACK.format(inner=inner)!r})\nsys.exit(len(runs.read_text()) < int(sys.argv[2]))\n"
    )
    with pytest.warns(RuntimeWarning, match=r"crash\.py.*runs again"):
        torchrun(script, 1, tmp_path / "twice", 2)
    with pytest.raises(AssertionError, match="wait_tensor"), pytest.warns(RuntimeWarning):
        torchrun(script, 1, tmp_path / "never", 3)
    assert (tmp_path / "twice").read_text() == (tmp_path / "never").read_text() == "++"
