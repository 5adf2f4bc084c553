"""Sparse models through transformers' own `from_pretrained` and `save_pretrained`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import padst_compile as padst
from padst_compile.backend import padst as backend
from padst_compile.errors import PretrainedError

transformers = pytest.importorskip("transformers")
PadstConfig = pytest.importorskip("padst_compile.integrations.transformers").PadstConfig

TOKENS = torch.arange(8)[None]
SPEC = padst.SparsitySpec("block:8", sparsity=0.5, permutation="random")
SIZES: dict[str, Any] = {"vocab_size": 50}


def gpt2() -> Any:
    config = transformers.GPT2Config(n_layer=1, n_embd=32, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0, **SIZES)
    return transformers.GPT2LMHeadModel(config).eval()


def bert() -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    return transformers.BertForMaskedLM(transformers.BertConfig(**sizes, **SIZES)).eval()


@pytest.mark.parametrize(
    ("make", "spec"), [(gpt2, SPEC), (bert, padst.SparsitySpec("nm:1:4", permutation="random", permutation_side="output"))]
)
def test_a_dense_checkpoint_is_sparsified_saved_and_loaded(make: Any, spec: padst.SparsitySpec, tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = make()
    dense.save_pretrained(tmp_path / "dense")
    model = type(dense).from_pretrained(tmp_path / "dense", quantization_config=PadstConfig(spec))
    expected = padst.sparsify(dense, spec)
    assert torch.equal(model(TOKENS).logits, expected(TOKENS).logits)
    for number, sparse in enumerate((model, expected)):  # made by transformers, and by padst.sparsify
        folder = tmp_path / str(number)
        sparse.save_pretrained(folder)
        assert json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"] == "padst"
        loaded = type(dense).from_pretrained(folder)
        assert torch.equal(loaded(TOKENS).logits, sparse(TOKENS).logits)
        assert [name for name, _ in padst.sparse_layers(loaded)] == [name for name, _ in padst.sparse_layers(sparse)]
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(type(dense).from_pretrained(tmp_path / "again")(TOKENS).logits, model(TOKENS).logits)


def test_a_model_that_was_pruned_in_training_is_saved_with_its_new_sizes(tmp_path: Path) -> None:
    model = padst.sparsify(gpt2().train(), SPEC)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = sum(layer.values.numel() for _, layer in padst.sparse_layers(model))
    padst.attach(model, optimizer, padst.DSTConfig("magnitude", interval=1, end=1.0, total_steps=3, final_sparsity=0.75))
    for _ in range(3):
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    padst.finalize(model).eval().save_pretrained(tmp_path)
    assert sum(layer.values.numel() for _, layer in padst.sparse_layers(model)) < before
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sparse")
    padst.sparsify(gpt2(), SPEC).save_pretrained(folder)
    return folder


def test_the_base_model_of_a_checkpoint(saved: Path) -> None:
    base, whole = transformers.AutoModel.from_pretrained(saved), transformers.AutoModelForCausalLM.from_pretrained(saved)
    assert len(list(padst.sparse_layers(base))) == len(list(padst.sparse_layers(whole))) > 0
    assert torch.equal(base(TOKENS).last_hidden_state, whole.transformer(TOKENS).last_hidden_state)


def test_a_loaded_model_in_another_dtype_compiles_and_becomes_dense(saved: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16)
    assert {layer.values.dtype for _, layer in padst.sparse_layers(model)} == {torch.bfloat16}
    model = model.float()
    with torch.no_grad():
        expected = model(TOKENS).logits
        torch.testing.assert_close(torch.compile(model, backend=backend)(TOKENS).logits, expected)
    padst.densify(model)
    assert not hasattr(model.config, "quantization_config")
    torch.testing.assert_close(model(TOKENS).logits, expected)


def damaged(saved: Path, folder: Path, change: Any) -> Path:
    transformers.AutoModelForCausalLM.from_pretrained(saved).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("transformer.h.0.mlp.c_fc.values"), "values is missing"),
        (lambda tensors: tensors.pop("transformer.h.0.mlp.c_fc.columns"), "columns is missing"),
        (lambda tensors: tensors["transformer.h.0.mlp.c_fc.columns"].fill_(99), "columns must lie in"),
        (lambda tensors: tensors["transformer.h.0.mlp.c_fc.permutation"].fill_(0), "exactly once"),
    ],
)
def test_damaged_checkpoints_are_refused(change: Any, message: str, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(PretrainedError, match=message):
        transformers.AutoModelForCausalLM.from_pretrained(damaged(saved, tmp_path, change))


def test_wrong_configurations_are_refused(saved: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(saved)
    with pytest.raises(PretrainedError, match="needs a specification"):
        PadstConfig()
    with pytest.raises(PretrainedError, match="version 2"):
        PadstConfig(**{**config.quantization_config, "version": 2})
    config.quantization_config["layers"]["transformer.h.7.attn.c_attn"] = config.quantization_config["layers"].pop(
        "transformer.h.0.attn.c_attn"
    )
    with pytest.raises(PretrainedError, match=r"no linear layer 'transformer.h.7.attn.c_attn'"):
        transformers.AutoModelForCausalLM.from_pretrained(saved, config=config)
