"""The Triton kernels compiled for GPUs that are not there: the default tile of every problem, and the check itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from padst_compile.kernels import triton_support

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden" / "offline.json"

pytestmark = pytest.mark.skipif(not triton_support.installed(), reason="there is no Triton on this system")


# Kept between runs, like the native builds.
CACHE = ROOT / ".cache" / "triton"


def offline(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the check in a process whose Triton compiles, unlike the interpreter of these tests."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(CACHE)}
    command = [sys.executable, "-m", "padst_compile.kernels.offline", "--workers", "1", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("target", "only"), [("sm_90", ""), ("sm_80", "bias+gelu"), ("sm_100", "bias+gelu")])
def test_default_tiles_compile_as_recorded(target: str, only: str) -> None:
    result = offline("--first", "--target", target, "--only", only, "--golden", str(GOLDEN))
    assert result.returncode == 0, result.stdout + result.stderr


TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
_PARTS = 30  # some 15 kernels of each architecture


@pytest.mark.parametrize(("number", "target"), list(enumerate(TARGETS)))
def test_some_of_the_tiles_that_a_tuner_may_choose_are_as_claimed(number: int, target: str) -> None:
    """Other tiles for each architecture; `make kernels-offline` has them all."""
    part = f"{1 + 7 * number}/{_PARTS}"
    result = offline("--target", target, "--part", part, "--golden", str(GOLDEN))
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{target}: 0 kernels" not in result.stdout


UNRECORDED = "bfloat16 bias+silu+gate"  # compiles fast


def test_a_version_of_triton_that_is_not_recorded_is_no_failure_and_is_said_once(tmp_path: Path) -> None:
    golden = tmp_path / "golden.json"
    golden.write_text('{"1.0": {"sm_80": {"gone": ""}}}')
    targets = ["--target", "sm_80", "--target", "sm_90"]
    arguments = ["--first", *targets, "--only", UNRECORDED, "--only", "block", "--golden", str(golden)]
    result = offline(*arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("is not recorded, but 1.0: ") == 1
    assert "sm_90: 1 kernels, 0 faults, 0 changes" in result.stdout
    assert json.loads(golden.read_text()) == {"1.0": {"sm_80": {"gone": ""}}}

    assert offline(*arguments, "--record").returncode == 0
    golden.write_text(golden.read_text().replace(" registers", "1 registers"))
    changed = offline(*arguments)
    assert changed.returncode == 1 and "sm_90: 1 kernels, 0 faults, 1 changes" in changed.stdout


FAULTY = """
import dataclasses, sys
from padst_compile.kernels import offline

case = next(iter(offline.all_cases("sm_80")))
found = offline.examine(dataclasses.replace(case, product="wgmma"), "sm_80")
print(found.faults)
arguments = {**case.launch.arguments, "TOKENS": 256, "OUTPUTS": 128, "DEPTH": 128, "ROWS": 128, "COLUMNS": 128}
launch = dataclasses.replace(case.launch, arguments=arguments)
print(offline.examine(dataclasses.replace(case, launch=launch, product=None), "sm_80").faults)
hopper = next(iter(offline.all_cases("sm_90")))
deep = offline.examine(dataclasses.replace(hopper, depth=hopper.tile.stages + 1, carried=True), "sm_90")
print(deep.faults)
launch = dataclasses.replace(case.launch, arguments={**case.launch.arguments, "ACTIVATION": "tanh"})
print(offline.examine(dataclasses.replace(case, launch=launch), "sm_80").faults)
gather = next(case for case in offline.all_cases("sm_80") if case.problem.kernel == "diagonal_forward")
print(offline.examine(dataclasses.replace(gather, vector_loads=True), "sm_80").faults)
good = offline.examine(case, "sm_80")
print(good.faults)
golden = offline.recorded([good])
print(len(offline.differences([good], golden, True)), len(offline.differences([good], {}, True)))
print(len(offline.differences([good], {case.subject: "1 register", "gone": ""}, True)))
print(len(offline.differences([good], {**golden, "gone": ""}, False)))
"""


def test_faults_are_noticed() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(CACHE)}
    result = subprocess.run(
        [sys.executable, "-c", FAULTY], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    instruction, sizes, pipeline, broken, gather, good, same, changed, subset = result.stdout.splitlines()
    assert "no wgmma, but mma" in instruction
    assert "registers spill" in sizes and "shared memory" in sizes
    assert "a pipeline of depth 3, not 4" in pipeline and "no tile of the next step in registers" in pipeline
    assert "does not compile" in broken
    assert "no loads of 16 bytes" in gather
    assert (good, same, changed, subset) == ("()", "0 1", "2", "0")
