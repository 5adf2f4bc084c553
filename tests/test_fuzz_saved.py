"""Saved models and checkpoints of which bytes are wrong, or that somebody made up: refused, or what they say; never a crash.

`make fuzz` runs the same tests with many more examples, and others each time.
"""

from __future__ import annotations

import contextlib
import copy
import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import nn

import padst_compile as padst
from padst_compile.deployment.index_file import WeightsFile, own_sha256
from padst_compile.errors import CheckpointError, PadstError, PretrainedError
from padst_compile.files import sha256_of
from padst_compile.testing.damage import mutated, mutated_bytes
from padst_compile.tolerance import allowed_error, relative_error
from padst_compile.training.checkpoint_reader import CheckpointReader

X = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))


def dense() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Linear(16, 16))


def sparse() -> nn.Module:
    torch.manual_seed(0)
    specs = {"0": padst.SparsitySpec("block:4", sparsity=0.5, permutation="random"), "2": padst.SparsitySpec("nm:1:4")}
    return padst.sparsify(dense(), {**specs, "3": padst.SparsitySpec("diagonal", sparsity=0.5)})


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@contextlib.contextmanager
def copied(folder: Path) -> Iterator[Path]:
    """A copy to damage."""
    target = folder.with_name("damaged")
    shutil.copytree(folder, target)
    try:
        yield target
    finally:
        shutil.rmtree(target)


# Models


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    padst.save_pretrained(sparse(), folder)
    return folder


def load(folder: Path) -> nn.Module | None:
    """The model in a folder; None where it is refused, as it should be: with the dense model untouched."""
    model = dense()
    before = state_of(model)
    try:
        return padst.load_pretrained(folder, model)
    except PretrainedError:
        assert same(state_of(model), before)
        return None


@given(data=st.data(), name=st.sampled_from(["padst.json", "*.safetensors"]))
def test_a_saved_model_with_wrong_bytes_is_refused(saved: Path, data: st.DataObject, name: str) -> None:
    with copied(saved) as folder:
        (file,) = folder.glob(name)
        content = file.read_bytes()
        file.write_bytes(data.draw(mutated_bytes(content)))
        found = load(folder)
        if found is not None:  # the bytes are the same, or other white space
            assert same(state_of(found), state_of(sparse())) and torch.equal(found(X), sparse()(X))


@given(data=st.data())
def test_a_made_up_index_is_refused_or_means_a_model(saved: Path, data: st.DataObject) -> None:
    with copied(saved) as folder:
        index = data.draw(mutated(json.loads((folder / "padst.json").read_text())))
        if isinstance(index, dict):
            index["sha256"] = own_sha256(index)
        (folder / "padst.json").write_text(json.dumps(index))
        found = load(folder)
        if found is not None:
            check(found)


@given(data=st.data())
def test_made_up_tensors_are_refused_or_make_a_model(saved: Path, data: st.DataObject) -> None:
    with copied(saved) as folder:
        (file,) = folder.glob("*.safetensors")
        content = data.draw(mutated_bytes(file.read_bytes()))
        file.write_bytes(content)
        weights = WeightsFile.of(file)
        file.rename(folder / weights.file)
        index = json.loads((folder / "padst.json").read_text()) | {"weights": vars(weights)}
        (folder / "padst.json").write_text(json.dumps({**index, "sha256": own_sha256(index)}))
        found = load(folder)
        if found is not None:
            check(found)


