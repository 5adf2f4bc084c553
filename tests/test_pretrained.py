"""`save_pretrained` and `load_pretrained`: the same model from files, and no model from any other file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import padst_compile as padst
from padst_compile.backend import padst as backend
from padst_compile.deployment.index_file import WeightsFile, own_sha256
from padst_compile.errors import AlreadySparseError, PretrainedError

SPECS = {
    "block": padst.SparsitySpec(padst.Block((4, 8)), sparsity=0.5, permutation="random"),
    "nm": padst.SparsitySpec(padst.NM(1, 4), permutation="random", permutation_side="output"),
    "vector": padst.SparsitySpec(padst.NM(1, 4, vector=4)),
    "diagonal": padst.SparsitySpec(padst.Diagonal(), sparsity=0.7, permutation="learned", permutation_side="smaller"),
    "unstructured": padst.SparsitySpec(padst.Unstructured(), sparsity=0.7, permutation="kaleidoscope"),
}


class Tied(nn.Module):
    """Two layers with one weight, a head that shares the embedding's, one layer that is called twice, and a buffer."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, width)
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.second.weight = self.first.weight
        self.odd = nn.Linear(width, 13)
        self.back = nn.Linear(13, width)
        self.same = self.odd
        self.norm = nn.BatchNorm1d(width)
        self.readout = nn.Linear(width, 10, bias=False)
        self.readout.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(self.embedding(tokens)).relu())
        return self.readout(self.norm(self.back(self.odd(x)) + self.back(self.same(x))))


TOKENS = torch.arange(7)


def sparse(spec: padst.SparsitySpec, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return padst.sparsify(Tied(), spec).eval()


@pytest.mark.parametrize("name", SPECS)
def test_a_loaded_model_is_the_saved_one(name: str, tmp_path: Path) -> None:
    model = sparse(SPECS[name])
    padst.save_pretrained(model, tmp_path / "made" / "here")
    other = Tied().eval()
    loaded = padst.load_pretrained(tmp_path / "made" / "here", other)
    assert loaded is other and torch.equal(loaded(TOKENS), model(TOKENS))
    assert str(loaded) == str(model) and padst.sparsify_report(loaded) == padst.sparsify_report(model)
    for (key, tensor), (known, before) in zip(loaded.state_dict().items(), model.state_dict().items(), strict=True):
        assert key == known and tensor.dtype == before.dtype and torch.equal(tensor, before)
    assert loaded.first.values is loaded.second.values and loaded.odd is loaded.same
    assert loaded.readout.weight is loaded.embedding.weight
    assert [parameter.requires_grad for parameter in loaded.parameters()] == [p.requires_grad for p in model.parameters()]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    padst.save_pretrained(sparse(SPECS["block"]), folder)
    return folder


def weights_of(folder: Path) -> Path:
    (file,) = folder.glob("*.safetensors")
    return file


def test_tensors_that_are_shared_are_stored_once(saved: Path) -> None:
    index = json.loads((saved / "padst.json").read_text())
    stored = load_file(weights_of(saved))
    assert index["shared"]["second.values"] == "first.values" and index["shared"]["readout.weight"] == "embedding.weight"
    assert not index["shared"].keys() & stored.keys()
    assert index["sparsified"]["specs"] == [SPECS["block"].to_dict()]
    assert sorted(file.name for file in saved.iterdir()) == [weights_of(saved).name, "padst.json"]


def test_a_model_takes_the_dtypes_of_the_file(tmp_path: Path) -> None:
    model = sparse(SPECS["nm"]).to(torch.bfloat16)
    model.norm.float()
    padst.save_pretrained(model, tmp_path)
    loaded = padst.load_pretrained(tmp_path, Tied().eval())
    assert loaded.first.values.dtype == loaded.readout.weight.dtype == torch.bfloat16
    assert loaded.norm.weight.dtype == torch.float32 and loaded.readout.weight is loaded.embedding.weight
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True))


def test_a_linear_layer_by_itself_and_a_dense_model(tmp_path: Path) -> None:
    layer = padst.sparsify(nn.Linear(16, 8), padst.SparsitySpec("nm:1:4", permutation="random"))
    padst.save_pretrained(layer, tmp_path / "layer")
    x = torch.randn(3, 16)
    assert torch.equal(padst.load_pretrained(tmp_path / "layer", nn.Linear(16, 8))(x), layer(x))
    dense = nn.Linear(16, 8)
    padst.save_pretrained(dense, tmp_path / "dense")
    assert torch.equal(padst.load_pretrained(tmp_path / "dense", nn.Linear(16, 8))(x), dense(x))


def test_a_loaded_model_trains_and_compiles_like_any_other(saved: Path) -> None:
    model = padst.load_pretrained(saved, Tied())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.first.values.detach().clone()
    padst.attach(model, optimizer, padst.DSTConfig(method="static", total_steps=2))
    model(TOKENS).square().mean().backward()
    optimizer.step()
    padst.finalize(model)
    assert not torch.equal(model.first.values, before)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=backend)(TOKENS), model(TOKENS))
    assert torch.equal(load_file(weights_of(saved))["first.values"], before)  # the file is no part of the model


