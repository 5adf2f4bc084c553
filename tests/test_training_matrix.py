"""The script that trains with every structure and permutation: what it runs, skips, records, and when it fails."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[1]
CELL = "gpt/block:16/none"


def matrix(out: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "training_matrix.py"), "--out", str(out)]
    command += ["--results", str(out / "matrix.json"), "--steps", "2", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)


def folder_of(out: Path) -> Path:
    return out / "gpt-block_16-none-2"


def keep(out: Path, passed: bool) -> None:
    """A finished run, as `padst train` leaves it."""
    scores = {"loss": 2.0, "accuracy": 0.5, "examples": 3}
    sizes = {"density": 0.1, "parameters": 9, "steps": 2, "seconds": 1.0}
    result = {"eager": scores, "compiled": scores, "logit_error": 1e-7, "bound": 1e-6, "passed": passed, **sizes}
    folder_of(out).mkdir(parents=True)
    (folder_of(out) / "result.json").write_text(json.dumps(result))


@pytest.mark.parametrize(("passed", "code"), [(True, 0), (False, 1)])
def test_finished_runs_are_skipped_and_a_difference_fails(tmp_path: Path, passed: bool, code: int) -> None:
    keep(tmp_path, passed)
    done = matrix(tmp_path, "--only", CELL, "--text", ROOT / "README.md")
    assert done.returncode == code, done.stdout + done.stderr
    assert "1 of 1 runs are finished" in done.stdout and CELL in done.stdout
    assert (f"1 compiled models differ from the eager ones: {CELL}" in done.stdout) == (not passed)
    recorded = json.loads((tmp_path / "matrix.json").read_text())
    (case,) = recorded["cases"]
    assert (case["cell"], case["passed"], case["structure"], recorded["steps"]) == (CELL, passed, "block:16", 2)


def test_a_run_that_fails_is_shown_and_fails(tmp_path: Path) -> None:
    done = matrix(tmp_path, "--only", CELL, "--text", tmp_path / "missing.txt")
    assert done.returncode == 1
    assert f"{CELL} failed" in done.stdout and "missing.txt" in done.stdout
    assert json.loads((tmp_path / "matrix.json").read_text())["cases"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "gpt/block:64/none"], "names are like vit/block:16/none"),
        (["--only", "unstructured/regroup"], "no run is called"),
        (["--text", "README.md"], "give --images"),
        (["--only", "gpt/*"], "give --text"),
    ],
)
def test_what_cannot_be_run_is_said(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = matrix(tmp_path, *arguments)
    assert done.returncode == 1 and message in done.stderr


@pytest.mark.slow
def test_a_run_trains_compiles_and_is_recorded(tmp_path: Path) -> None:
    done = matrix(tmp_path, "--only", CELL, "--text", ROOT / "README.md")
    assert done.returncode == 0, done.stdout + done.stderr
    (case,) = json.loads((tmp_path / "matrix.json").read_text())["cases"]
    assert case["passed"] and 0 <= case["logit_error"] <= case["bound"]
    assert case["eager"]["examples"] == case["compiled"]["examples"] > 0
    assert (folder_of(tmp_path) / "result.json").exists()
