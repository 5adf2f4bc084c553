"""Configurations of `padst train`: JSON form, short names, mistakes; and the models, optimizer and files that they lead to."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import padst_compile as padst
from padst_compile.errors import (
    PadstError,
    RunFolderError,
    SpecError,
    TrainingConfigError,
    UnknownFieldError,
    UnknownModelError,
)
from padst_compile.files import remove_drafts, replace_file
from padst_compile.recipes import TrainConfig
from padst_compile.recipes.checkpoint import load_checkpoint, save_checkpoint
from padst_compile.recipes.config import differences
from padst_compile.recipes.models import image_model, kind_of, language_model
from padst_compile.recipes.optimisation import learning_rate, make_optimizer
from padst_compile.recipes.rows import Rows
from padst_compile.recipes.run_folder import RunFolder
from padst_compile.recipes.shorthand import SparseTraining
from padst_compile.training import DSTConfig, LearnedPermutation

BLOCKS = padst.SparsitySpec(padst.Block(8), sparsity=0.75, permutation="learned")
RIGL = DSTConfig(total_steps=1000, permutation=LearnedPermutation("regroup"))
CONFIG = TrainConfig("hf:gpt2", "a.txt", sparsity=BLOCKS, dst=RIGL)


@pytest.mark.parametrize("config", [CONFIG, TrainConfig("hf:gpt2", "a.txt", "b.txt", clip=None, dtype="bfloat16", threads=2)])
def test_the_json_form_reads_back(config: TrainConfig) -> None:
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_differences_are_named_by_their_path() -> None:
    other = dataclasses.replace(
        CONFIG,
        lr=0.5,
        dst=dataclasses.replace(RIGL, interval=7),
        sparsity=dataclasses.replace(BLOCKS, structure=padst.Block(4)),
    )
    assert differences(CONFIG.to_dict(), other.to_dict()) == ["sparsity.structure.size", "dst.interval", "lr"]
    assert differences(CONFIG.to_dict(), TrainConfig("hf:gpt2", "a.txt").to_dict()) == ["sparsity", "dst"]
    assert differences(CONFIG.to_dict(), CONFIG.to_dict()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "bfloat61"}, "dtype of a training run: 'bfloat61'; did you mean 'bfloat16'"),
        ({"tokens": "character"}, "did you mean 'characters'"),
        ({"steps": 0}, "steps must be a positive integer, got 0"),
        ({"batch": True}, "batch must be a positive integer, got True"),
        ({"threads": -1}, "threads must be a positive integer"),
        ({"seed": 0.5}, "seed must be an integer"),
        ({"lr": 0.0}, "lr must be a number above 0, got 0.0"),
        ({"lr": float("nan")}, "lr must be a number above 0, got nan"),
        ({"lr": float("inf")}, "lr must be a number above 0, got inf"),
        ({"warmup": 1.0}, "warmup must be a number at least 0 and below 1"),
        ({"final_lr": 1.5}, "final_lr must be a number at least 0 and at most 1"),
        ({"weight_decay": -1.0}, "weight_decay must be a number at least 0"),
        ({"clip": 0}, "clip must be a number above 0"),
        ({"steps": 900}, "dst.total_steps is 1000, and the run has 900"),
        ({"sparsity": None}, "give a sparsity specification too"),
        ({"sparsity": dataclasses.replace(BLOCKS, permutation="random")}, "set it to 'learned'"),
    ],
)
def test_values_that_make_no_sense_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(PadstError, match=message):
        dataclasses.replace(CONFIG, **changes)


def test_files_of_another_kind_are_refused() -> None:
    with pytest.raises(TrainingConfigError, match="version 1: it has None"):
        TrainConfig.from_dict({"model": "hf:gpt2"})
    with pytest.raises(UnknownFieldError, match="did you mean 'batch'"):
        TrainConfig.from_dict({**CONFIG.to_dict(), "bach": 3})
    with pytest.raises(TrainingConfigError, match="needs 'data'"):
        TrainConfig.from_dict({"version": 1, "model": "hf:gpt2"})


def test_short_names_stand_for_specification_and_training() -> None:
    short = SparseTraining("nm:1:4", permutation="autoshuffle", targets=("*.mlp.*",), method="set", interval=7, deadline=0.2)
    spec, dst = short.resolve(steps=90, seed=3)
    assert spec == padst.SparsitySpec(padst.NM(1, 4), permutation="learned", targets=("*.mlp.*",), seed=3)
    learned = LearnedPermutation("autoshuffle", deadline=0.2)
    assert dst == DSTConfig("set", interval=7, total_steps=90, permutation=learned, seed=3)
    spec, dst = SparseTraining("diagonal", permutation="random", method="none", foldable=True).resolve(steps=90, seed=0)
    assert spec == padst.SparsitySpec(padst.Diagonal(), 0.9, permutation="random", permutation_group="foldable") and dst is None
    assert SparseTraining("dense").resolve(steps=90, seed=0) == (None, None)


def test_short_names_reach_every_choice_of_training() -> None:
    short = SparseTraining(
        "block:4", sparsity=0.8, permutation="autoshuffle", method="mest", distribution="erk", score="l2", mest_weight=0.5,
        penalty_weight=2.0, threshold=0.2, permutation_warmup=0.3, permutation_lr=0.25,
    )  # fmt: skip
    spec, dst = short.resolve(steps=90, seed=0)
    assert spec is not None and spec.distribution == "erk"
    learned = LearnedPermutation("autoshuffle", learning_rate=0.25, penalty_weight=2.0, threshold=0.2, warmup=0.3)
    assert dst == DSTConfig("mest", total_steps=90, score="l2", mest_weight=0.5, permutation=learned)
    assert SparseTraining(gradient_rows=0.25).resolve(steps=90, seed=0)[1] == DSTConfig(total_steps=90, gradient_rows=0.25)
    spec, dst = SparseTraining(permutation="regroup").resolve(steps=90, seed=0)
    assert spec is not None and spec.distribution == "uniform"
    assert dst == DSTConfig(total_steps=90, permutation=LearnedPermutation("regroup")), "the defaults are the same"


def test_gradual_pruning_begins_dense_and_ends_with_the_sparsity() -> None:
    spec, dst = SparseTraining("block:8", sparsity=0.8, method="magnitude").resolve(steps=90, seed=0)
    assert spec is not None and dst is not None and (spec.sparsity, dst.final_sparsity) == (0.0, 0.8)
    config = TrainConfig("hf:gpt2", "a.txt", sparsity=spec, dst=dst, steps=90)
    assert config.final_sparsity == padst.SparsitySpec(padst.Block(8), sparsity=0.8)


def test_diagonals_by_a_soft_top_k_begin_as_all_of_them() -> None:
    spec, dst = SparseTraining("diagonal", method="dynadiag").resolve(steps=90, seed=0)
    assert spec is not None and dst is not None and (spec.sparsity, dst.final_sparsity) == (0.0, 0.9)


@pytest.mark.parametrize(
    ("training", "message"),
    [
        (SparseTraining(permutation="autoshufle"), "did you mean 'autoshuffle'"),
        (SparseTraining(method="rigel"), "did you mean 'rigl'"),
        (SparseTraining("dense", permutation="random"), "'dense' has neither"),
        (SparseTraining(permutation="regroup", method="none"), "would never be learned; method 'static' keeps"),
        (SparseTraining("nm:1:4", method="magnitude"), "nm:1:4 fixes the sparsity"),
        (SparseTraining("blok:4"), "did you mean 'block'"),
        (SparseTraining(side="left"), "permutation_side"),
        (SparseTraining(interval=0), "interval is an integer of at least 1"),
        (SparseTraining(distribution="erc"), "did you mean 'erk'"),
        (SparseTraining("nm:1:4", distribution="erk"), "which N:M fixes; use 'uniform'"),
        (SparseTraining(method="magnitude", distribution="erk"), "prunes all layers alike"),
        (SparseTraining(score="l3"), "score in DSTConfig: 'l3'"),
        (SparseTraining(gradient_rows=0.0), "gradient_rows must be above 0"),
        (SparseTraining(permutation="autoshuffle", threshold=1.5), "threshold must be at least 0 and at most 1"),
    ],
)
def test_short_names_that_make_no_sense_are_refused(training: SparseTraining, message: str) -> None:
    with pytest.raises(PadstError, match=message):
        training.resolve(steps=90, seed=0)


VIT = "timm:vit_tiny_patch16_224,patch_size=8,embed_dim=32,depth=1,num_heads=2"


@pytest.mark.parametrize("name", [VIT, "mixer:num_blocks=1,embed_dim=32,patch_size=8", "timm:resnet10t"])
def test_image_models_take_the_size_and_classes_of_the_data(name: str) -> None:
    pytest.importorskip("timm")
    model = image_model(name, classes=7, size=16, seed=0)
    assert model.training and model.eval()(torch.zeros(2, 3, 16, 16)).shape == (2, 7)


@pytest.mark.parametrize(
    "name",
    [
        "hf:gpt2,n_layer=1,n_embd=32,n_head=2",
        "hf:llama,num_hidden_layers=1,hidden_size=32,intermediate_size=48,num_attention_heads=2,num_key_value_heads=2",
    ],
)
def test_language_models_take_the_vocabulary_and_length_of_the_data(name: str) -> None:
    pytest.importorskip("transformers")
    model = language_model(name, classes=11, context=8, seed=0)
    assert model.training and model(torch.zeros(2, 8, dtype=torch.int64)).logits.shape == (2, 8, 11)
    assert model.config.max_position_embeddings == 8


def test_weights_depend_on_the_seed_alone() -> None:
    pytest.importorskip("transformers")
    name = "hf:gpt2,n_layer=1,n_embd=32,n_head=2"
    before = torch.get_rng_state()
    one, again, other = (language_model(name, classes=5, context=4, seed=seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert not all(torch.equal(one[key], other[key]) for key in one)


def build(name: str) -> torch.nn.Module:
    if kind_of(name) == "hf":
        return language_model(name, classes=5, context=4, seed=0)
    return image_model(name, classes=5, size=16, seed=0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_tiny_patch16_224", "write timm:NAME"),
        ("linear:3:4", "write timm:NAME"),
        ("timm:vit_tiny_patch16_225", "did you mean"),
        ("timm:vit_tiny_patch16_224,patch_sise=4", "patch_sise"),
        ("timm:vit_tiny_patch16_224,num_heads=5", "cannot build"),
        ("timm:vit_tiny_patch16_224,depth", "write key=value"),
        ("mixer:blocks=3", "did you mean 'num_blocks'"),
        ("hf:gpt3", "transformers has no model type"),
        ("hf:gpt2,n_layers=3", "did you mean 'n_layer'"),
        ("hf:gpt2,n_embd=30,n_head=4", "cannot build"),
        ("hf:t5", "does not predict the next token"),
    ],
)
def test_models_that_cannot_be_trained_are_refused(name: str, message: str) -> None:
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    with pytest.raises((UnknownModelError, UnknownFieldError), match=message):
        build(name)


def test_the_learning_rate_rises_then_falls_along_a_cosine() -> None:
    config = TrainConfig("hf:gpt2", "a.txt", steps=100, lr=2.0, warmup=0.1, final_lr=0.5)
    rates = [learning_rate(step, config) for step in range(101)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == 2.0
    assert rates[55] == pytest.approx(1.5) and rates[100] == pytest.approx(1.0)
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate(0, dataclasses.replace(config, warmup=0.0)) == 2.0


def test_biases_do_not_decay_and_weights_kept_in_a_vector_do() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 4))
    padst.sparsify(model, padst.SparsitySpec(padst.Unstructured(), sparsity=0.5, ignore=("2",)))
    decaying, others = make_optimizer(model, CONFIG).param_groups
    assert {id(p) for p in decaying["params"]} == {id(model[0].values), id(model[2].weight)}
    assert (decaying["weight_decay"], others["weight_decay"]) == (CONFIG.weight_decay, 0.0)
    assert len(others["params"]) == 4


def test_rows_survive_a_torn_line_and_are_dropped_behind_a_step(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "rows.jsonl")
    rows.keep_until(3)
    assert rows.read() == [] and not rows.path.exists()
    for step in range(1, 5):
        rows.append({"step": step, "loss": 0.1 * step})
    before = rows.path.read_text()
    with rows.path.open("a") as file:
        file.write('{"step": 5, "lo')
    assert [row["step"] for row in rows.read()] == [1, 2, 3, 4]
    rows.keep_until(4)
    assert rows.path.read_text() == before
    rows.keep_until(2)
    assert rows.path.read_text() == "".join(before.splitlines(keepends=True)[:2])


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    replace_file(path, lambda draft: draft.write_bytes(b"old"))

    def fail(draft: Path) -> None:
        draft.write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_file(path, fail)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    (tmp_path / ".a.bin.killed").mkdir()
    (tmp_path / ".a.bin.killed" / "a.bin").write_bytes(b"half")
    (tmp_path / ".b.bin.alive").mkdir()
    remove_drafts(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".b.bin.alive", "a.bin"]


def test_checkpoints_read_back_and_run_no_code(tmp_path: Path) -> None:
    path, device = tmp_path / "checkpoint.pt", torch.device("cpu")
    assert load_checkpoint(path, device) is None
    save_checkpoint(path, {"step": 3, "tensor": torch.arange(3)})
    state = load_checkpoint(path, device)
    assert state is not None and state.keys() == {"step", "tensor"} and state["tensor"].tolist() == [0, 1, 2]
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(RunFolderError, match="delete it to start this run again"):
        load_checkpoint(path, device)
    torch.save({"version": 1, "config": CONFIG}, path)  # an object of a class, whose reading could run code
    with pytest.raises(RunFolderError, match="cannot be read"):
        load_checkpoint(path, device)
    torch.save([1], path)
    with pytest.raises(RunFolderError, match="no checkpoint of version 1"):
        load_checkpoint(path, device)


@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_a_byte_that_flips_in_a_checkpoint_is_noticed_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, place: float, flip: int
) -> None:
    path, device = tmp_path_factory.getbasetemp() / "flipped.pt", torch.device("cpu")
    save_checkpoint(path, {"step": 3, "tensor": torch.arange(2000)})
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= flip
    path.write_bytes(content)
    with contextlib.suppress(RunFolderError):
        state = load_checkpoint(path, device)  # between the records, or in a field that nobody reads
        assert state is not None and state["step"] == 3 and torch.equal(state["tensor"], torch.arange(2000))


def claim(path: Path, config: TrainConfig) -> None:
    folder = RunFolder(path)
    with folder.claimed(config):
        folder.keep_config(config)


def test_a_folder_belongs_to_one_configuration_and_one_process(tmp_path: Path) -> None:
    path = tmp_path / "new" / "run"
    with RunFolder(path).claimed(CONFIG), pytest.raises(RunFolderError, match="another process is training"):
        claim(path, CONFIG)
    claim(path, CONFIG)
    with pytest.raises(RunFolderError, match="another configuration, which differs in lr, seed; give the same values"):
        claim(path, dataclasses.replace(CONFIG, seed=5, lr=0.5))
    (path / "config.json").write_text('{"version": 1')
    with pytest.raises(RunFolderError, match="is no configuration of a run"):
        claim(path, CONFIG)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(RunFolderError, match=r"is no run folder: it holds 'thesis.tex'"):
        claim(tmp_path, CONFIG)
    with pytest.raises(RunFolderError, match="cannot make the folder"):
        claim(tmp_path / "thesis.tex", CONFIG)
    with pytest.raises(SpecError):
        TrainConfig.from_dict({**CONFIG.to_dict(), "sparsity": {"structure": {"kind": "blok"}}})