def test_compiled_models_are_saved_by_their_own_names(tmp_path: Path) -> None:
    model = sparse(SPECS["diagonal"])
    padst.save_pretrained(torch.compile(model, backend=backend), tmp_path)
    assert torch.equal(padst.load_pretrained(tmp_path, Tied().eval())(TOKENS), model(TOKENS))


def test_a_new_save_replaces_the_one_before(tmp_path: Path) -> None:
    for seed in (0, 1, 1):
        model = sparse(SPECS["block"], seed)
        padst.save_pretrained(model, tmp_path)
        assert torch.equal(padst.load_pretrained(tmp_path, Tied().eval())(TOKENS), model(TOKENS))
        assert len(list(tmp_path.iterdir())) == 2


def test_a_save_that_fails_leaves_the_one_before(tmp_path: Path) -> None:
    model = sparse(SPECS["block"])
    padst.save_pretrained(model, tmp_path)
    index = (tmp_path / "padst.json").read_bytes()
    (tmp_path / "padst.json").rename(tmp_path / "kept")
    (tmp_path / "padst.json").mkdir()  # cannot be replaced by a file
    with pytest.raises(PretrainedError, match="could not be written"):
        padst.save_pretrained(sparse(SPECS["block"], seed=1), tmp_path)
    (tmp_path / "padst.json").rmdir()
    (tmp_path / "kept").rename(tmp_path / "padst.json")
    assert (tmp_path / "padst.json").read_bytes() == index
    assert torch.equal(padst.load_pretrained(tmp_path, Tied().eval())(TOKENS), model(TOKENS))


