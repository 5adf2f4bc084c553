"""The accuracy study: its grid, its statistics, its report, and whole small studies, interrupted, side by side, diverging."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from padst_compile.conversion import sparse_layers
from padst_compile.recipes.models import image_model, language_model
from padst_compile.recipes.run_folder import RunFolder
from padst_compile.recipes.session import Session
from padst_compile.recipes.tasks import make_task
from padst_compile.recipes.trained import load_trained

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks" / "accuracy"
sys.path.insert(0, str(FOLDER))

from cell_run import train_cell  # type: ignore[import-not-found]  # noqa: E402  # beside the scripts
from curves import at_time, read_curves  # type: ignore[import-not-found]  # noqa: E402
from grid import TASKS, cells, decides, methods  # type: ignore[import-not-found]  # noqa: E402
from report import write_report  # type: ignore[import-not-found]  # noqa: E402
from statistics_of_seeds import estimate, paired, separates  # type: ignore[import-not-found]  # noqa: E402
from values import control_of, equal_time  # type: ignore[import-not-found]  # noqa: E402


@pytest.mark.parametrize("size", TASKS)
def test_every_cell_is_a_training_run_of_its_own(size: str) -> None:
    found = list(cells(size, seeds=2))
    assert len({cell.name for cell in found}) == len(found)
    configs = [cell.config({"images": "i", "text": "t"}, 1, "cpu") for cell in found]
    runs = {(json.dumps(config.to_dict(), sort_keys=True), cell.source) for cell, config in zip(found, configs, strict=True)}
    assert len(runs) == len(found)
    for cell, config in zip(found, configs, strict=True):
        assert config.seed == cell.seed
        spec = config.final_sparsity
        assert (spec is None) == (cell.method.name == "dense")
        assert spec is None or spec.sparsity == pytest.approx(cell.sparsity)
    everywhere = methods() if size != "cpu" else filter(decides, methods())
    on_first_task = {cell.method.name for cell in found if cell.task is TASKS[size][0] and cell.sparsity == 0.9}
    fixed = {method.name for method in methods() if method.fixed not in (None, 0.9)}
    assert on_first_task == {method.name for method in methods()} - fixed
    assert {cell.method.name for cell in found} == on_first_task | {method.name for method in everywhere}


def test_the_methods_of_every_task_have_their_controls() -> None:
    deciding = {method.name for method in methods() if decides(method)}
    assert {"dense", "set", "block:16 static", "block:16 regroup", "diagonal regroup", "nm:1:20 regroup"} <= deciding
    for name in deciding:
        assert control_of(name, dict.fromkeys(deciding)) == control_of(name, dict.fromkeys(m.name for m in methods())) or (
            name.endswith(" none")  # whose control is a fixed topology, which the first task has
        )


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


def test_a_task_tells_only_what_exceeds_two_intervals_in_favour_of_dense() -> None:
    assert separates([1.0, 1.1, 1.2], [3.0, 3.1, 3.2], lower_is_better=True)
    assert not separates([1.0, 1.1, 1.2], [1.3, 1.4, 1.5], lower_is_better=True)
    assert not separates([1.0, 1.1, 1.2], [3.0, 3.1, 3.2], lower_is_better=False)


def test_every_permutation_has_its_control() -> None:
    """A random permutation for learned ones, none for random ones, a fixed topology for none."""
    names = {method.name for method in methods()}
    for name in names:
        structure, _, permutation = name.partition(" ")
        control = {"static": None, "none": "static", "random": "none"}.get(permutation, "random") if permutation else None
        if control is not None and not (structure.startswith("srigl") and permutation == "none"):
            assert control_of(name, dict.fromkeys(names)) == f"{structure} {control}"
    assert {"srigl:1:10 regroup", "nm:1:10:8 static", "nm:1:10 static"} <= names


def flops_of_training(task) -> int:
    """Of the forward passes of a cell's training, dense."""
    fields, counter = task.fields, FlopCounterMode(display=False)
    if task.kind == "text":
        model = language_model(fields["model"], classes=65, context=fields["context"], seed=0)
        inputs = torch.zeros(fields["batch"], fields["context"], dtype=torch.int64)
    else:
        model = image_model(fields["model"], classes=10, size=32, seed=0)
        inputs = torch.zeros(fields["batch"], 3, 32, 32)
    with counter, torch.no_grad():
        model(inputs)
    return counter.get_total_flops() * fields["steps"]


