"""The parts of the benchmark that must not lie."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from torch import nn
from torch._dynamo.utils import counters

import padst_compile as padst
from padst_compile import cli
from padst_compile.autotune.measure import interleaved_samples
from padst_compile.benchmarking.check import check_compiled
from padst_compile.benchmarking.machine import describe_machine
from padst_compile.benchmarking.models import ModelCase, build_model, first_tensor
from padst_compile.benchmarking.run import DENSE_DEFAULT, DENSE_FREEZING, SPARSE, Settings, compare
from padst_compile.kernels import native

ROOT = Path(__file__).resolve().parents[1]


def small_case() -> ModelCase:
    return build_model("linear:64:48", tokens=8)


def small_spec(permutation: str = "random") -> padst.SparsitySpec:
    return padst.SparsitySpec(structure="block:16", sparsity=0.5, permutation=permutation)


def test_candidates_take_turns() -> None:
    calls: list[str] = []
    samples = interleaved_samples({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repetitions=2, warmup=1)
    assert calls == ["a", "b"] * 3
    assert [len(times) for times in samples.values()] == [2, 2]


def test_each_candidate_is_compiled_for_itself() -> None:
    """Dynamo must not hand one candidate the program of another: freezing would then measure the default."""
    before = counters["stats"]["unique_graphs"]
    compare(small_case(), small_spec(), Settings(repetitions=1))
    small_program_that_starts_the_compiler, candidates = 1, 3
    assert counters["stats"]["unique_graphs"] - before == small_program_that_starts_the_compiler + candidates


def test_a_comparison_has_all_candidates_and_passes() -> None:
    comparison = compare(small_case(), small_spec(), Settings(repetitions=1))
    assert set(comparison.milliseconds) == {DENSE_DEFAULT, DENSE_FREEZING, SPARSE}
    assert comparison.check.passed
    assert 0 < comparison.bytes_ratio < 1


@pytest.mark.parametrize("damage", [0.01, float("nan")])
def test_the_check_fails_for_a_wrong_output(damage: float) -> None:
    case = small_case()
    sparse = padst.sparsify(build_model("linear:64:48", tokens=8).model, small_spec())
    with torch.no_grad():
        output = sparse(*case.args).clone()
    assert check_compiled(case, sparse, output, torch.float32).passed
    output[0, 0] += damage
    assert not check_compiled(case, sparse, output, torch.float32).passed


def test_a_zero_head_is_filled_so_that_errors_before_it_show() -> None:
    model = build_model("timm:mixer_s32_224").model
    assert isinstance(model.head, nn.Linear)
    assert model.head.weight.any()


def test_models_are_the_same_for_the_same_seed() -> None:
    first, second = build_model("linear:16:16"), build_model("linear:16:16")
    assert torch.equal(first.args[0], second.args[0])
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))


def test_the_output_of_a_language_model_is_its_logits() -> None:
    case = build_model("hf:gpt2,n_layer=1,n_embd=32,n_head=2,vocab_size=101,n_positions=64", batch=2, tokens=8)
    with torch.no_grad():
        assert first_tensor(case.model(*case.args, **case.kwargs)).shape == (2, 1, 101)


def test_the_figures_in_the_readme_are_those_of_the_recorded_results() -> None:
    result = subprocess.run([sys.executable, ROOT / "benchmarks" / "figures.py", "--check"], cwd=ROOT, check=False)
    assert result.returncode == 0, "run python benchmarks/figures.py"


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a dry run is for machines without a GPU")
def test_all_parts_of_the_gpu_script_run_dry_without_a_gpu(tmp_path: Path) -> None:
    folders = {"OUT": str(tmp_path / "out"), "RUNS": str(tmp_path / "runs")}
    script, environment = ROOT / "benchmarks" / "gpu.sh", {**os.environ, "PYTHON": sys.executable, **folders}
    result = subprocess.run([script, "all"], cwd=tmp_path, env=environment, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "no GPU here: a dry run" in result.stdout
    assert list(tmp_path.iterdir()) == []

    parts = {part.partition("\n")[0]: part for part in result.stdout.split("\n== ")[1:]}
    assert list(parts) == ["test", "sanitize", "tune", "layers", "models", "train"]
    assert re.search(r"\d+ tests collected", parts["test"])
    # pytest ends with an error, and the script with it, where a selection has no test.
    selections = parts["sanitize"].count("|")
    assert selections == 4 == len(re.findall(r"\n[1-9]\d*/\d+ tests collected", parts["sanitize"]))
    assert "cases on cuda; nothing was measured" in parts["layers"]
    assert "cases on cuda; nothing was measured" in parts["models"]
    for name, count in (("tune", 2), ("train", 3)):
        commands = re.findall(rf"padst_compile\.cli {name} (.*)", parts[name])
        assert len(commands) == count
        for command in commands:  # its options are known, and have the right types
            typer.main.get_command(cli.app).commands[name].make_context(name, command.split())


def test_the_gpu_script_knows_its_parts() -> None:
    script, environment = ROOT / "benchmarks" / "gpu.sh", {**os.environ, "PYTHON": sys.executable}
    result = subprocess.run([script, "everything"], env=environment, check=False, capture_output=True, text=True)
    assert result.returncode == 2
    assert "unknown part everything" in result.stderr


def test_a_machine_is_described_with_its_versions_and_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    native.load()  # once per process, with the real compiler
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho 'a compiler 1.2'\necho more\n")
    compiler.chmod(0o700)
    monkeypatch.setenv("CXX", str(compiler))
    found = describe_machine()
    assert found["compiler"] == "a compiler 1.2"
    assert found["torch"] == torch.__version__
    for package in ("triton", "timm", "transformers"):
        assert found[package] == (importlib.metadata.version(package) if importlib.util.find_spec(package) else None)
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    assert describe_machine()["compiler"] is None
    assert json.dumps(found)


@pytest.mark.slow
def test_the_example_in_the_readme_prints_what_stands_below_it() -> None:
    script = ROOT / "benchmarks" / "readme_example.py"
    result = subprocess.run([sys.executable, script, "--check"], cwd=ROOT, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