def test_layers_in_training_are_refused(tmp_path: Path) -> None:
    model = padst.sparsify(nn.Sequential(nn.Linear(8, 8)), padst.SparsitySpec("block:4", sparsity=0.5, permutation="learned"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    learned = padst.LearnedPermutation(method="autoshuffle")
    padst.attach(model, optimizer, padst.DSTConfig(method="static", total_steps=9, permutation=learned))
    with pytest.raises(PretrainedError, match="in training.*finalize"):
        padst.save_pretrained(model, tmp_path)
    padst.finalize(model)
    padst.save_pretrained(model, tmp_path)
    x = torch.randn(2, 8)
    assert torch.equal(padst.load_pretrained(tmp_path, nn.Sequential(nn.Linear(8, 8)))(x), model(x))


class Stateful(nn.Linear):
    def get_extra_state(self) -> str:
        return "text"

    def set_extra_state(self, state: object) -> None:
        pass


def test_state_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PretrainedError, match="no tensor but str"):
        padst.save_pretrained(Stateful(2, 2), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def edit_index(change: Callable[[dict], object]) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        data = json.loads((folder / "padst.json").read_text())
        change(data)
        data["sha256"] = own_sha256(data)  # or whatever is changed would be found by this alone
        (folder / "padst.json").write_text(json.dumps(data))

    return edit


def edit_tensors(change: Callable[[dict], object]) -> Callable[[Path], object]:
    """Change tensors and make size and hash right again, as somebody would who wants us to believe the file."""

    def edit(folder: Path) -> None:
        file = weights_of(folder)
        tensors = load_file(file)
        change(tensors)
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        file.unlink()
        save_file(tensors, folder / "draft")
        weights = WeightsFile.of(folder / "draft")
        (folder / "draft").rename(folder / weights.file)
        edit_index(lambda data: data.update(weights=vars(weights)))(folder)

    return edit


def flip_a_bit(folder: Path) -> None:
    content = bytearray(weights_of(folder).read_bytes())
    content[-3] ^= 1
    weights_of(folder).write_bytes(content)


def change_a_name(folder: Path) -> None:
    file = folder / "padst.json"
    file.write_text(file.read_text().replace('"first"', '"third"'))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no index": (lambda folder: (folder / "padst.json").unlink(), "cannot be read"),
    "no weights": (lambda folder: weights_of(folder).unlink(), "cannot be read.*whole folder"),
    "truncated": (lambda folder: weights_of(folder).write_bytes(weights_of(folder).read_bytes()[:-1]), "not complete"),
    "a bit": (flip_a_bit, "sha256"),
    "half an index": (lambda folder: (folder / "padst.json").write_text('{"format": "padst'), "damaged"),
    "no text": (lambda folder: (folder / "padst.json").write_bytes(b"\xff\xfe\x00"), "damaged"),
    "foreign": (lambda folder: (folder / "padst.json").write_text('{"model_type": "gpt2"}'), "not written by"),
    "a list": (lambda folder: (folder / "padst.json").write_text("[]"), "not written by"),
    "newer": (edit_index(lambda data: data.update(version=2)), "version 2"),
    "a field too many": (edit_index(lambda data: data.update(code="x")), "damaged"),
    "a field too few": (edit_index(lambda data: data.pop("layers")), "damaged"),
    "a name": (change_a_name, "is not as it was saved"),
    "another folder": (edit_index(lambda data: data["weights"].update(file=f"../model-{'0' * 16}.safetensors")), "names no"),
    "structure": (edit_index(lambda data: data["layers"]["first"]["structure"].update(kind="clock")), "unknown structure"),
    "side": (edit_index(lambda data: data["layers"]["first"].update(permuted="left")), "no sparse layer"),
    "size": (edit_index(lambda data: data["layers"]["first"].update(values=[-1])), "no size"),
    "spec": (edit_index(lambda data: data["sparsified"]["specs"][0].update(sparsity=2)), "sparsity is the fraction"),
    "no such layer": (edit_index(lambda data: data["layers"].update(other=data["layers"]["odd"])), "no linear layer 'other'"),
    "another shape": (edit_index(lambda data: data["layers"]["first"].update(shape=[16, 17])), "in the model"),
    "another kind": (edit_index(lambda data: data["layers"]["first"].update(origin="conv1d")), "conv1d"),
    "no tensor": (edit_tensors(lambda tensors: tensors.pop("first.columns")), "first.columns"),
    "no tensor of a layer": (edit_tensors(lambda tensors: tensors.pop("back.columns")), "columns is missing"),
    "no dense tensor": (edit_tensors(lambda tensors: tensors.pop("norm.bias")), "norm.bias"),
    "a tensor too many": (edit_tensors(lambda tensors: tensors.update(more=torch.ones(1))), "more"),
    "dense size": (edit_tensors(lambda tensors: tensors.update({"norm.bias": torch.ones(3)})), "norm.bias is"),
    "sharing": (edit_index(lambda data: data["shared"].update({"norm.bias": "norm.weight"})), "should be stored as"),
    "index out of range": (edit_tensors(lambda tensors: tensors["first.columns"].fill_(99)), "columns must lie in"),
    "no permutation": (edit_tensors(lambda tensors: tensors["first.permutation"].fill_(0)), "exactly once"),
    "dtype": (edit_tensors(lambda tensors: tensors.update({"odd.columns": tensors["odd.columns"].long()})), "torch.int64, not"),
    "whole numbers": (edit_tensors(lambda tensors: tensors.update({"odd.values": tensors["odd.values"].int()})), "no floating"),
    "values": (edit_tensors(lambda tensors: tensors.update({"odd.values": tensors["odd.values"][1:]})), "values is"),
    "no safetensors": (
        lambda folder: (
            weights_of(folder).write_bytes(b"x" * 100),
            edit_index(
                lambda data: data["weights"].update(bytes=100, sha256=WeightsFile.of(weights_of(folder)).sha256)
            )(folder),
        ),
        "damaged",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_other_files_are_refused_before_the_model_is_touched(name: str, saved: Path, tmp_path: Path) -> None:
    damage, message = DAMAGES[name]
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    damage(folder)
    model = Tied()
    before, parameters = {key: tensor.clone() for key, tensor in model.state_dict().items()}, list(model.parameters())
    with pytest.raises(PretrainedError, match=message):
        padst.load_pretrained(folder, model)
    assert not list(padst.sparse_layers(model))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_another_model_is_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(PretrainedError, match="in the model"):
        padst.load_pretrained(saved, Tied(width=32))
    with pytest.raises(PretrainedError, match="meta device"), torch.device("meta"):
        padst.load_pretrained(saved, Tied())
    with pytest.raises(AlreadySparseError):
        padst.load_pretrained(saved, sparse(SPECS["nm"]))
    untied = Tied()
    untied.readout.weight = nn.Parameter(torch.zeros(10, 16))
    assert torch.equal(padst.load_pretrained(saved, untied).readout.weight, untied.embedding.weight)
    padst.save_pretrained(padst.densify(untied), tmp_path / "tied")
    other = Tied()
    other.readout.weight = nn.Parameter(torch.zeros(10, 16))
    padst.save_pretrained(other, tmp_path / "untied")
    with pytest.raises(PretrainedError, match="one tensor in the model and two in the files"):
        padst.load_pretrained(tmp_path / "untied", Tied())


def test_a_model_from_timm(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")

    def make() -> nn.Module:
        return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=48, num_heads=3, num_classes=5).eval()

    model, other = padst.sparsify(make(), padst.SparsitySpec("block:16", sparsity=0.5, permutation="random")), make()
    known = dict(other.pretrained_cfg)
    padst.save_pretrained(model, tmp_path)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(padst.load_pretrained(tmp_path, other)(x), model(x))
    assert dict(other.pretrained_cfg) == known and isinstance(other.head, nn.Linear)


def test_a_model_from_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=50, n_positions=16)
    model = padst.sparsify(transformers.GPT2LMHeadModel(config), SPECS["nm"]).eval()
    padst.save_pretrained(model, tmp_path)
    loaded = padst.load_pretrained(tmp_path, transformers.GPT2LMHeadModel(config).eval())
    assert torch.equal(loaded(TOKENS[None]).logits, model(TOKENS[None]).logits)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