def test_cells_of_the_small_grid_are_small() -> None:
    """The text cell takes a minute or two of one thread; the others are of its size."""
    text, *images = (flops_of_training(task) for task in TASKS["cpu"])
    assert len(images) == 2
    assert all(found < 4 * text for found in images)


def row(method: str, seed: int, value: float | None, **more: object) -> dict[str, object]:
    return {
        "cell": f"{method}{seed}", "task": "t", "metric": "loss", "method": method, "sparsity": 0.9, "seed": seed,
        "value": value, "compiled_agrees": True, "density": 0.1, "seconds": 1.0, **more,
    }  # fmt: skip


def table_cells(page: str, method: str) -> list[str]:
    line = page.partition(f"<tr><td>{method}</td>")[2].partition("</tr>")[0]
    return line.removeprefix("<td>").removesuffix("</td>").split("</td><td>")


def test_the_report_names_controls_and_marks_differences(tmp_path: Path) -> None:
    rows = [row("dense", seed, 1.0 + seed / 100) for seed in range(3)]
    for method, shift in (("static", 1.0), ("none", 0.9), ("random", 0.8), ("regroup", 0.7)):
        rows += [row(f"block:16 {method}", seed, 1.0 + shift + seed / 100 + shift * seed / 1000) for seed in range(3)]
    rows += [row("diagonal static", seed, 1.02 + seed / 100) for seed in range(3)]
    text = write_report(rows, tmp_path / "report.html").read_text()
    assert "The task tells: dense is better by more than two intervals than block:16 static." in text
    assert "It does not tell: dense is no two intervals better than diagonal static." in text
    assert "-0.1001 ± 0.0002 *" in text  # regroup against random
    assert table_cells(text, "block:16 static")[0].startswith("2.0110")
    assert "after" not in text.partition("<table>")[2].partition("</tr>")[0]  # no row has curves


def curves(seconds: float, *values: float) -> dict[str, dict[str, list[float]]]:
    """Validations that are so many seconds apart, ten steps each."""
    validated = {
        "step": [10.0 * n for n, _ in enumerate(values, 1)],
        "seconds": [seconds * n for n, _ in enumerate(values, 1)],
        "value": list(values),
    }
    return {
        "logged": {**{k: v for k, v in validated.items() if k != "value"}, "loss": list(values), "penalty": list(values)},
        "validated": validated,
    }


def test_at_equal_time_a_slower_run_stands_where_it_was_when_the_fastest_ended(tmp_path: Path) -> None:
    rows = [
        row("dense", 0, 1.0, curves=curves(1.0, 3.0, 2.0, 1.0)),
        row("block:16 random", 0, 2.0, curves=curves(2.0, 6.0, 4.0, 2.0)),  # at 3 s halfway between 6 and 4
        row("block:16 regroup", 0, 2.0, curves=curves(4.0, 6.0, 4.0, 2.0)),  # not validated yet
    ]
    seconds, values = equal_time(rows)
    assert seconds == 3.0
    assert values == {"dense": {0: 1.0}, "block:16 random": {0: 5.0}}
    assert at_time(rows[1]["curves"], 100.0) == 2.0
    text = write_report(rows, tmp_path / "report.html").read_text()
    assert "loss after 3 s" in text
    assert table_cells(text, "block:16 random")[-2] == "5.0000 (1 seed)"
    assert table_cells(text, "block:16 regroup")[-2] == ""
    assert text.count("<img alt='curves of the runs'") == 1


