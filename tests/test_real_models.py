"""Architectures that people use, every linear layer sparse and permuted: equal to eager, exactly, with no gather of its own.

Small configurations with random weights; nothing is downloaded.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import padst_compile as padst
from padst_compile import permutation
from padst_compile.testing.equivalence import assert_equivalent
from padst_compile.testing.models import fill

VOCABULARY = 61
OPTIONS = {"kernels": "sparse"}
STRUCTURES = {
    "block": padst.SparsitySpec("block:16", 0.5, permutation="random"),
    "nm": padst.SparsitySpec("nm:1:4", permutation="random"),
    "diagonal": padst.SparsitySpec("diagonal", 0.75, permutation="random"),
}


def timm_model(name: str, **changes: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        timm = pytest.importorskip("timm")
        return timm.create_model(name, num_classes=10, **changes)

    return build


def mixer() -> nn.Module:
    model = timm_model("mixer_s16_224", img_size=64)()
    model.blocks = model.blocks[:2]
    return model


class Text(nn.Module):
    """The tensor that a language model is about, of token numbers alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        output = self.model(input_ids=ids)
        return output.logits if "logits" in output else output.last_hidden_state


class Translation(Text):
    """The same for an encoder and a decoder."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        # Without the cache of keys and values, whose set-up torch 2.11 cannot trace.
        return self.model(input_ids=ids, decoder_input_ids=ids[:, :5], use_cache=False).logits


class Vision(Text):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=images).pooler_output


def hugging_face(wrap: type[Text], kind: str, auto: str, **changes: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        transformers = pytest.importorskip("transformers")
        config = transformers.AutoConfig.for_model(kind, **changes)
        return wrap(getattr(transformers, auto).from_config(config))

    return build


def images(size: int) -> Callable[[int], torch.Tensor]:
    """Batches of other sizes."""
    return lambda number: torch.randn(2 + number, 3, size, size, generator=torch.Generator().manual_seed(0))


def ids(number: int) -> torch.Tensor:
    """Sequences of other lengths."""
    return torch.randint(VOCABULARY, (2, 12 + 5 * number), generator=torch.Generator().manual_seed(0))


class Case(NamedTuple):
    build: Callable[[], nn.Module]
    inputs: Callable[[int], torch.Tensor]


SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
CASES = {
    "vit": Case(timm_model("vit_tiny_patch16_224", img_size=32, depth=2), images(32)),
    "vit-layer-scale": Case(timm_model("vit_tiny_patch16_224", img_size=32, depth=1, init_values=0.1), images(32)),
    "deit3": Case(timm_model("deit3_small_patch16_224", img_size=32, depth=2), images(32)),
    "mixer": Case(mixer, images(64)),
    "eva02": Case(timm_model("eva02_tiny_patch14_224", img_size=28, depth=2), images(28)),
    "swin": Case(timm_model("swin_tiny_patch4_window7_224", img_size=56, depths=(2, 1)), images(56)),
    "convnext": Case(timm_model("convnext_tiny", depths=(1, 1, 1, 1), dims=(32, 32, 64, 64)), images(64)),
    "gpt2": Case(
        hugging_face(Text, "gpt2", "AutoModelForCausalLM", vocab_size=VOCABULARY, n_layer=2, n_embd=32, n_head=4), ids
    ),
    "bert": Case(hugging_face(Text, "bert", "AutoModel", intermediate_size=64, **SMALL), ids),
    "llama": Case(
        hugging_face(Text, "llama", "AutoModelForCausalLM", intermediate_size=64, num_key_value_heads=2, **SMALL), ids
    ),
    "opt": Case(
        hugging_face(Text, "opt", "AutoModelForCausalLM", ffn_dim=64, word_embed_proj_dim=32, **SMALL), ids
    ),
    "t5": Case(
        hugging_face(
            Translation, "t5", "AutoModelForSeq2SeqLM",
            vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0,
        ),
        ids,
    ),
    "clip": Case(
        hugging_face(
            Vision, "clip_vision_model", "AutoModel",
            intermediate_size=64, image_size=32, patch_size=8, **{k: v for k, v in SMALL.items() if k != "vocab_size"},
        ),
        images(32),
    ),
}  # fmt: skip


UNCALLED = {"eva02": {"blocks.0.attn.qkv", "blocks.1.attn.qkv"}}


@functools.cache
def dense(name: str) -> nn.Module:
    """A model with numbers everywhere: a head of zeros or a norm of ones would hide errors. Copy it before changing it."""
    torch.manual_seed(0)
    model = CASES[name].build().double().eval()
    if hasattr(getattr(model, "model", None), "config"):
        model.model.config.use_cache = False
    fill(model, torch.Generator().manual_seed(0))
    return model


def sparse(name: str, spec: padst.SparsitySpec) -> nn.Module:
    return padst.sparsify(copy.deepcopy(dense(name)), spec)


def explained(model: nn.Module, *inputs: Any) -> padst.Explanation:
    with torch.no_grad():
        return padst.explain(model, *inputs, options=OPTIONS)


def double(inputs: torch.Tensor) -> torch.Tensor:
    return inputs.double() if inputs.is_floating_point() else inputs


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", CASES)
def test_every_permutation_is_placed_and_the_function_is_kept(name: str, structure: str) -> None:
    model, inputs = sparse(name, STRUCTURES[structure]), CASES[name].inputs
    assert_equivalent(model, double(inputs(0)), how=("exact", "passes"), again=[(double(inputs(1)),)], options=OPTIONS)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", CASES)
def test_what_became_of_every_permutation_is_told(name: str, structure: str) -> None:
    model = sparse(name, STRUCTURES[structure])
    explanation = explained(model, double(CASES[name].inputs(0)))
    account, fates = explanation.permutations, explanation.fates
    called = [layer for layer in explanation.layers if layer.kernel == "aten"]
    assert (explanation.compilations, explanation.graph_breaks) == (1, ())
    assert account.total == len(called) == len(fates)
    # EVA-02 does not call its qkv layer, but reads its weight.
    assert {layer.name for layer in explanation.layers if layer.kernel == "eager"} == UNCALLED.get(name, set())
    assert account.remaining == 0
    assert account.fused == sum(fate.outcome == "read by the kernel" for fate in fates)
    assert account.folded == sum(fate.outcome.startswith("folded") for fate in fates)
    assert not [fate for fate in fates if fate.reason in ("", "no rule applies to it")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "structure"), [("vit", "block"), ("gpt2", "diagonal"), ("llama", "nm"), ("swin", "block"), ("t5", "block")]
)
def test_the_compiled_backend_computes_the_same(name: str, structure: str) -> None:
    model, inputs = sparse(name, STRUCTURES[structure]).float(), CASES[name].inputs
    assert_equivalent(model, inputs(0), how=("backend",), again=[(inputs(1),)], options=OPTIONS)


# ---- permutations that vanish


def block(*targets: str, permutation: str = "random") -> padst.SparsitySpec:
    return padst.SparsitySpec("block:8", 0.5, permutation=permutation, targets=targets, ignore=())


VANISH = {
    "mlp of a vit": ("vit", "*.fc2"),
    "mlp of a vit with layer-scale": ("vit-layer-scale", "*.fc2"),
    "mlp of gpt2": ("gpt2", "*.mlp.c_proj"),
    "mlp of bert": ("bert", r"re:.*layer\.\d+\.output\.dense"),
    "mlp of opt": ("opt", "*.fc2"),
    "mlp of t5": ("t5", "*.wo"),
    "mlp of clip": ("clip", "*.fc2"),
    "mlp of swin": ("swin", "*.fc2"),
    "mlp of convnext": ("convnext", "*.fc2"),
    "gated mlp of llama": ("llama", "*.down_proj"),
    "gated mlp of eva02": ("eva02", "*.mlp.fc2"),
    "tokens of a mixer": ("mixer", "*.mlp_tokens.fc2"),
    "channels of a mixer": ("mixer", "*.mlp_channels.fc2"),
}


def assert_all_fold(model: nn.Module, inputs: torch.Tensor) -> None:
    account = explained(model, inputs).permutations
    layers = len(list(padst.sparse_layers(model)))
    assert (account.total, account.folded, account.fused, account.remaining) == (layers, layers, 0, 0)
    assert_equivalent(model, inputs, how=("exact",), options=OPTIONS)


@pytest.mark.parametrize("case", VANISH)
def test_behind_dense_producers_every_permutation_folds(case: str) -> None:
    name, target = VANISH[case]
    assert_all_fold(sparse(name, block(target)), double(CASES[name].inputs(0)))


ATTENTION = {  # layers behind attention, heads, and how many of them share keys and values
    "vit": ("*.attn.proj", 3, 1),
    "gpt2": ("*.attn.c_proj", 4, 1),
    "bert": ("*.attention.output.dense", 4, 1),
    "llama": ("*.o_proj", 4, 2),
    "t5": ("*.o", 4, 1),
    "swin": ("layers.0.*.attn.proj", 3, 1),
}


def within_heads(features: int, heads: int, shared: int) -> torch.Tensor:
    """An order of its own within every head; heads that share keys and values share theirs."""
    size = features // heads
    orders = [permutation.random(size, torch.Generator().manual_seed(head // shared)) for head in range(heads)]
    return torch.cat([order + head * size for head, order in enumerate(orders)])


def whole_heads(features: int, heads: int, shared: int) -> torch.Tensor:
    """Heads in the opposite order; that keeps groups of them together."""
    return torch.arange(features).reshape(heads, -1).flip(0).flatten()


@pytest.mark.parametrize("order", [within_heads, whole_heads])
@pytest.mark.parametrize("name", ATTENTION)
def test_behind_attention_orders_that_keep_to_heads_fold(name: str, order: Callable[[int, int, int], torch.Tensor]) -> None:
    target, heads, shared = ATTENTION[name]
    model = sparse(name, block(target))
    for _, layer in padst.sparse_layers(model):
        layer.set_permutation(order(layer.in_features, heads, shared))
    assert_all_fold(model, double(CASES[name].inputs(0)))


STREAM = {
    "vit": ("*.qkv", "*.fc1"),
    "gpt2": ("*.c_attn", "*.c_fc"),
    "llama": ("*.q_proj", "*.k_proj", "*.v_proj", "*.gate_proj", "*.up_proj"),
}


@pytest.mark.parametrize("name", STREAM)
def test_a_permutation_that_all_readers_of_the_residual_stream_share_folds(name: str) -> None:
    model = sparse(name, block(*STREAM[name]))
    for _, layer in padst.sparse_layers(model):
        layer.set_permutation(permutation.random(layer.in_features, torch.Generator().manual_seed(7)))
    assert_all_fold(model, double(CASES[name].inputs(0)))