def check(model: nn.Module) -> None:
    """It computes what its dense form does, where its numbers are of a common size and dtype."""
    tensors = [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
    if all(tensor.dtype == X.dtype and bool((tensor.abs() < 10).all()) for tensor in tensors):
        unsparsified = padst.densify(copy.deepcopy(model))
        own, exact = unsparsified(X), [copy.deepcopy(unsparsified).double()(X.double())]
        assert relative_error([model(X)], exact) <= allowed_error(relative_error([own], exact), X.dtype)


# Checkpoints


def training() -> tuple[nn.Module, torch.optim.Optimizer, padst.Runtime]:
    model = sparse()
    optimizer = torch.optim.AdamW(model.parameters())
    runtime = padst.attach(model, optimizer, padst.DSTConfig(method="set", interval=1, total_steps=10))
    model(X).sum().backward()
    optimizer.step()
    return model, optimizer, runtime


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    padst.save_checkpoint(folder, *training(), {"step": 1})
    return folder


@pytest.fixture(scope="module")
def resumed() -> tuple[nn.Module, torch.optim.Optimizer, padst.Runtime]:
    """What checkpoints are loaded into, over and over."""
    return training()


def seal(data: Path) -> None:
    """Make the digests right again, as somebody would who wants us to believe the files."""
    digests = data / "digests.json"
    digests.write_text(json.dumps({name: sha256_of(data / name) for name in json.loads(digests.read_text())}))


@given(data=st.data(), name=st.sampled_from(["current", "digests.json", ".metadata", "state.pt", "__0_0.distcp"]))
def test_a_checkpoint_with_wrong_bytes_is_refused(checkpoint: Path, resumed: Any, data: st.DataObject, name: str) -> None:
    with copied(checkpoint) as folder:
        (file,) = folder.rglob(name)
        content = file.read_bytes()
        file.write_bytes(data.draw(mutated_bytes(content)))
        assume(file.read_bytes() != content)
        before = state_of(resumed[0])
        with contextlib.suppress(CheckpointError):
            assert padst.load_checkpoint(folder, *resumed) == {"step": 1}
            assert name in ("current", "digests.json")  # white space
        assert same(state_of(resumed[0]), before)


@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_a_byte_that_flips_among_the_tensors_is_noticed(checkpoint: Path, resumed: Any, place: float, flip: int) -> None:
    with copied(checkpoint) as folder:
        (file,) = folder.rglob("*.distcp")
        content = bytearray(file.read_bytes())
        content[int(place * len(content))] ^= flip
        file.write_bytes(content)
        before = state_of(resumed[0])
        with pytest.raises(CheckpointError, match=r"__0_0\.distcp is not as it was written; bring back a copy"):
            padst.load_checkpoint(folder, *resumed)
        assert same(state_of(resumed[0]), before)


@given(data=st.data(), name=st.sampled_from([".metadata", "state.pt", "__0_0.distcp"]))
def test_a_made_up_checkpoint_is_refused_or_loaded(checkpoint: Path, resumed: Any, data: st.DataObject, name: str) -> None:
    with copied(checkpoint) as folder:
        (file,) = folder.rglob(name)
        file.write_bytes(data.draw(mutated_bytes(file.read_bytes())))
        seal(file.parent)
        with contextlib.suppress(PadstError):
            padst.load_checkpoint(folder, *resumed)
    padst.load_checkpoint(checkpoint, *resumed)  # nothing is left that would refuse the true one


@given(data=st.data())
def test_the_index_of_a_checkpoint_is_read_or_refused(checkpoint: Path, data: st.DataObject) -> None:
    index = data.draw(st.binary(max_size=50) | mutated_bytes(next(checkpoint.rglob(".metadata")).read_bytes()))
    _read_index(checkpoint.parent, index)


@example(b"\x80\x04N" + b"r\xff\xff\xff\x7f" + b".")  # a place in memory far behind all others
@example(b"\x80\x04" + b"\x95" + b"\xff" * 7 + b"\x7f" + b"N.")  # a frame of exabytes
@example(b"\x80\x05" + b"\x96" + b"\xff" * 7 + b"\x7f" + b".")  # and as many bytes
@example(b"(" * 100_000 + b".")
@given(st.binary(max_size=50))
def test_an_index_that_asks_for_memory_is_refused(tmp_path_factory: pytest.TempPathFactory, index: bytes) -> None:
    with pytest.raises(pickle.UnpicklingError):
        CheckpointReader(_index_file(tmp_path_factory.getbasetemp(), index)).read_metadata()


def _read_index(folder: Path, index: bytes) -> None:
    with contextlib.suppress(pickle.UnpicklingError):
        CheckpointReader(_index_file(folder, index)).read_metadata()


def _index_file(folder: Path, index: bytes) -> Path:
    (folder / ".metadata").write_bytes(index)
    return folder