def test_a_diverged_run_is_reported_and_left_out_of_means(tmp_path: Path) -> None:
    rows = [row("dense", 0, 1.0), row("dense", 1, 3.0)]
    rows += [{**row("dense", 2, None), "diverged": True}, {**row("set", 0, None), "diverged": True}]
    text = write_report(rows, tmp_path / "report.html").read_text()
    assert table_cells(text, "dense")[0].startswith("2.0000 ±")
    assert table_cells(text, "dense")[2] == "3, 1 diverged"
    assert table_cells(text, "set")[:3] == ["", "", "1, 1 diverged"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("to be or not to be, that is the question. " * 200)
    return path


def cell_of(method: str):
    return next(cell for cell in cells("tiny", seeds=1) if cell.method.name == method and cell.sparsity == 0.9)


def test_every_tiny_cell_has_something_to_learn(text: Path) -> None:
    """Its few steps leave some before every deadline, or `attach` would refuse it."""
    for cell in cells("tiny", seeds=1):
        config = cell.config({"text": str(text)}, 1, "cpu")
        session = Session(config, make_task(config))
        assert (session.runtime is None) == (cell.method.name == "dense")
        learned = config.dst is not None and config.dst.permutation is not None
        assert not learned or session.runtime.learners, cell.name


def test_a_run_that_diverges_gives_a_row_without_a_value(tmp_path: Path, text: Path) -> None:
    cell = cell_of("dense")
    config = dataclasses.replace(cell.config({"text": str(text)}, 1, "cpu"), lr=1e30, clip=None, warmup=0.0, log_interval=1)
    found = train_cell(cell, config, tmp_path / "run")
    assert (found["value"], found["diverged"]) == (None, True)
    assert 0 < len(found["curves"]["logged"]["loss"]) < config.steps
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_srigl_learns_permutations(tmp_path: Path, text: Path) -> None:
    cell = cell_of("srigl:1:10 autoshuffle")
    config = dataclasses.replace(cell.config({"text": str(text)}, 1, "cpu"), log_interval=1)
    found = train_cell(cell, config, tmp_path / "run")
    assert found["compiled_agrees"]
    logged = found["curves"]["logged"]
    assert set(logged) >= {"step", "seconds", "loss", "exploration", "penalty", "hardened"}
    assert logged["step"] == list(range(1, config.steps + 1))
    assert logged["hardened"][0] == 0
    assert logged["hardened"][-1] > 0
    assert found["curves"]["validated"]["value"] == [pytest.approx(found["value"], rel=1e-4)]


def test_learned_permutations_are_replayed_from_the_beginning(tmp_path: Path, text: Path) -> None:
    learning, replaying = cell_of("block:16 autoshuffle"), cell_of("block:16 replayed autoshuffle")
    rows = [
        train_cell(cell, cell.config({"text": str(text)}, 1, "cpu"), tmp_path / cell.name) for cell in (learning, replaying)
    ]
    assert all(found["compiled_agrees"] for found in rows)
    learned, replayed = (
        [layer.permutation for _, layer in sparse_layers(load_trained(tmp_path / cell.name))] for cell in (learning, replaying)
    )
    drawn = Session(replaying.config({"text": str(text)}, 1, "cpu"), make_task(replaying.config({"text": str(text)}, 1, "cpu")))
    assert all(torch.equal(a, b) for a, b in zip(learned, replayed, strict=True))
    assert not all(torch.equal(a, b.permutation) for a, (_, b) in zip(learned, sparse_layers(drawn.model), strict=True))


def test_long_curves_are_thinned_and_end_where_the_run_did(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in range(1, 1002):
        folder.metrics.append({"step": step, "loss": 1 / step, "penalty": 0.0})
        folder.timing.append({"step": step, "seconds": step / 10, "processor_seconds": step / 20})
    folder.metrics.append({"step": 1001, "validation_loss": 0.5, "validation_accuracy": 0.25})
    found = read_curves(folder, "accuracy")
    assert 40 <= len(found["logged"]["step"]) <= 81
    assert found["logged"]["step"][-1] == 1001
    assert "penalty" not in found["logged"]  # there were no soft permutations
    assert found["validated"] == {"step": [1001.0], "seconds": [100.1], "value": [0.25]}
    assert read_curves(folder, "accuracy", "processor_seconds")["validated"]["seconds"] == [50.05]


@pytest.mark.slow
def test_a_study_goes_on_where_it_stopped(tmp_path: Path, text: Path) -> None:
    out = tmp_path / "study"
    command = ["--text", str(text), "--out", str(out), "--grid", "tiny", "--seeds", "1", "--sparsity", "0.9", "--threads", "1"]
    first = _study(*command, "--only", "dense", "block-16 static")
    assert first.count("gpt-tiny/") == 2
    results = out / "results.jsonl"
    before = results.read_text()
    results.write_text(before + '{"cell": "cut o')  # killed while writing
    second = _study(*command, "--only", "dense", "block-16 regroup/", "block-16 random", "--workers", "2")
    assert second.count("gpt-tiny/") == 2
    assert results.read_text().startswith(before)
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [row["method"] for row in rows[:2]] == ["dense", "block:16 static"]
    assert {row["method"] for row in rows[2:]} == {"block:16 random", "block:16 regroup"}
    assert all(row["compiled_agrees"] and row["threads"] == 1 for row in rows)
    page = (out / "report.html").read_text()
    assert "block:16 regroup" in page
    assert "curves of the runs" in page


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
