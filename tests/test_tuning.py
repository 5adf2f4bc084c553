"""`padst tune`: what it measures, prints and keeps."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

import padst_compile as padst
from padst_compile.autotune import lookup, search
from padst_compile.autotune.mlp_choice import MlpChoice
from padst_compile.autotune.problem import MlpProblem
from padst_compile.autotune.space import Candidate
from padst_compile.cli import app
from padst_compile.kernels import native
from padst_compile.tuning import Tuned, TunedPair, sources, tune, tuning_table

VIT = "timm:test_vit"  # a real model of timm's, with 6 layers of 64 features


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of its own for what is measured; the native kernels are loaded before from the shared one."""
    native.load()
    monkeypatch.setenv("PADST_CACHE_DIR", str(tmp_path))


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["tune", *arguments])


def two_shapes() -> nn.Module:
    layers = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    return padst.sparsify(layers, padst.SparsitySpec("block:16", sparsity=0.5))


def test_a_model_is_tuned_once_and_the_second_run_says_so(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    arguments = (VIT, "--structure", "block:16", "--sparsity", "0.75", "--threads", "1", "--json", str(path))
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    first = json.loads(path.read_text())
    shapes = first["shapes"]
    assert {shape["choice"]["source"] for shape in shapes} == {"tuned now"}
    assert all(shape["choice"][f"{name}_seconds"] > 0 for shape in shapes for name in ("default", "sparse", "dense"))
    assert f"{len(shapes)} shapes of layers: {len(shapes)} tuned now" in result.output
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    second = json.loads(path.read_text())
    for shape in second["shapes"]:
        assert shape["choice"].pop("source") == "cached"
        assert shape["choice"].pop("reason").endswith("(cached)")
    for shape in shapes:
        del shape["choice"]["source"], shape["choice"]["reason"]
    assert second["shapes"] == shapes
    assert f"{len(shapes)} cached" in result.output


def test_compiling_afterwards_finds_what_was_tuned() -> None:
    model, x = two_shapes(), torch.randn(8, 64)
    with torch.no_grad():
        tune(model, x)
        layers = padst.explain(model, x, options={"autotune": "cached"}).layers
        assert all(layer.reason.endswith("(cached)") for layer in layers)
        layers = padst.explain(model, torch.randn(20, 64), options={"autotune": "cached"}).layers
        assert all(layer.reason.endswith("at 8 tokens (nearest bucket)") for layer in layers)
        layers = padst.explain(model, x, options={"autotune": "off"}).layers
        assert all(layer.reason.endswith("(cost model)") for layer in layers)


def test_exported_results_can_be_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = tmp_path / "configs"
    configs.mkdir()
    result = run("linear:64:64", "--structure", "block:16", "--threads", "1", "--export", str(configs / "here.json"))
    assert result.exit_code == 0, result.output
    assert f"results written to {configs / 'here.json'}" in result.output
    monkeypatch.setattr(lookup, "SHIPPED", configs)
    monkeypatch.setenv("PADST_CACHE_DIR", str(tmp_path / "another user"))
    result = run("linear:64:64", "--structure", "block:16", "--threads", "1")
    assert "1 shape of layers: 1 shipped" in result.output


def test_layers_of_one_shape_are_tuned_together() -> None:
    ticks: list[None] = []
    with torch.no_grad():
        tuned = tune(two_shapes(), torch.randn(8, 64), progress=lambda: ticks.append(None))
    assert [(shape.problem.out_features, shape.layers) for shape in tuned.shapes] == [(64, 2), (32, 1)]
    assert len(ticks) == 3
    assert sources(tuned).startswith("2 shapes of layers: 2 tuned now")
    assert sources(Tuned((), ())) == "no sparse layer is reached with these inputs"


@pytest.mark.parametrize(("fused", "runs_on"), [(1.0, "one kernel"), (4.0, "two kernels")])
def test_pairs_of_layers_have_a_row(monkeypatch: pytest.MonkeyPatch, fused: float, runs_on: str) -> None:
    if not native.supports("block", torch.float32):
        pytest.skip("needs the native block kernel")
    seconds = {"apart": 2.0, "fused": fused, "dense": 9.0}

    def race(runs: dict[Candidate, Any], device: str, budget: Any) -> dict[Candidate, float]:
        return {candidate: seconds.get(candidate.kernel, 1.0) for candidate in runs}

    monkeypatch.setattr(search, "raced_seconds", race)
    pair = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64))
    model = padst.sparsify(
        nn.Sequential(pair, nn.LayerNorm(64), copy.deepcopy(pair)), padst.SparsitySpec("block:16", 0.5)
    ).eval()
    with torch.no_grad():
        tuned, again = tune(model, torch.randn(8, 64)), tune(model, torch.randn(8, 64), effort="cached")
    (found,), (known,) = tuned.pairs, again.pairs
    assert (found.pairs, found.choice.fused) == (2, runs_on == "one kernel")
    assert (found.choice.apart_seconds, found.choice.fused_seconds, found.choice.source) == (2.0, fused, "tuned now")
    assert known.choice.source == "cached"
    assert sources(again) == "2 shapes of layers: 2 cached; 1 shape of pairs: 1 cached"
    row = [list(column.cells)[-1] for column in tuning_table(tuned, "a model").columns]
    assert row[:3] == ["2 x 2", "64 -> 96 -> 64", "block:16x16 block:16x16"]
    assert row[5:] == ["2000.000", f"{fused * 1e3:.3f}", "", "", runs_on, "default", "tuned now"]
    assert tuned.to_dict()["pairs"][0]["choice"]["fused_seconds"] == fused


