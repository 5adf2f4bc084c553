"""The `padst` command, run in process on small models."""

from __future__ import annotations

import json
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
