"""`sparsify` and `densify`: which layers change, what is kept, and that an error leaves no trace."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import padst_compile as padst
from padst_compile import NM, Block, Diagonal, PermutedSparseLinear, SparsitySpec, Unstructured, permutation
from padst_compile.errors import (
    AlreadySparseError,
    CompiledModelError,
    EmptyLayerError,
    MetaDeviceError,
    NothingToSparsifyError,
    PadstError,
    PatternError,
    SpecError,
    StructureMismatchError,
)
from padst_compile.structures import Structure
from padst_compile.testing.accuracy import assert_within_error_bound

SPEC = SparsitySpec(Block(4), 0.5, permutation="random")


class Net(nn.Module):
    """A small classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"fc1": nn.Linear(16, 24), "act": nn.ReLU(), "fc2": nn.Linear(24, 16)}) for _ in range(2)
        )
        self.head = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [..., 16] -> [..., 8]."""
        for block in self.blocks:
            x = x + block["fc2"](block["act"](block["fc1"](x)))  # type: ignore[index]  # a ModuleDict
        result: torch.Tensor = self.head(x)
        return result


BLOCK_LAYERS = ["blocks.0.fc1", "blocks.0.fc2", "blocks.1.fc1", "blocks.1.fc2"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def sparse_names(model: nn.Module) -> list[str]:
    """Names of the sparse layers."""
    return [name for name, _ in padst.sparse_layers(model)]


def reasons(model: nn.Module) -> dict[str, str]:
    """Why layers stayed dense."""
    return {refusal.name: refusal.reason for refusal in padst.sparsify_report(model).refusals}


def whole_numbers(model: nn.Module) -> nn.Module:
    """The model in float64 with small whole weights."""
    model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-3, 4, parameter.shape))
    return model


# ---- which layers


def test_linear_layers_change_in_place_and_heads_stay_dense() -> None:
    model = Net()
    head = model.head
    assert padst.sparsify(model, SPEC) is model
    assert sparse_names(model) == BLOCK_LAYERS
    assert model.head is head
    report = padst.sparsify_report(model)
    assert [plan.name for plan in report.layers] == BLOCK_LAYERS
    assert reasons(model) == {"head": "left dense by the specification"}


@pytest.mark.parametrize("name", ["head", "fc", "classifier", "lm_head", "score", "qa_outputs"])
def test_heads_by_their_usual_names_stay_dense(name: str) -> None:
    model = nn.ModuleDict({"encoder": nn.Linear(16, 16), name: nn.Linear(16, 16)})
    assert sparse_names(padst.sparsify(model, SPEC)) == ["encoder"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"targets": ("blocks.0.*",)}, BLOCK_LAYERS[:2]),
        ({"targets": ("*.fc1", "head")}, ["blocks.0.fc1", "blocks.1.fc1"]),
        ({"targets": (r"re:blocks\.\d\.fc2",)}, ["blocks.0.fc2", "blocks.1.fc2"]),
        ({"ignore": ()}, [*BLOCK_LAYERS, "head"]),
        ({"ignore": ("re:.*[02].*",)}, ["blocks.1.fc1", "head"]),
        ({"targets": ("*",), "ignore": ("*.fc?",)}, ["head"]),
    ],
    ids=str,
)
def test_patterns_choose_layers_and_ignore_wins(options: Mapping[str, Any], expected: list[str]) -> None:
    assert sparse_names(padst.sparsify(Net(), SparsitySpec(Block(4), 0.5, **options))) == expected


def test_in_a_mapping_the_first_match_decides_and_none_leaves_dense() -> None:
    model = Net()
    padst.sparsify(model, {"blocks.0.fc1": None, "*.fc1": SparsitySpec(NM(1, 4)), "blocks.*": SPEC, "head": SPEC})
    structures = {name: layer.config.structure for name, layer in padst.sparse_layers(model)}
    assert structures == {"blocks.0.fc2": Block(4), "blocks.1.fc1": NM(1, 4), "blocks.1.fc2": Block(4), "head": Block(4)}
    assert reasons(model) == {"blocks.0.fc1": "left dense by the specification"}


def test_a_layer_under_two_names_stays_one_layer() -> None:
    shared = nn.Linear(16, 16)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    padst.sparsify(model, SPEC)
    assert model[0] is model[2]
    assert isinstance(model[0], PermutedSparseLinear)
    padst.densify(model)
    assert model[0] is model[2]
    assert isinstance(model[0], nn.Linear)


def test_a_single_layer_is_returned_sparse_and_dense_again() -> None:
    layer = nn.Linear(16, 16)
    sparse: nn.Module = padst.sparsify(layer, SPEC)
    assert isinstance(sparse, PermutedSparseLinear)
    dense: nn.Module = padst.densify(sparse)
    assert type(dense) is nn.Linear


# ---- layers that must stay dense


class Scaled(nn.Linear):
    """A subclass with its own forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Twice the product."""
        return 2 * super().forward(x)


def integer() -> nn.Module:
    layer = nn.Linear(16, 16)
    layer.weight = nn.Parameter(torch.ones(16, 16, dtype=torch.int8), requires_grad=False)
    return layer


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still found in checkpoints
        return torch.nn.utils.weight_norm(nn.Linear(16, 16))


def hooked(register: str) -> nn.Module:
    layer = nn.Linear(16, 16)
    getattr(layer, register)(lambda *_: None)
    return layer


UNSUITABLE: list[tuple[Callable[[], nn.Module], str]] = [
    (lambda: Scaled(16, 16), "Scaled is a subclass of Linear whose forward may differ"),
    (lambda: nn.LazyLinear(16), "LazyLinear is a subclass"),
    (lambda: parametrizations.weight_norm(nn.Linear(16, 16)), "its parameters are parametrized; remove_parametrizations first"),
    (old_weight_norm, r"its weight is computed by a hook \(weight_norm, pruning\); remove it first"),
    (lambda: prune.l1_unstructured(nn.Linear(16, 16), "weight", 0.5), "its weight is computed by a hook"),
    (integer, "its weight is torch.int8, not a floating type"),
    (lambda: nn.Linear(16, 16, dtype=torch.complex64), "its weight is torch.complex64, not a floating type"),
    (lambda: hooked("register_forward_hook"), "it has hooks, which would be lost; remove them first"),
    (lambda: hooked("register_forward_pre_hook"), "it has hooks"),
    (lambda: hooked("register_full_backward_hook"), "it has hooks"),
    (lambda: hooked("register_full_backward_pre_hook"), "it has hooks"),
]


@pytest.mark.filterwarnings("ignore:Complex modules")
@pytest.mark.parametrize(("make", "reason"), UNSUITABLE, ids=[reason for _, reason in UNSUITABLE])
def test_a_layer_that_cannot_change_stays_dense_with_the_reason(make: Callable[[], nn.Module], reason: str) -> None:
    odd = make()
    model = nn.ModuleDict({"odd": odd, "plain": nn.Linear(16, 16)})
    padst.sparsify(model, SPEC)
    assert model["odd"] is odd
    assert sparse_names(model) == ["plain"]
    assert re.search(reason, reasons(model)["odd"])
    with pytest.raises(NothingToSparsifyError, match=f"no layer would become sparse .*{reason}"):
        padst.sparsify(nn.ModuleDict({"odd": make()}), SPEC)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_without_weights_stays_dense() -> None:
    model = nn.ModuleDict({"none": nn.Linear(0, 4), "plain": nn.Linear(16, 16)})
    assert reasons(padst.sparsify(model, SPEC)) == {"none": "it has no weights"}


def test_the_output_projection_of_attention_stays_dense() -> None:
    model = nn.TransformerEncoderLayer(16, 2, 32)
    padst.sparsify(model, SPEC)
    assert sparse_names(model) == ["linear1", "linear2"]
    assert "NonDynamicallyQuantizableLinear is a subclass" in reasons(model)["self_attn.out_proj"]


# ---- ties


def tied_pair() -> nn.ModuleDict:
    """Two layers that share a weight and have a bias each."""
    model = nn.ModuleDict({"a": nn.Linear(16, 16), "b": nn.Linear(16, 16)})
    model["b"].weight = model["a"].weight
    return model


def test_tied_layers_stay_tied_when_sparse_and_when_dense_again() -> None:
    model = tied_pair()
    padst.sparsify(whole_numbers(model), SPEC)
    a, b = model["a"], model["b"]
    assert isinstance(a, PermutedSparseLinear)
    assert isinstance(b, PermutedSparseLinear)
    assert a.values is b.values
    assert a.bias is not b.bias
    a.set_permutation(torch.randperm(16))
    assert torch.equal(a.weight, b.weight)
    x = torch.randint(-3, 4, (3, 16)).double()
    assert torch.equal(a(x) - a.bias, b(x) - b.bias)
    assert len(list(model.parameters())) == 3
    padst.densify(model)
    assert model["a"].weight is model["b"].weight


def test_a_weight_shared_with_an_embedding_stays_dense() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(16, 16), "out": nn.Linear(16, 16), "other": nn.Linear(16, 16)})
    model["out"].weight = model["embed"].weight
    padst.sparsify(model, SPEC)
    assert sparse_names(model) == ["other"]
    assert reasons(model) == {"out": "its weight is shared with 'embed', which stays dense"}
    assert model["out"].weight is model["embed"].weight


def test_a_weight_shared_with_an_embedding_need_not_fit_the_structure() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(16, 17), "out": nn.Linear(17, 16), "other": nn.Linear(16, 16)})
    model["out"].weight = model["embed"].weight
    padst.sparsify(model, SparsitySpec(NM(2, 4)))
    assert sparse_names(model) == ["other"]


def test_a_weight_shared_with_a_layer_left_dense_stays_dense() -> None:
    model = nn.ModuleDict({**tied_pair(), "c": nn.Linear(16, 16)})
    padst.sparsify(model, {"a": None, "*": SPEC})
    assert sparse_names(model) == ["c"]
    assert reasons(model)["b"] == "its weight is shared with 'a', which stays dense"
    assert model["a"].weight is model["b"].weight


def test_tied_layers_with_different_specifications_stay_dense() -> None:
    model = nn.ModuleDict({**tied_pair(), "c": nn.Linear(16, 16)})
    padst.sparsify(model, {"a": SPEC, "b": SparsitySpec(NM(1, 4)), "c": SPEC})
    assert sparse_names(model) == ["c"]
    assert set(reasons(model)) == {"a", "b"}


def test_a_weight_shared_with_its_own_transpose_in_a_conv1d_stays_dense() -> None:
    model = nn.ModuleDict({"linear": nn.Linear(16, 16), "conv": Conv1D(16, 16), "c": nn.Linear(16, 16)})
    model["conv"].weight = model["linear"].weight
    padst.sparsify(model, SPEC)
    assert sparse_names(model) == ["c"]
    assert set(reasons(model)) == {"linear", "conv"}


# ---- requests that are refused


def compiled() -> nn.Module:
    model = torch.compile(Net())
    assert isinstance(model, nn.Module)
    return model


def compiled_submodule() -> nn.Module:
    model = Net()
    model.blocks[0].compile()
    return model


def compiled_in_place() -> nn.Module:
    model = Net()
    model.compile()
    return model


def on_meta() -> nn.Module:
    model = Net()
    model.blocks[1].to("meta")
    return model


def invalid_after_valid(structure: Structure, sparsity: float | None = None) -> dict[str, SparsitySpec]:
    """A request whose first layers are fine and whose last is not."""
    return {"blocks.*": SPEC, "head": SparsitySpec(structure, sparsity)}


REFUSED: list[tuple[str, Callable[[], nn.Module], Any, type[PadstError], str]] = [
    ("no pattern match", Net, SparsitySpec(Block(4), 0.5, targets=("blocks.0.fc3",)), PatternError,
     r"'blocks\.0\.fc3' matches none of the 5 linear layers; did you mean 'blocks\.0\.fc[12]'"),
    ("no mapping match", Net, {"*": SPEC, "haed": None}, PatternError, "'haed' matches none .* did you mean 'head'"),
    ("bad mapping pattern", Net, {"re:(": SPEC}, PatternError, "is no regular expression"),
    ("empty pattern", Net, {"": SPEC}, PatternError, "takes non-empty strings"),
    ("no specification", Net, "block:4", PatternError, "expected a SparsitySpec or a mapping .*, got str"),
    ("no specification in a mapping", Net, {"*": "block:4"}, SpecError, "maps to 'block:4'; map it to a SparsitySpec"),
    ("structure", Net, invalid_after_valid(NM(8, 9)), StructureMismatchError, "layer 'head': .*nearest m that divides is 16"),
    ("diagonal", Net, invalid_after_valid(Diagonal(3), 0.5), StructureMismatchError, "layer 'head': .*nearest group"),
    ("empty layer", Net, invalid_after_valid(Block(8), 0.9), EmptyLayerError, "layer 'head': .*at most 0.5"),
    ("no layers", lambda: nn.Sequential(nn.ReLU()), SPEC, NothingToSparsifyError, "has no linear layer"),
    ("all ignored", Net, SparsitySpec(Block(4), 0.5, ignore=("*",)), NothingToSparsifyError, "change targets, ignore or the"),
    ("already sparse", lambda: padst.sparsify(Net(), SPEC), SPEC, AlreadySparseError, r"call padst\.densify\(model\) before"),
    ("compiled", compiled, SPEC, CompiledModelError, "call sparsify first, then torch.compile"),
    ("compiled in place", compiled_in_place, SPEC, CompiledModelError, "call sparsify first"),
    ("compiled part", compiled_submodule, SPEC, CompiledModelError, r"module 'blocks\.0' is already compiled"),
    ("meta", on_meta, SPEC, MetaDeviceError, r"layer 'blocks\.1\.fc1' is on the meta device; materialise it first"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "spec", "error", "message"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED]
)
def test_a_wrong_request_is_refused_and_leaves_the_model_untouched(
    make: Callable[[], nn.Module], spec: Any, error: type[PadstError], message: str
) -> None:
    model = make()
    modules, tensors = dict(model.named_modules()), model.state_dict(keep_vars=True)
    values = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    report = padst.sparsify_report(model)
    with pytest.raises(error, match=message) as raised:
        padst.sparsify(model, spec)
    assert type(raised.value) is error
    assert all(module is modules[name] for name, module in model.named_modules())
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(tensors)
    assert all(after[name] is tensor for name, tensor in tensors.items())
    assert all(tensor.is_meta or torch.equal(tensor, values[name]) for name, tensor in after.items())
    assert padst.sparsify_report(model) == report


def test_layers_on_the_meta_device_do_not_matter_where_they_stay_dense() -> None:
    model = on_meta()
    padst.sparsify(model, SparsitySpec(Block(4), 0.5, targets=("blocks.0.*",)))
    assert sparse_names(model) == BLOCK_LAYERS[:2]


# ---- which weights


@pytest.mark.parametrize("structure", [Block(4), NM(1, 4), Diagonal(), Diagonal(4), Unstructured()], ids=str)
@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("init", ["magnitude", "random"])
def test_the_kept_weights_have_their_dense_values(structure: Structure, side: Any, init: Any) -> None:
    layer = nn.Linear(16, 24, dtype=torch.float64)
    original = layer.weight.detach().clone()
    sparsity = None if isinstance(structure, NM) else 0.75
    spec = SparsitySpec(structure, sparsity, permutation="random", permutation_side=side, init=init)
    sparse: nn.Module = padst.sparsify(layer, spec)
    assert isinstance(sparse, PermutedSparseLinear)
    weight = sparse.weight.detach()
    mask = weight != 0
    assert torch.equal(weight, original * mask)
    assert int(mask.sum()) == sparse.active == 16 * 24 // 4


@pytest.mark.parametrize("structure", [Block(4), Block((2, 8)), NM(1, 4), Diagonal(), Diagonal(4), Unstructured()], ids=str)
@pytest.mark.parametrize("side", ["input", "output"])
def test_under_a_random_permutation_the_largest_weights_that_the_structure_allows_are_kept(
    structure: Structure, side: Any
) -> None:
    layer = nn.Linear(16, 24, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.randint(-50, 51, (24, 16)))
    original = layer.weight.detach().clone()
    sparsity = None if isinstance(structure, NM) else 0.75
    sparse: nn.Module = padst.sparsify(layer, SparsitySpec(structure, sparsity, permutation="random", permutation_side=side))
    assert isinstance(sparse, PermutedSparseLinear)
    assert sparse.permutation is not None
    # y = S x[p]: column j of S meets feature p[j]. y = (S x)[p]: row p[i] of S makes output i.
    order = sparse.permutation.long()
    permuted = original[:, order] if side == "input" else original[permutation.inverse(order)]
    best = structure.pack(permuted.abs(), structure.choose(permuted.abs(), 0.75))
    assert sparse.values.abs().sum() == best.sum()
    assert not permutation.is_identity(sparse.permutation)


def test_a_learned_permutation_starts_as_the_identity() -> None:
    sparse: nn.Module = padst.sparsify(nn.Linear(16, 24), SparsitySpec(Block(4), 0.5, permutation="learned"))
    assert isinstance(sparse, PermutedSparseLinear)
    assert sparse.permutation is not None
    assert permutation.is_identity(sparse.permutation)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_weights_keep_their_type(dtype: torch.dtype) -> None:
    for _, layer in padst.sparse_layers(padst.sparsify(Net().to(dtype), SPEC)):
        assert {parameter.dtype for parameter in layer.parameters()} == {dtype}


RANDOM = SparsitySpec(Block(4), 0.5, permutation="random", init="random")


def choices(layer: nn.Module) -> dict[str, torch.Tensor]:
    """The random choices of a layer."""
    return dict(layer.named_buffers())


def test_random_choices_depend_on_seed_and_name_alone() -> None:
    model, other = Net(), Net()
    for block in other.blocks:  # the same names in another order, beside other layers
        block["fc0"], block["fc1"] = nn.Linear(16, 16), block.pop("fc1")  # type: ignore[index, operator]  # a ModuleDict
    torch.manual_seed(1)
    with torch.device("meta"):  # a default device must not matter either
        padst.sparsify(model, RANDOM)
    torch.set_default_dtype(torch.float64)
    try:
        padst.sparsify(other, RANDOM)
    finally:
        torch.set_default_dtype(torch.float32)
    named = dict(padst.sparse_layers(other))
    for name, layer in padst.sparse_layers(model):
        for key, tensor in choices(layer).items():
            assert torch.equal(tensor, choices(named[name])[key])
    same_shape = [choices(named[name]) for name in ("blocks.0.fc1", "blocks.1.fc1")]
    assert not torch.equal(same_shape[0]["permutation"], same_shape[1]["permutation"])


def test_another_seed_makes_other_choices() -> None:
    first, second = (padst.sparsify(Net(), SparsitySpec(Block(4), 0.5, init="random", seed=seed)) for seed in (0, 1))
    columns = [dict(model.named_buffers())["blocks.0.fc1.columns"] for model in (first, second)]
    assert not torch.equal(columns[0], columns[1])


def test_the_global_random_state_is_left_alone() -> None:
    model, before = Net(), torch.get_rng_state()
    padst.densify(padst.sparsify(model, RANDOM))
    assert torch.equal(torch.get_rng_state(), before)


def test_erk_keeps_the_total_and_gives_small_layers_more() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 256), nn.Linear(256, 256))
    total = 64 * 64 + 64 * 256 + 256 * 256
    padst.sparsify(model, SparsitySpec(Unstructured(), 0.8, distribution="erk"))
    layers = [layer for _, layer in padst.sparse_layers(model)]
    assert abs(sum(layer.active for layer in layers) - 0.2 * total) <= 1.5  # each layer rounds once
    assert layers[0].density > layers[1].density > layers[2].density


def test_erk_shares_the_total_among_the_layers_that_become_sparse() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(64, 64), "tied": nn.Linear(64, 64), "a": nn.Linear(64, 64)})
    model["b"] = nn.Linear(64, 128)
    model["tied"].weight = model["embed"].weight
    padst.sparsify(model, SparsitySpec(Unstructured(), 0.8, distribution="erk"))
    layers = dict(padst.sparse_layers(model))
    assert set(layers) == {"a", "b"}
    assert abs(sum(layer.active for layer in layers.values()) - 0.2 * (64 * 64 + 64 * 128)) <= 1.0


# ---- there and back


def test_a_sparsified_model_can_be_copied_pickled_and_trained() -> None:
    model = padst.sparsify(Net(), SPEC)
    x = torch.randn(5, 16)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
        assert padst.sparsify_report(twin) == padst.sparsify_report(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    losses = []
    for _ in range(20):
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_densify_forgets_the_report_and_allows_another_sparsify() -> None:
    model = padst.densify(padst.sparsify(Net(), SPEC))
    assert sparse_names(model) == []
    assert padst.sparsify_report(model).layers == ()
    assert sparse_names(padst.sparsify(model, SPEC)) == BLOCK_LAYERS


def test_densify_leaves_a_dense_model_alone() -> None:
    model = Net()
    modules = dict(model.named_modules())
    assert padst.densify(model) is model
    assert all(module is modules[name] for name, module in model.named_modules())


@pytest.mark.parametrize("structure", [Block(16), NM(1, 4), Diagonal(), Unstructured()], ids=str)
@pytest.mark.parametrize("side", ["input", "smaller"])
def test_densify_is_exact_on_a_vision_transformer(structure: Structure, side: Any) -> None:
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, depth=1).eval()
    names, x = dict(model.named_modules()).keys(), torch.randn(1, 3, 224, 224, dtype=torch.float64)
    sparsity = None if isinstance(structure, NM) else 0.9
    padst.sparsify(model.double(), SparsitySpec(structure, sparsity, permutation="random", permutation_side=side))
    assert sparse_names(model) == ["blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2"]
    exact = {name: layer.weight.detach().clone() for name, layer in padst.sparse_layers(model)}
    sparse = captured(model, list(exact), x)
    padst.densify(model)
    assert dict(model.named_modules()).keys() == names
    for name, weight in exact.items():
        layer = model.get_submodule(name)
        assert type(layer) is nn.Linear
        assert torch.equal(layer.weight, weight)
        inputs, output = sparse[name]
        assert_same_product(layer, inputs, output)


@pytest.mark.parametrize("structure", [Block(16), NM(1, 4), Diagonal(), Unstructured()], ids=str)
@pytest.mark.parametrize("side", ["input", "smaller"])
def test_densify_is_exact_on_gpt2(structure: Structure, side: Any) -> None:
    config = GPT2Config(n_layer=2, n_embd=64, n_head=4, vocab_size=50, n_positions=16)
    model = GPT2LMHeadModel(config).eval().double()
    tokens = torch.randint(0, 50, (2, 7))
    sparsity = None if isinstance(structure, NM) else 0.75
    padst.sparsify(model, SparsitySpec(structure, sparsity, permutation="random", permutation_side=side, ignore=()))
    expected = [
        f"transformer.h.{i}.{part}" for i in range(2) for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    assert sparse_names(model) == expected
    assert reasons(model) == {"lm_head": "its weight is shared with 'transformer.wte', which stays dense"}
    exact = {name: layer.weight.detach().clone() for name, layer in padst.sparse_layers(model)}
    sparse = captured(model, expected, tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        padst.densify(model)
    for name in expected:
        layer = model.get_submodule(name)
        assert type(layer) is Conv1D
        assert torch.equal(layer.weight, exact[name])
        assert_same_product(layer, *sparse[name])
    assert model.lm_head.weight is model.transformer.wte.weight


def captured(model: nn.Module, names: list[str], *inputs: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What every named layer reads and makes when the model runs."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def hook(name: str) -> Callable[..., None]:
        def record(_: nn.Module, read: tuple[torch.Tensor, ...], made: torch.Tensor) -> None:
            seen[name] = (read[0], made)

        return record

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    with torch.no_grad():
        model(*inputs)
    for handle in handles:
        handle.remove()
    return seen


def assert_same_product(layer: nn.Module, inputs: torch.Tensor, output: torch.Tensor) -> None:
    """The dense layer makes the same of the same inputs, up to the order of summation."""
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, torch.Tensor)
    assert isinstance(bias, torch.Tensor)
    matrix = weight.T if isinstance(layer, nn.Linear) else weight
    magnitude = inputs.abs() @ matrix.detach().abs() + bias.detach().abs()
    # Both sides round, so each may take one error bound.
    assert_within_error_bound(output, layer(inputs).detach(), 2 * magnitude, matrix.shape[0] + 2)


@pytest.mark.parametrize("structure", [Block(4), NM(1, 4), Diagonal(), Unstructured()], ids=str)
@pytest.mark.parametrize("kind", ["none", "random", "learned"])
def test_densify_keeps_the_function_bit_for_bit_in_whole_numbers(structure: Structure, kind: Any) -> None:
    model = whole_numbers(Net())
    sparsity = None if isinstance(structure, NM) else 0.75
    padst.sparsify(model, SparsitySpec(structure, sparsity, permutation=kind, permutation_side="smaller", ignore=()))
    x = torch.randint(-3, 4, (4, 16)).double()
    y = model(x)
    assert torch.equal(padst.densify(model)(x), y)
    assert all(type(layer) is nn.Linear for layer in (model.head, model.blocks[0]["fc1"]))  # type: ignore[index]
