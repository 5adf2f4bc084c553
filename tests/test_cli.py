"""The `padst` command, run in process on small models."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from padst_compile.cli import app

TINY_GPT2 = "hf:gpt2,n_layer=1,n_embd=64,n_head=2,vocab_size=101,n_positions=64"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_bench_times_checks_and_writes_json(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    result = run(
        "bench", TINY_GPT2, "--structure", "block:16", "--sparsity", "0.75", "--permutation", "random", "--tokens", "8",
        "--threads", "1", "--repetitions", "1", "--compare", "none", "--json", str(path),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    (comparison,) = json.loads(path.read_text())["comparisons"]
    assert comparison["check"]["passed"] is True
    assert set(comparison["milliseconds"]) == {"dense default", "dense freezing", "padst", "padst, no permutation"}
    assert "time with permutations" in result.output
    assert comparison["permutation_ratio"] > 0
    assert f"{comparison['permutation_ratio']:.3f}x" in result.output
    assert comparison["speedup"] == pytest.approx(
        min(comparison["milliseconds"]["dense default"], comparison["milliseconds"]["dense freezing"])
        / comparison["milliseconds"]["padst"]
    )


@pytest.mark.parametrize("structure", ["nm:1:4", "diagonal", "unstructured"])
def test_bench_knows_every_structure(structure: str) -> None:
    result = run("bench", "linear:64:32", "--structure", structure, "--tokens", "8", "--repetitions", "1")
    assert result.exit_code == 0, result.output


def test_explain_prints_the_layers_and_the_account(tmp_path: Path) -> None:
    path = tmp_path / "explanation.json"
    result = run("explain", TINY_GPT2, "--structure", "block:16", "--sparsity", "0.75", "--tokens", "8", "--json", str(path))
    assert result.exit_code == 0, result.output
    data = json.loads(path.read_text())
    assert data["graph_breaks"] == []
    assert data["permutations"]["remaining"] == 0
    assert [layer["name"] for layer in data["layers"][:2]] == ["transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_proj"]


def test_explain_draws_a_block(tmp_path: Path) -> None:
    path = tmp_path / "block.svg"
    result = run(
        "explain", TINY_GPT2, "--structure", "block:16", "--sparsity", "0.75", "--tokens", "8", "--targets", "*.mlp.c_proj",
        "--draw", str(path),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "mlp.c_proj" in path.read_text()


def test_doctor_reports_every_topic(tmp_path: Path) -> None:
    path = tmp_path / "doctor.json"
    result = run("doctor", "--json", str(path))
    assert result.exit_code == 0, result.output
    findings = json.loads(path.read_text())
    assert {"C++ compiler", "native kernels", "GPU", "Triton", "cache folder"} <= {finding["topic"] for finding in findings}
    assert all(finding["fix"] for finding in findings if finding["status"] == "missing")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with modules of a user's own in it."""
    shutil.copy(Path(__file__).parents[1] / "docs" / "examples" / "columns.py", tmp_path)
    (tmp_path / "needs_another.py").write_text("import columns\nimport not_there\n")
    (tmp_path / "leaves.py").write_text("raise SystemExit('[no] reason')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("columns", "needs_another", "leaves"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("fresh_registries", "folder")
@pytest.mark.parametrize("command", ["explain", "tune"])
def test_a_structure_of_ones_own_can_be_named(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    layer = (command, "linear:64:32", "--structure", "columns:8", "--sparsity", "0.75", "--tokens", "8", "--threads", "1")
    result = run(*layer)
    assert result.exit_code == 2
    assert "unknown structure 'columns'" in result.output
    result = run(*layer, "--import", "json", "--import", "columns")
    assert result.exit_code == 0, result.output
    assert "columns:8" in result.output


@pytest.mark.usefixtures("fresh_registries")
@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("collumns", "--import collumns: no module of this name is installed or in"),
        ("columns.more", "no module of this name is installed or in"),
        ("columns.py", "run padst in the folder of the file, with --import columns"),
        ("./columns", "run padst in the folder of the file, with --import columns"),
        ("needs_another", "it raises ModuleNotFoundError: No module named 'not_there'; `python -c 'import needs_another'`"),
        ("leaves", "it raises SystemExit: [no] reason"),
    ],
)
def test_a_module_that_does_not_import_is_a_mistake(folder: Path, module: str, message: str) -> None:
    result = run("explain", "linear:64:64", "--structure", "block:16", "--import", module)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output


@pytest.mark.usefixtures("fresh_registries")
@pytest.mark.parametrize(
    "command", [("bench", "linear:8:8"), ("tune", "linear:8:8"), ("train", "timm:vit", "data", "--out", "run")]
)
def test_every_command_that_takes_a_model_imports(folder: Path, command: tuple[str, ...]) -> None:
    result = run(*command, "--import", "columns", "--import", "collumns")
    assert result.exit_code == 2
    assert "--import collumns: no module of this name" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "timm:vit_tiny_patch16_225"], "did you mean"),
        (["bench", "hf:gpt3"], "transformers has no model type"),
        (["bench", "vit"], "timm:NAME"),
        (["bench", "linear:many"], "linear:IN:OUT"),
        (["bench", "linear:64:64", "--structure", "blok:16"], "did you mean 'block'"),
        (["bench", "linear:64:64", "--structure", "block:16", "--sparsity", "1.5"], "fraction of zeros"),
        (["bench", "linear:64:64", "--structure", "block:64"], "leaves none of its 1"),
        (["bench", "linear:64:64", "--structure", "nm:1:4", "--sparsity", "0.9"], "sparsity 0.75"),
        (["bench", "linear:64:64", "--permutation", "lerned"], "did you mean 'learned'"),
        (["bench", "linear:64:64", "--dtype", "float23"], "did you mean 'float32'"),
        (["explain", "linear:6:64", "--structure", "nm:5:7"], "NM(5, 6)"),
        (["explain", "linear:64:64", "--structure", "block:16", "--graph", "a.gif"], "write .svg, .png, .dot"),
        (["explain", "linear:64:64", "--structure", "block:16", "--draw", "a.svg", "--block", "head"], "no module 'head'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output
