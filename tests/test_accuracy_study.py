"""The accuracy study: its grid, its statistics, and a whole small study, interrupted and continued."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks" / "accuracy"
sys.path.insert(0, str(FOLDER))

from grid import TASKS, cells, methods  # type: ignore[import-not-found]  # noqa: E402  # beside the scripts
from report import write_report  # type: ignore[import-not-found]  # noqa: E402
from statistics_of_seeds import estimate, paired, separates  # type: ignore[import-not-found]  # noqa: E402


@pytest.mark.parametrize("size", TASKS)
def test_every_cell_is_a_training_run_of_its_own(size: str) -> None:
    found = list(cells(size, seeds=2))
    assert len({cell.name for cell in found}) == len(found)
    configs = [cell.config({"images": "i", "text": "t"}, 1, "cpu") for cell in found]
    assert len({json.dumps(config.to_dict(), sort_keys=True) for config in configs}) == len(found)
    for cell, config in zip(found, configs, strict=True):
        assert config.seed == cell.seed
        spec = config.final_sparsity
        assert (spec is None) == (cell.method.name == "dense")
        assert spec is None or spec.sparsity == pytest.approx(cell.sparsity)
    assert {cell.method.name for cell in found} == {method.name for method in methods()}


def test_an_interval_is_that_of_students_t() -> None:
    found = estimate([1.0, 2.0, 3.0])
    assert (found.mean, found.count) == (2.0, 3)
    assert found.half_width == pytest.approx(4.302652729911275 / math.sqrt(3))
    assert not estimate([1.0]).excludes_zero


def test_differences_are_taken_seed_by_seed() -> None:
    found = paired({0: 1.0, 1: 5.0, 2: 9.0}, {0: 0.5, 1: 4.5, 2: 8.5, 3: 100.0})
    assert found is not None
    assert (found.mean, found.half_width, found.excludes_zero) == (0.5, 0.0, True)
    assert paired({0: 1.0}, {1: 1.0}) is None


def test_a_task_tells_only_what_exceeds_two_intervals() -> None:
    assert separates([1.0, 1.1, 1.2], [3.0, 3.1, 3.2])
    assert not separates([1.0, 1.1, 1.2], [1.3, 1.4, 1.5])


def test_the_report_names_controls_and_marks_differences(tmp_path: Path) -> None:
    def row(method: str, seed: int, value: float) -> dict[str, object]:
        return {
            "cell": f"{method}{seed}", "task": "t", "metric": "loss", "method": method, "sparsity": 0.9, "seed": seed,
            "value": value, "compiled_agrees": True, "density": 0.1, "seconds": 1.0,
        }  # fmt: skip

    rows = [row("dense", seed, 1.0 + seed / 100) for seed in range(3)]
    for method, shift in (("static", 1.0), ("none", 0.9), ("random", 0.8), ("regroup", 0.7)):
        rows += [row(f"block:16 {method}", seed, 1.0 + shift + seed / 100 + shift * seed / 1000) for seed in range(3)]
    text = write_report(rows, tmp_path / "report.html").read_text()
    assert "The task tells" in text
    assert "-0.1001 ± 0.0002 *" in text  # regroup against random
    assert "<td>block:16 static</td><td>2.0110" in text


@pytest.mark.slow
def test_a_study_goes_on_where_it_stopped(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question. " * 200)
    out = tmp_path / "study"
    command = ["--text", str(text), "--out", str(out), "--grid", "tiny", "--seeds", "1", "--sparsity", "0.9", "--threads", "1"]
    first = _study(*command, "--only", "dense", "block-16 static")
    assert first.count("gpt-tiny/") == 2
    results = out / "results.jsonl"
    before = results.read_text()
    results.write_text(before + '{"cell": "cut o')  # killed while writing
    second = _study(*command, "--only", "dense", "block-16 regroup")
    assert second.count("gpt-tiny/") == 1
    assert results.read_text().startswith(before)
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [row["method"] for row in rows] == ["dense", "block:16 static", "block:16 regroup"]
    assert all(row["compiled_agrees"] for row in rows)
    assert "block:16 regroup" in (out / "report.html").read_text()


def _study(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(FOLDER / "study.py"), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