def test_pairs_that_were_not_measured_say_so() -> None:
    problem = MlpProblem("block:16x16 block:16x16", 64, 96, 64, 6144, 8, "float32", "", "cpu", "relu")
    tuned = Tuned((), (TunedPair(problem, MlpChoice(False, "one kernel for both layers was not measured"), 1),))
    row = [list(column.cells)[-1] for column in tuning_table(tuned, "a model").columns]
    assert row[5:] == ["", "", "", "", "two kernels", "default", "not measured"]


def test_inference_and_training_are_tuned_apart() -> None:
    model, x = two_shapes(), torch.randn(8, 64)
    with torch.no_grad():
        tune(model, x)
    tuned = tune(model, x)
    assert all(shape.problem.training and shape.choice.source == "tuned now" for shape in tuned.shapes)
    assert not tuned.pairs  # one kernel for two layers has no gradients


def test_full_effort_measures_every_tile() -> None:
    if not native.supports("block", torch.float32):
        pytest.skip("needs the native block kernel")
    with torch.no_grad():
        shapes = tune(two_shapes(), torch.randn(200, 64), effort="full").shapes
    launches = [json.loads(path.read_text()) for path in lookup.library().cache.folder.glob("*.json")]
    measured = [
        [candidate["tile"]["tokens"] for candidate in launch["candidates"][1:]]
        for launch in launches
        if launch["key"]["kind"] == "launch"
    ]
    assert measured == [[16, 32, 48, 64, 96, 128]] * len(shapes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["linear:64:64", "--structure", "block:16", "--effort", "ful"], "did you mean 'full'"),
        (["linear:64:64", "--structure", "block:16", "--effort", "off"], "unknown value of --effort 'off'"),
        (["linear:64:64", "--structure", "block:16", "--device", "cpuu"], "did you mean 'cpu'"),
        (["timm:vit_base_patch16_22"], "did you mean 'vit_base_patch16_224'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_a_mistake_too() -> None:
    result = run("linear:64:64", "--structure", "block:16", "--device", "cuda")
    assert result.exit_code == 2
    assert "PyTorch finds no GPU here" in " ".join(result.output.split())
