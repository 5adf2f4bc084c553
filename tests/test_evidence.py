"""The page of recorded results, and the gate that new results must pass."""

from __future__ import annotations

import html
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
RESULTS = BENCHMARKS / "results"


def script(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, BENCHMARKS / name, *arguments]
    return subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)


def test_the_page_shows_every_recorded_case(tmp_path: Path) -> None:
    done = script("evidence.py", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    page = html.unescape((tmp_path / "index.html").read_text())
    models = json.loads((RESULTS / "cpu-models.json").read_text())["comparisons"]
    kernels = json.loads((RESULTS / "cpu-kernels.json").read_text())
    assert all(case["model"] in page for case in models)
    assert page.count("<td>768 -> 3072, ") + page.count("<td>3072 -> 768, ") >= len(kernels["cases"])
    assert kernels["machine"]["torch"] in page
    best, ours = models[0]["milliseconds"]["dense freezing"], models[0]["milliseconds"]["padst"]
    assert f"{min(best, models[0]['milliseconds']['dense default']) / ours:.2f}x" in page
    assert (tmp_path / "cpu-models.png").read_bytes().startswith(b"\x89PNG")
    mlp = json.loads((RESULTS / "cpu-mlp.json").read_text())["cases"][0]
    assert f"<td>{mlp['two'] / mlp['one']:.2f}</td>" in page
    missing = [path.name for path in RESULTS.iterdir() if f"<code>{path.name}</code>" not in page]
    assert missing == []
    assert "http" not in page.replace("http://www.w3.org", "")  # loads nothing


def slower(folder: Path) -> None:
    """Our first model takes half as long again."""
    path = folder / "cpu-models.json"
    data = json.loads(path.read_text())
    data["comparisons"][0]["milliseconds"]["padst"] *= 1.5
    path.write_text(json.dumps(data))


def nothing(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def unchanged(_: Path) -> None:
    pass


def elsewhere(folder: Path) -> None:
    """The models were measured on another processor."""
    path = folder / "cpu-models.json"
    data = json.loads(path.read_text())
    data["machine"]["cpu"] = "Another Processor"
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (unchanged, 0, "0 fell"),
        (slower, 1, "1 fell by more than 10%"),
        (nothing, 1, "no case in common"),
        (elsewhere, 0, "new on Another Processor"),
    ],
)
def test_the_gate_lets_through_what_is_no_slower(tmp_path: Path, change, code: int, message: str) -> None:
    new = tmp_path / "new"
    shutil.copytree(RESULTS, new)
    change(new)
    done = script("gate.py", new)
    assert done.returncode == code, done.stdout + done.stderr
    assert message in done.stdout
    assert ("cpu-models.json: recorded on" in done.stdout) == (change is elsewhere)


def test_trainings_with_learned_permutations_have_ratios_of_their_own(tmp_path: Path) -> None:
    """One model and structure under several permutations are several rows for the gate, and one cannot hide another."""
    data = json.loads((RESULTS / "cpu-training.json").read_text())
    first = {**data["cases"][0], "speedup": 2.0}
    old, new = tmp_path / "old", tmp_path / "new"
    for folder, slowest in ((old, 2.0), (new, 1.0)):
        speedups = {"none": 2.0, "autoshuffle": slowest, "regroup": 2.0, "random": 2.0}
        cases = [{**first, "permutation": order, "speedup": speedup} for order, speedup in speedups.items()]
        folder.mkdir()
        (folder / "cpu-training.json").write_text(json.dumps({**data, "cases": cases}))
    done = script("gate.py", new, "--recorded", old)
    assert done.returncode == 1 and "1 fell by more than 10%" in done.stdout
    assert "autoshuffle" in done.stdout


@pytest.mark.parametrize("name", ["layers.py", "training.py"])
def test_results_can_be_written_elsewhere_than_over_the_recorded_ones(name: str) -> None:
    assert "--out" in script(name, "--help").stdout
