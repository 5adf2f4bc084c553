"""`padst.verify`: right rewrites pass, wrong ones do not, and the modules come out as they went in."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import padst_compile as padst
from padst_compile import passes
from padst_compile.errors import (
    DataDependentError,
    NotEquivalentError,
    RandomOperationError,
    UnsupportedOperationError,
    VerificationInputError,
)

X = torch.empty(2, 4, 16)
ORDER = torch.randperm(16, generator=torch.Generator().manual_seed(0))
INVERSE = ORDER.argsort()


class Block(nn.Module):
    """A residual block with attention of two heads; every weight that a fault may leave out is ones or zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.register_buffer("scale", torch.ones(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.first(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.scale * self.out(attended)
        return x + self.down(F.gelu(self.up(self.second(x))))


def block() -> Block:
    torch.manual_seed(0)
    return Block().eval()


# --- right rewrites ---


def test_a_module_equals_itself_and_its_copy() -> None:
    model = block()
    assert padst.verify(model, model, X)
    assert padst.verify(model, copy.deepcopy(model), X)


def permuted_stream(model: Block) -> nn.Module:
    """The block on a permuted residual stream: the same function between two permutations."""

    class Permuted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = copy.deepcopy(model)
            with torch.no_grad():
                for norm in (self.block.first, self.block.second):
                    norm.weight.data, norm.bias.data = norm.weight[ORDER], norm.bias[ORDER]
                for reader in (self.block.qkv, self.block.up):
                    reader.weight.data = reader.weight[:, ORDER]
                for writer in (self.block.out, self.block.down):
                    writer.weight.data, writer.bias.data = writer.weight[ORDER], writer.bias[ORDER]
                self.block.scale = self.block.scale[ORDER]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.block(x[..., ORDER])[..., INVERSE]

    return Permuted().eval()


def test_a_relabelled_block_is_the_same_function_of_its_present_weights() -> None:
    model = block()
    assert padst.verify(model, permuted_stream(model), X)
    assert padst.verify(model, permuted_stream(model), X, weights="present")


class Steps(nn.Module):
    """A layer norm and a linear layer, written by a function of the module that owns them."""

    def __init__(self, forward: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.linear, self.again = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 16, bias=False)
        self.calculate = forward
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.calculate(self, x)


def linear_after_permuted_norm(self: Any, x: torch.Tensor) -> torch.Tensor:
    y = F.layer_norm(x[..., ORDER], (16,), self.norm.weight, self.norm.bias)
    return self.again(F.relu(self.linear(y)[..., ORDER]))


RIGHT: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "the permutation moves through the norm": lambda self, x: self.again(F.relu(self.linear(
        F.layer_norm(x, (16,), self.norm.weight[INVERSE], self.norm.bias[INVERSE])[..., ORDER])[..., ORDER])),
    "the permutation goes into the rows": lambda self, x: self.again(F.relu(F.linear(
        self.norm(x[..., ORDER]), self.linear.weight[ORDER], self.linear.bias[ORDER]))),
    "the permutation goes into the columns": lambda self, x: F.linear(
        F.relu(self.linear(self.norm(x[..., ORDER]))), self.again.weight[:, INVERSE]),
    "a product for a layer": lambda self, x: F.relu(self.linear(self.norm(x[..., ORDER]))) @ self.again.weight[:, INVERSE].T,
}  # fmt: skip
WRONG: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "the norm's weight is not permuted": lambda self, x: self.again(F.relu(self.linear(
        F.layer_norm(x, (16,), self.norm.weight, self.norm.bias[INVERSE])[..., ORDER])[..., ORDER])),
    "the norm's bias is not permuted": lambda self, x: self.again(F.relu(self.linear(
        F.layer_norm(x, (16,), self.norm.weight[INVERSE], self.norm.bias)[..., ORDER])[..., ORDER])),
    "the norm's weight goes the other way": lambda self, x: self.again(F.relu(self.linear(
        F.layer_norm(x, (16,), self.norm.weight[ORDER], self.norm.bias[ORDER])[..., ORDER])[..., ORDER])),
    "the bias is not permuted": lambda self, x: self.again(F.relu(F.linear(
        self.norm(x[..., ORDER]), self.linear.weight[ORDER], self.linear.bias))),
    "the bias is dropped": lambda self, x: self.again(F.relu(F.linear(self.norm(x[..., ORDER]), self.linear.weight[ORDER]))),
    "the inverse for the permutation": lambda self, x: F.linear(
        F.relu(self.linear(self.norm(x[..., ORDER]))), self.again.weight[:, ORDER]),
    "rows for columns": lambda self, x: F.linear(F.relu(self.linear(self.norm(x[..., ORDER]))), self.again.weight[INVERSE]),
    "one permutation forgotten": lambda self, x: self.again(F.relu(self.linear(self.norm(x[..., ORDER])))),
    "another activation": lambda self, x: self.again(F.gelu(self.linear(self.norm(x[..., ORDER]))[..., ORDER])),
    "another epsilon": lambda self, x: self.again(F.relu(self.linear(
        F.layer_norm(x[..., ORDER], (16,), self.norm.weight, self.norm.bias, 1e-6))[..., ORDER])),
    "one entry shifted": lambda self, x: linear_after_permuted_norm(self, torch.cat([x[..., :1], x[..., :15]], -1)),
    "a layer used twice": lambda self, x: self.again(self.again(F.relu(self.linear(self.norm(x[..., ORDER]))[..., ORDER]))),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_rewrite_is_accepted(name: str) -> None:
    padst.verify(Steps(linear_after_permuted_norm), Steps(RIGHT[name]), X).raise_if_different()


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_rewrite_is_caught(name: str) -> None:
    assert not padst.verify(Steps(linear_after_permuted_norm), Steps(WRONG[name]), X, seeds=(0,))


class Faulty(Block):
    """The block with one fault."""

    fault = ""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wrong = self.fault
        q, k, v = self.qkv(self.first(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        q = q.roll(1, 1) if wrong == "off by one head" else q
        k = v if wrong == "values for keys" else k
        attended = F.scaled_dot_product_attention(
            q, k, v, is_causal=wrong == "causal", scale=0.35 if wrong == "scale" else None
        )
        attended = attended.flatten(2).view(2, 4, 16) if wrong == "heads not merged" else attended.transpose(1, 2).flatten(2)
        out = self.out(attended)
        x = out if wrong == "residual dropped" else x + (out if wrong == "scale forgotten" else self.scale * out)
        norm = self.first if wrong == "the other norm" else self.second
        hidden = F.gelu(self.up(norm(x)), approximate="tanh" if wrong == "tanh" else "none")
        result = x + self.down(hidden)
        return result.clone().index_fill_(1, torch.tensor([3]), 0.0) if wrong == "one token lost" else result


@pytest.mark.parametrize(
    "fault",
    ["off by one head", "values for keys", "causal", "scale", "heads not merged", "residual dropped", "scale forgotten",
     "the other norm", "tanh", "one token lost"],
)  # fmt: skip
def test_a_fault_in_a_transformer_block_is_caught(fault: str) -> None:
    model = Faulty().eval()
    wrong = copy.deepcopy(model)
    assert padst.verify(model, wrong, X)
    wrong.fault = fault
    found = padst.verify(model, wrong, X)
    assert not found
    assert found.seeds == (0,)


# --- verdicts ---


def test_a_verdict_says_what_differs_and_how_sure_it_is() -> None:
    model, wrong = block(), block()
    with torch.no_grad():
        wrong.down.bias[3] += 1
    equal, different = padst.verify(model, model, X), padst.verify(model, wrong, X)
    assert equal.seeds == (0, 1)
    assert 0 < equal.false_accept_bound < 1e-12
    assert equal.seconds > 0
    assert "equal under 2 seeds" in str(equal)
    equal.raise_if_different()
    assert different.first_difference is not None
    assert "8 of 128 entries differ, the first at [0, 0, 3]" in str(different)
    assert different.first_difference.entries == 8
    with pytest.raises(NotEquivalentError, match="8 of 128 entries differ"):
        different.raise_if_different()


def test_more_seeds_make_a_false_verdict_less_likely() -> None:
    bounds = [padst.verify(block(), block(), X, seeds=range(count)).false_accept_bound for count in (1, 2, 3)]
    assert bounds[1] == pytest.approx(bounds[0] ** 2)
    assert bounds[2] == pytest.approx(bounds[0] ** 3)


class Returns(nn.Module):
    """Whatever a function returns."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


@dataclasses.dataclass
class Output:
    hidden: torch.Tensor
    count: int


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        (lambda x: {"a": x, "b": (x, -x)}, lambda x: {"a": x, "b": (x, x)}, r"output\['b'\]\[1\]: 128 of 128 entries differ"),
        (lambda x: {"a": x}, lambda x: {"a": x, "b": x}, r"output\['b'\]: only after has it"),
        (lambda x: (x, 1), lambda x: (x, 2), r"output\[1\]: 1 became 2"),
        (lambda x: x, lambda x: x.flatten(), r"shape \[2, 4, 16\] became \[128\]"),
        (lambda x: x, lambda x: x.double(), "dtype torch.float32 became torch.float64"),
        (lambda x: Output(x, 1), lambda x: Output(2 * x, 1), r"output<Output>\['hidden'\]"),
        (lambda x: Output(x, 1), lambda x: Output(x, 2), r"output<Output>\['count'\]: 1 became 2"),
        (lambda x: x.add_(1), lambda x: x + 1, "output written to input 0: only before has it"),
        (lambda x: (x.shape, torch.arange(3)), lambda x: (x.shape, torch.arange(3) + 1), "3 of 3 entries differ"),
        (lambda x: None, lambda x: x, "None became"),
    ],
)
def test_outputs_of_any_form_are_compared(one: Callable[..., Any], other: Callable[..., Any], message: str) -> None:
    assert padst.verify(Returns(one), Returns(one), X)
    with pytest.raises(NotEquivalentError, match=message):
        padst.verify(Returns(one), Returns(other), X).raise_if_different()


def test_inputs_are_given_by_position_or_keyword() -> None:
    one = Returns(lambda x, index, scale=1.0: x[:, index] * scale)
    other = Returns(lambda x, index, scale=1.0: x.index_select(1, index) * scale)
    arguments = {"index": torch.tensor([2, 0]), "scale": 3.0}
    assert padst.verify(one, other, X, kwargs=arguments)
    assert not padst.verify(one, Returns(lambda x, index, scale: x[:, index.flip(0)] * scale), X, kwargs=arguments)


# --- weights ---


def test_weights_of_ones_do_not_hide_a_fault() -> None:
    both = nn.Sequential(nn.LayerNorm(16)), nn.Sequential(nn.LayerNorm(16))
    wrong = copy.deepcopy(both[0])
    wrong.forward = lambda x: F.layer_norm(x, (16,), wrong[0].weight)  # type: ignore[method-assign]  # the bias, which is zero
    assert padst.verify(*both, X)
    assert not padst.verify(both[0], wrong, X)
    assert padst.verify(both[0], wrong, X, weights="present")


def test_views_of_shared_memory_get_views_of_the_same_residues() -> None:
    model = nn.Linear(16, 8)
    other = Returns(lambda x: F.linear(x, other.turned.T, other.bias[2:10]))
    other.register_buffer("turned", model.weight.detach().T)
    whole = torch.cat([torch.zeros(2), model.bias.detach(), torch.zeros(2)])
    model.bias = nn.Parameter(whole[2:10])
    other.register_buffer("bias", whole)
    assert padst.verify(model, other, X)


def test_tied_weights_stay_tied() -> None:
    one, other = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
    other.weight = one.weight
    assert padst.verify(nn.Sequential(one, other), nn.Sequential(other, one), X)
    assert padst.verify(nn.Sequential(one, other), copy.deepcopy(nn.Sequential(one, other)), X)


def test_modules_come_out_untouched() -> None:
    class Counting(Block):
        steps: torch.Tensor
        running: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("steps", torch.zeros((), dtype=torch.long))
            self.register_buffer("running", torch.zeros(16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.steps += 1
            self.running.mul_(0.5).add_(x.mean((0, 1)))
            vars(self).update({"kept": x, "calls": vars(self).get("calls", 0) + 1})
            return super().forward(x)

    model = Counting().eval()
    state = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    attributes = set(vars(model))
    x = torch.randn(2, 4, 16)
    given = x.clone()
    assert padst.verify(model, copy.deepcopy(model), x)
    assert set(vars(model)) == attributes
    assert torch.equal(x, given)
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert tensor is state[name][0]
        assert torch.equal(tensor, state[name][1])


def test_a_buffer_written_otherwise_is_a_difference() -> None:
    class Running(nn.Module):
        running: torch.Tensor
        factor = 0.5

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("running", torch.zeros(16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.running.mul_(self.factor).add_(x.mean((0, 1)))
            return x

    model, wrong = Running(), Running()
    assert padst.verify(model, wrong, X)
    wrong.factor = 0.25
    with pytest.raises(NotEquivalentError, match="output written to running: 16 of 16"):
        padst.verify(model, wrong, X).raise_if_different()


# --- refusals ---


def test_dropout_is_refused_while_training() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.1))
    with pytest.raises(RandomOperationError, match=r"aten::dropout.*call \.eval\(\).*'1' \(Dropout\)"):
        padst.verify(model, model, X)
    assert padst.verify(model.eval(), model, X)


def test_an_unknown_operator_is_named_with_its_module() -> None:
    class Routed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.topk(2).values

    model = nn.Sequential(nn.Linear(16, 16), Routed())
    with pytest.raises(DataDependentError, match=r"aten::topk.* in '1' \(Routed\): return x.topk\(2\).values"):
        padst.verify(model, model, X)
    with pytest.raises(UnsupportedOperationError, match=r"\(Routed\): topk = x.topk\(2\)"):
        padst.verify(fx.symbolic_trace(Routed()), Routed(), X)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((F.relu, nn.ReLU()), {}, r"two nn\.Modules, got function; wrap it"),
        ((nn.ReLU(), nn.ReLU()), {"seeds": ()}, "at least one seed"),
        ((nn.ReLU(), torch.compile(nn.ReLU())), {}, "a compiled module uncompiled; compile with options"),
        ((nn.ReLU(), nn.ReLU()), {"weights": "all"}, "'any' or 'present', got 'all'"),
    ],
)
def test_a_wrong_request_is_named(args: Any, options: Any, message: str) -> None:
    with pytest.raises(VerificationInputError, match=message):
        padst.verify(*args, X, **options)


# --- graphs ---


def test_the_passes_keep_a_traced_model() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.LayerNorm(16), nn.Linear(16, 16)).eval()
    padst.sparsify(model, padst.SparsitySpec("block:4", 0.5, permutation="random", permutation_side="smaller"))
    before = fx.symbolic_trace(model)
    after = copy.deepcopy(before)
    assert passes.run(after).permutations.total > 0
    assert padst.verify(before, after, X)


class Gated(nn.Module):
    """What export turns into an operator of its own: a region without gradients, a cast and a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.block = block()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            gate = self.block(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            product = self.block(x)
        return torch.utils.checkpoint.checkpoint(self.block, product.float(), use_reentrant=False) * gate


def test_an_exported_program_is_the_module() -> None:
    model = Gated().eval()
    assert padst.verify(model, torch.export.export(model, (torch.randn(2, 4, 16),)).module(), X)


def mha() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1, enable_nested_tensor=False)


def vit() -> nn.Module:
    return timm("vit_tiny_patch16_224", img_size=32)


def convnext() -> nn.Module:
    return timm("convnext_tiny", depths=(1, 1, 1, 1), dims=(32, 32, 64, 64))


def resnet() -> nn.Module:
    return timm("resnet10t")


@pytest.mark.parametrize("build", [block, mha, vit, convnext, resnet])
def test_the_decompositions_of_pytorch_agree_with_our_definitions(build: Callable[[], nn.Module]) -> None:
    """An independent witness: each composite operator, and the smaller ones that PyTorch says it is made of."""
    model = build().eval()
    x = torch.randn(2, 4, 16) if build in (block, mha) else torch.randn(1, 3, 32, 32)
    after = torch.export.export(model, (x,)).run_decompositions().module()
    padst.verify(model, after, x).raise_if_different()


# --- models that people use ---

SPEC = padst.SparsitySpec("block:8", 0.25, permutation="random")  # no feature is left without any weight
IDS = torch.arange(12).reshape(2, 6) % 50
SIZES = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def timm(name: str, **options: Any) -> nn.Module:
    model: nn.Module = pytest.importorskip("timm").create_model(name, **options)
    if hasattr(model, "blocks"):
        model.blocks = model.blocks[:2]
    return model


def swin() -> nn.Module:
    return timm("swin_tiny_patch4_window7_224", img_size=56, embed_dim=32, depths=(2, 2), num_heads=(2, 4))


def transformers(model: str, config: str, **sizes: Any) -> nn.Module:
    t = pytest.importorskip("transformers")
    built: nn.Module = getattr(t, model)(getattr(t, config)(**sizes))
    return built


def gpt2(attention: str = "sdpa") -> nn.Module:
    sizes = {"vocab_size": 50, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4, "attn_implementation": attention}
    return transformers("GPT2LMHeadModel", "GPT2Config", bos_token_id=0, eos_token_id=0, **sizes)


def opt() -> nn.Module:
    sizes = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32}
    return transformers("OPTForCausalLM", "OPTConfig", vocab_size=50, max_position_embeddings=16, **sizes)


def t5() -> nn.Module:
    sizes = {"vocab_size": 50, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    return transformers("T5ForConditionalGeneration", "T5Config", decoder_start_token_id=0, **sizes)


def clip() -> nn.Module:
    return transformers("CLIPVisionModel", "CLIPVisionConfig", **SIZES, image_size=32, patch_size=16)


IMAGE = {"x": torch.empty(1, 3, 32, 32)}
TEXT = {"input_ids": IDS}
MASK = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, torch.Tensor]]] = {
    "vit": (vit, IMAGE),
    "mixer": (lambda: timm("mixer_s16_224", img_size=64), {"x": torch.empty(1, 3, 64, 64)}),
    "convnext": (convnext, IMAGE),
    "swin": (swin, {"x": torch.empty(1, 3, 56, 56)}),
    "eva02": (lambda: timm("eva02_tiny_patch14_224", img_size=28), {"x": torch.empty(1, 3, 28, 28)}),
    "deit3": (lambda: timm("deit3_small_patch16_224", img_size=32), IMAGE),
    "gpt2": (gpt2, TEXT),
    "bert": (lambda: transformers("BertModel", "BertConfig", **SIZES), {**TEXT, "attention_mask": MASK}),
    "llama": (lambda: transformers("LlamaForCausalLM", "LlamaConfig", **SIZES, num_key_value_heads=2), TEXT),
    "opt": (opt, {**TEXT, "attention_mask": MASK}),
    "t5": (t5, {**TEXT, "decoder_input_ids": IDS}),
    "clip": (clip, {"pixel_values": torch.empty(1, 3, 32, 32)}),
}  # fmt: skip


def swap_two(layer: padst.PermutedSparseLinear) -> None:
    """Exchange two entries of a layer's permutation, such that its dense weight changes."""
    assert layer.permutation is not None
    weight, order = layer.dense_weight(), layer.permutation.clone()
    for other in range(1, len(order)):
        swapped = order.clone()
        swapped[[0, other]] = order[[other, 0]]
        layer.set_permutation(swapped)
        if not torch.equal(layer.dense_weight(), weight):
            return
    raise AssertionError("no swap changes the layer")


@pytest.mark.parametrize("name", MODELS)
def test_a_sparse_model_equals_its_dense_twin_until_two_indices_are_swapped(name: str) -> None:
    build, inputs = MODELS[name]
    torch.manual_seed(0)
    model = padst.sparsify(build().eval(), SPEC)
    dense = padst.densify(copy.deepcopy(model))
    padst.verify(model, dense, kwargs=inputs).raise_if_different()
    for _, layer in (*list(padst.sparse_layers(model))[:1], *list(padst.sparse_layers(model))[-1:]):
        wrong = layer.permutation.clone()  # type: ignore[union-attr]  # random permutations
        swap_two(layer)
        assert not padst.verify(model, dense, kwargs=inputs, seeds=(0,))
        layer.set_permutation(wrong)


def test_two_implementations_of_attention_are_equal() -> None:
    eager, fused = gpt2("eager").eval(), gpt2("sdpa").eval()
    fused.load_state_dict(eager.state_dict())
    padst.verify(eager, fused, kwargs=TEXT).raise_if_different()
