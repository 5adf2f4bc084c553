"""Runs of `padst train`: interrupted anywhere they end like unbroken ones, and what they leave behind can be used."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import padst_compile as padst
from padst_compile.cli import app
from padst_compile.errors import RunFolderError, TrainingDivergedError
from padst_compile.recipes import TrainConfig, load_trained, run
from padst_compile.recipes.evaluation import check_trained, evaluate
from padst_compile.recipes.loop import train
from padst_compile.recipes.reporting import Silent
from padst_compile.recipes.run_folder import RunFolder
from padst_compile.recipes.session import Session
from padst_compile.recipes.shorthand import SparseTraining
from padst_compile.recipes.tasks import Task, make_task
from padst_compile.recipes.trained import load_weights, save_trained

pytest.importorskip("timm")
pytest.importorskip("transformers")
parquet = pytest.importorskip("pyarrow.parquet")

ROOT = Path(__file__).resolve().parents[1]
GPT = "hf:gpt2,n_layer=1,n_embd=32,n_head=2"  # with dropout
MIXER = "mixer:num_blocks=1,embed_dim=32,patch_size=4"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = random.Random(0).choices(["the ", "cat ", "sat ", "on ", "a ", "mat.\n"], k=600)
    path.write_text("".join(words))
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two parquet files like those of CIFAR-10 as it is distributed: JPEG bytes and uint8 labels."""
    import io

    import numpy as np
    import pyarrow as pa
    from PIL import Image

    folder, draw = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name, count in (("tiny-train.parquet", 40), ("tiny-test.parquet", 12)):
        cells, labels = [], [index % 2 for index in range(count)]
        for label in labels:
            file = io.BytesIO()
            pixels = np.clip(draw.normal(70 + 90 * label, 10, (8, 8, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(file, format="JPEG")
            cells.append(file.getvalue())
        parquet.write_table(
            pa.table({"image": pa.array(cells, pa.binary()), "label": pa.array(labels, pa.uint8())}), folder / name
        )
    return folder


def configure(model: str, data: Path, sparse: SparseTraining, steps: int = 12, **changes: object) -> TrainConfig:
    spec, dst = sparse.resolve(steps=steps, seed=0)
    fields = {
        "batch": 4,
        "context": 8,
        "threads": 1,
        "log_interval": 1,
        "eval_interval": 4,
        "checkpoint_interval": 5,
        "eval_limit": 6,
    }
    return TrainConfig(model, str(data), sparsity=spec, dst=dst, steps=steps, **{**fields, **changes})


class InterruptedRunError(Exception):
    pass


class StopAt(Silent):
    """Interrupts a run behind a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def progress(self, step: int, steps: int, numbers: Mapping[str, float]) -> None:
        if step == self.step:
            raise InterruptedRunError


class Listener(Silent):
    """Keeps what a run says."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def train_in(path: Path, config: TrainConfig, task: Task, stops: tuple[int, ...] = ()) -> RunFolder:
    """Train in a folder, anew after each interruption, and save the model."""
    folder = RunFolder(path)
    with folder.claimed(config):
        folder.keep_config(config)
        for stop in stops:
            with pytest.raises(InterruptedRunError):
                train(Session(config, task), folder, StopAt(stop))
        session = Session(config, task)
        train(session, folder, Silent())
        save_trained(session.finish(), config, task.data, folder)
    return folder


def assert_same(one: RunFolder, other: RunFolder) -> None:
    assert one.metrics.path.read_text() == other.metrics.path.read_text()
    assert one.weights.read_bytes() == other.weights.read_bytes()


WAYS = {
    "dense": SparseTraining("dense"),
    "fixed": SparseTraining("diagonal", sparsity=0.75, permutation="random", method="none"),
    "rigl with autoshuffle": SparseTraining("block:8", sparsity=0.75, permutation="autoshuffle", interval=3),
    "set with sinkhorn": SparseTraining("nm:1:4", permutation="sinkhorn_ste", method="set", interval=3),
    "mest with regroup": SparseTraining("block:8", sparsity=0.75, permutation="regroup", method="mest", interval=3),
    "static with autoshuffle": SparseTraining("unstructured", sparsity=0.75, permutation="autoshuffle", method="static"),
    "gradual pruning": SparseTraining("block:8", sparsity=0.75, method="magnitude", interval=3),
    "diagonals by a soft top-K": SparseTraining(
        "diagonal", sparsity=0.75, permutation="regroup", method="dynadiag", interval=3
    ),
}
SMALL_BLOCKS = dataclasses.replace(WAYS["rigl with autoshuffle"], structure="block:2")  # its token mixers are small


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_an_interrupted_training_ends_like_an_unbroken_one(tmp_path: Path, text: Path, way: SparseTraining) -> None:
    config = configure(GPT, text, way)
    task = make_task(config)
    whole = train_in(tmp_path / "whole", config, task)
    assert [row["step"] for row in whole.metrics.read() if "loss" in row] == list(range(1, 13))
    assert_same(train_in(tmp_path / "broken", config, task, stops=(3, 8, 10)), whole)
    model = load_weights(whole, config, task)
    scores = evaluate(model, task.data, torch.device("cpu"), config.dtype)
    last = whole.metrics.read()[-1]
    if config.dst is None:  # nothing was soft
        assert scores.loss == last["validation_loss"]
    expected = 1.0 if config.sparsity is None else 0.25
    for _, layer in padst.sparse_layers(model):
        assert layer.density == pytest.approx(expected, abs=0.02)


def test_images_continue_with_the_same_order_and_augmentation(tmp_path: Path, images: Path) -> None:
    config = configure(MIXER, images, SMALL_BLOCKS, dtype="bfloat16", label_smoothing=0.1)
    task = make_task(config)
    whole = train_in(tmp_path / "whole", config, task)
    assert_same(train_in(tmp_path / "broken", config, task, stops=(7,)), whole)


def test_a_finished_run_is_used_and_not_repeated(tmp_path: Path, images: Path) -> None:
    config = configure(MIXER, images, SMALL_BLOCKS, steps=60, lr=0.01, eval_limit=None, eval_interval=30)
    path = tmp_path / "run"
    state = torch.get_rng_state()
    result = run(config, path)
    assert torch.equal(torch.get_rng_state(), state)
    assert result.passed and result.logit_error <= result.bound < 1e-3
    assert result.eager.examples == 12 and result.eager.accuracy > 0.9
    assert result.compiled.loss == pytest.approx(result.eager.loss, abs=1e-5)
    assert result.density == pytest.approx(0.25, abs=0.02)
    assert {"config.json", "metrics.jsonl", "timing.jsonl", "checkpoint.pt", "model.safetensors", "spec.json", "data.json",
            "curves.png", "result.json"} <= {file.name for file in path.iterdir()}  # fmt: skip
    assert (path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert padst.load_spec(path / "spec.json") == config.sparsity
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert {"step", "loss", "lr", "density", "exploration", "penalty", "hardened"} <= rows[0].keys()
    assert [row["step"] for row in rows if "validation_loss" in row] == [30, 60]

    task = make_task(config)
    assert evaluate(load_trained(path), task.data, torch.device("cpu"), "float32") == result.eager
    before = {file: file.stat().st_mtime_ns for file in path.iterdir() if file.name != ".lock"}
    listener = Listener()
    assert run(config, path, listener) == result
    assert "finished" in listener.said[0]
    assert {file: file.stat().st_mtime_ns for file in before} == before


def test_curves_are_left_out_where_matplotlib_is_missing(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    listener = Listener()
    config = configure(GPT, text, WAYS["fixed"], steps=2)
    assert run(config, tmp_path / "run", listener).passed
    assert any("drawing curves needs matplotlib" in line for line in listener.said)
    assert not (tmp_path / "run" / "curves.png").exists()


class Doubling(torch.nn.Module):
    """A model whose compiled form computes something else."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Embedding(8, 8)
        self.other = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.other(self.inner(x % 8))
        return 1.01 * y if torch.compiler.is_compiling() else y


def test_a_compiled_model_that_is_another_one_is_noticed(text: Path) -> None:
    task = make_task(configure(GPT, text, WAYS["dense"]))
    model = padst.sparsify(Doubling(), padst.SparsitySpec(padst.Block(4), sparsity=0.5, targets=("other",)))
    many = dataclasses.replace(task)
    many.data.vocabulary = [*"abcdefgh"]
    many.data.training, many.data.validation = many.data.training % 8, many.data.validation % 8
    check = check_trained(model, many.data, torch.device("cpu"), "float32")
    assert not check.passed and check.error == pytest.approx(0.01, rel=0.01)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path, text: Path) -> None:
    config = configure(GPT, text, WAYS["dense"], lr=1e30, clip=None, checkpoint_interval=2, log_interval=7)
    with pytest.raises(TrainingDivergedError, match="lower the learning rate"):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run" / "result.json").exists()


def test_other_data_under_the_same_name_is_noticed(tmp_path: Path, text: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(text.read_text())
    config = configure(GPT, path, WAYS["dense"])
    with pytest.raises(InterruptedRunError):
        run(config, tmp_path / "run", StopAt(6))
    path.write_text(text.read_text() + "a new end")
    with pytest.raises(RunFolderError, match="has changed since this run began"):
        run(config, tmp_path / "run")


def test_weights_of_another_model_are_refused(tmp_path: Path, text: Path) -> None:
    config = configure(GPT, text, WAYS["fixed"], steps=1)
    task = make_task(config)
    folder = train_in(tmp_path / "run", config, task)
    with pytest.raises(RunFolderError, match="does not hold this run's model"):
        load_weights(folder, config, make_task(dataclasses.replace(config, model=GPT.replace("32", "64"))))
    folder.weights.write_bytes(folder.weights.read_bytes()[:100])
    with pytest.raises(RunFolderError, match="does not hold this run's model"):
        load_weights(folder, config, task)


def arguments(text: Path, out: Path) -> list[str]:
    return [
        "train", GPT, str(text), "--out", str(out), "--structure", "block:8", "--sparsity", "0.75",
        "--permutation", "autoshuffle", "--interval", "10", "--steps", "60", "--batch", "4", "--context", "8",
        "--threads", "1", "--log-interval", "1", "--eval-interval", "20", "--eval-limit", "6", "--checkpoint-interval", "7",
    ]  # fmt: skip


def start(*command: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "padst_compile.cli", *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_rows(process: subprocess.Popen[str], path: Path, count: int) -> None:
    """Until a run has written so many rows, or ended."""
    while process.poll() is None:
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.002)


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)


@pytest.mark.slow
def test_a_killed_command_that_is_given_again_ends_like_an_unbroken_one(tmp_path: Path, text: Path) -> None:
    out, moment = tmp_path / "killed", random.SystemRandom().uniform(0.0, 1.0)
    first = start(*arguments(text, out))
    wait_for_rows(first, out / "metrics.jsonl", 25)
    kill(first)
    assert first.returncode == -signal.SIGKILL, "it ended before it could be killed"
    assert not (out / "result.json").exists()
    second = start(*arguments(text, out))
    wait_for_rows(second, out / "metrics.jsonl", 1)
    time.sleep(moment)
    kill(second)
    third = start(*arguments(text, out))
    printed, _ = third.communicate(timeout=300)
    assert third.returncode == 0, f"{moment}: {printed}"
    assert "they differ by rounding alone" in " ".join(printed.split())
    unbroken = CliRunner().invoke(app, arguments(text, tmp_path / "unbroken"))
    assert unbroken.exit_code == 0, unbroken.output
    assert_same(RunFolder(out), RunFolder(tmp_path / "unbroken"))
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in (tmp_path / "unbroken").iterdir()), moment


def command(*words: str) -> Result:
    return CliRunner().invoke(app, ["train", *words])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["vit", "--out", "{out}"], "write timm:NAME"),
        (["hf:gpt3", "--out", "{out}", "--context", "8"], "transformers has no model type"),
        ([GPT, "--out", "{out}", "--structure", "blok:4"], "did you mean 'block'"),
        ([GPT, "--out", "{out}", "--permutation", "autoshufle"], "did you mean 'autoshuffle'"),
        ([GPT, "--out", "{out}", "--method", "rigel"], "did you mean 'rigl'"),
        ([GPT, "--out", "{out}", "--lr", "0"], "lr must be a number above 0"),
        ([GPT, "--out", "{out}", "--dtype", "float23"], "did you mean 'float32'"),
        ([GPT, "--out", "{out}", "--context", "100000"], "too few for one window"),
        ([GPT, "--out", "{text}"], "cannot make the folder"),
        ([MIXER, "--out", "{out}"], "cannot be read as parquet"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(tmp_path: Path, text: Path, words: list[str], message: str) -> None:
    model, *options = (word.format(out=tmp_path / "run", text=text) for word in words)
    result = command(model, str(text), *options)
    assert result.exit_code == 2
    assert not (tmp_path / "run" / "config.json").exists(), "the folder is free for the corrected command"
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output


TINY = ["--steps", "2", "--batch", "2", "--context", "8", "--eval-limit", "2", "--threads", "1"]


def test_a_preset_decides_topology_permutations_and_learning_rate(tmp_path: Path, text: Path) -> None:
    out = tmp_path / "run"
    words = ["--preset", "structured_dynsparse", "--structure", "block:8", "--sparsity", "0.75", "--lr", "0.001", *TINY]
    result = command(GPT, str(text), "--out", str(out), *words)
    assert result.exit_code == 0, result.output
    config = TrainConfig.from_dict(json.loads((out / "config.json").read_text()))
    recipe = padst.presets.structured_dynsparse(8, 0.75, total_steps=2)
    assert (config.sparsity, config.dst, config.lr) == (recipe.spec, recipe.config, 0.001 * recipe.learning_rate_factor)
    refused = command(GPT, str(text), "--out", str(out), "--preset", "dsb", "--permutation-lr", "1", *TINY)
    assert refused.exit_code == 2
    assert "preset 'dsb' decides --permutation-lr; leave one of them out" in " ".join(refused.output.split())


def test_options_of_training_reach_the_configuration(tmp_path: Path, text: Path) -> None:
    out = tmp_path / "run"
    words = [
        "--structure", "block:8", "--sparsity", "0.75", "--distribution", "erk", "--score", "l2", "--gradient-rows", "0.5",
        "--mest-weight", "0.75", "--permutation", "autoshuffle", "--penalty-weight", "2", "--threshold", "0.2",
        "--permutation-warmup", "0.3", "--permutation-lr", "0.25", "--deadline", "0.5", "--targets", "*.mlp.*",
    ]  # fmt: skip
    result = command(GPT, str(text), "--out", str(out), *words, *TINY)
    assert result.exit_code == 0, result.output
    config = TrainConfig.from_dict(json.loads((out / "config.json").read_text()))
    learned = padst.LearnedPermutation(learning_rate=0.25, penalty_weight=2.0, threshold=0.2, warmup=0.3)
    assert config.dst == padst.DSTConfig(total_steps=2, score="l2", gradient_rows=0.5, mest_weight=0.75, permutation=learned)
    assert config.sparsity == padst.SparsitySpec(
        padst.Block(8), 0.75, permutation="learned", distribution="erk", targets=("*.mlp.*",)
    )


def test_options_are_listed_in_groups() -> None:
    shown = command("--help").output
    groups = ["Sparse layers", "Topology", "Permutations", "Optimization", "Data", "Run"]
    places = [shown.index(f"─ {group} ─") for group in groups]
    assert places == sorted(places)
    assert shown.index("--preset") < places[1] < shown.index("--gradient-rows") < places[2] < shown.index("--permutation-lr")


def test_a_folder_of_another_run_names_what_differs(tmp_path: Path, text: Path) -> None:
    out = tmp_path / "run"
    config = configure(GPT, text, WAYS["dense"])
    with pytest.raises(InterruptedRunError):
        run(config, out, StopAt(1))
    result = command(GPT, str(text), "--out", str(out), "--structure", "dense", "--steps", "13")
    assert result.exit_code == 2
    assert "another configuration, which differs in steps, batch, context," in " ".join(result.output.split())
