"""Models that people use, made sparse and compiled: equal to eager, in one graph, with no permutation left over."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

import padst_compile as padst
from padst_compile.backend import compile_graph
from padst_compile.options import Options

SPEC = padst.SparsitySpec("block:16", 0.5, permutation="random", permutation_side="input")
IDS = torch.arange(12).reshape(2, 6) % 50


def vit() -> nn.Module:
    timm = pytest.importorskip("timm")
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", img_size=32)
    model.blocks = model.blocks[:2]
    return model


def mixer() -> nn.Module:
    timm = pytest.importorskip("timm")
    model: nn.Module = timm.create_model("mixer_s32_224", img_size=64)
    model.blocks = model.blocks[:2]
    return model


def gpt2() -> nn.Module:
    t = pytest.importorskip("transformers")
    config = t.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=2, attn_implementation="sdpa", use_cache=False
    )
    return t.GPT2LMHeadModel(config)


def bert() -> nn.Module:
    t = pytest.importorskip("transformers")
    return t.BertModel(
        t.BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    )


def llama() -> nn.Module:
    t = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return t.LlamaForCausalLM(t.LlamaConfig(vocab_size=50, num_key_value_heads=2, use_cache=False, **sizes))


def t5() -> nn.Module:
    t = pytest.importorskip("transformers")
    config = t.T5Config(vocab_size=50, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, use_cache=False)
    return t.T5ForConditionalGeneration(config)


@dataclasses.dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    inputs: dict[str, torch.Tensor]
    output: str | None = None


TEXT = {"input_ids": IDS}
CASES = {
    "vit": Case(vit, {"x": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))}),
    "mixer": Case(mixer, {"x": torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))}),
    "gpt2": Case(gpt2, TEXT, "logits"),
    "bert": Case(bert, TEXT, "last_hidden_state"),
    "llama": Case(llama, TEXT, "logits"),
    "t5": Case(t5, {**TEXT, "decoder_input_ids": IDS}, "logits"),
}


def compiled_cheaply(model: nn.Module, reports: list[Any], policy: Any) -> Any:
    def compiler(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        compiled, done = compile_graph(gm, inputs, Options(policy), lambda graph, _: graph)
        reports.append(done.report)
        return compiled

    return torch.compile(model, backend=compiler, fullgraph=True)


@pytest.mark.parametrize("policy", ["sparse", "dense"])
@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("name", CASES)
def test_the_compiled_model_equals_eager(name: str, side: Any, policy: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    model = padst.sparsify(case.build(), dataclasses.replace(SPEC, permutation_side=side)).double().eval()
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in case.inputs.items()}
    reports: list[Any] = []
    compiled = compiled_cheaply(model, reports, policy)

    def call(module: Any) -> torch.Tensor:
        result = module(*inputs.values()) if case.output is None else module(**inputs)
        return result if case.output is None else getattr(result, case.output)

    with torch.no_grad():
        expected = call(model)
        torch.testing.assert_close(call(compiled), expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())
    assert len(reports) == 1
    if side == "input":
        assert (reports[0].permutations.total, reports[0].permutations.remaining) == (len(list(padst.sparse_layers(model))), 0)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_language_models_train(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    model = padst.sparsify(case.build(), SPEC).double().eval()
    compiled = compiled_cheaply(model, [], "sparse")
    gradients = []
    for module in (compiled, model):
        model.zero_grad()
        module(input_ids=IDS).logits.square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * max(1e-3, expected.abs().max().item()))


def test_inductor_compiles_a_language_model() -> None:
    from padst_compile.backend import padst as backend

    torch.manual_seed(0)
    model = padst.sparsify(llama(), SPEC).eval()
    with torch.no_grad():
        found = torch.compile(model, backend=backend, fullgraph=True, options={"kernels": "dense"})(input_ids=IDS).logits
        expected = model.double()(input_ids=IDS).logits
    # Two blocks of about ten products over at most 64 terms each.
    torch.testing.assert_close(
        found.double(), expected, rtol=0, atol=1280 * torch.finfo(torch.float32).eps * expected.abs().max().item()
    )
