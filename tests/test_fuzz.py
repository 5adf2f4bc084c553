"""What nobody should write: specifications, cache files and index tensors full of nonsense. None may crash, hang or mislead.

`make fuzz` runs the same tests with many more examples, and others each time.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import nn

import padst_compile as padst
from padst_compile.autotune.cache import Cache, read_stored, stored_form
from padst_compile.autotune.entry import Entry, Timing
from padst_compile.autotune.environment import environment
from padst_compile.autotune.keys import Key
from padst_compile.autotune.lookup import Library
from padst_compile.autotune.problem import LayerProblem
from padst_compile.autotune.space import Candidate
from padst_compile.errors import InvalidPermutationError, InvalidTopologyError, PadstError, SpecError
from padst_compile.kernels.launch import Tile
from padst_compile.spec import SparsitySpec, load_spec, spec_from_dict, spec_to_dict
from padst_compile.structures import Shape, Structure, Topology, parse
from padst_compile.testing.damage import JSON, NUMBERS, mutated
from padst_compile.testing.strategies import PackedWeight, packed_weights, specs

# Specifications


def read(path: Path, content: bytes) -> Any:
    """What `load_spec` makes of a file; None if it refuses it as it should."""
    path.write_bytes(content)
    with contextlib.suppress(SpecError):
        return load_spec(path)
    return None


@given(content=st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
@example(content=b"")
def test_a_file_of_anything_is_a_specification_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    assert read(tmp_path_factory.getbasetemp() / "spec.json", content) is None


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"version": 1, "spec": ' * 5_000], ids=["lists", "specifications"])
def test_files_that_nest_too_deep_are_refused(tmp_path: Path, content: bytes) -> None:
    assert read(tmp_path / "spec.json", content) is None


@given(data=st.data())
def test_a_damaged_specification_means_what_it_says_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    own = data.draw(specs())
    value = data.draw(mutated(spec_to_dict(data.draw(st.sampled_from([own, {"a.*": own, "b": None}])))))
    found = read(tmp_path_factory.getbasetemp() / "spec.json", json.dumps(value).encode())
    if found is not None:
        assert spec_from_dict(json.loads(json.dumps(spec_to_dict(found)))) == found


@given(
    st.text(max_size=20)
    | st.builds(
        lambda kind, numbers: ":".join([kind, *map(str, numbers)]),
        st.sampled_from(["block", "nm", "diagonal", "unstructured"]),
        st.lists(NUMBERS, max_size=4),
    ),
    st.sampled_from([None, 0.0, 0.5, 0.9, 0.999999]),
    st.integers(1, 9),
    st.integers(1, 9),
)
def test_a_structure_of_any_size_fits_a_layer_or_is_refused(text: str, sparsity: float | None, out: int, inner: int) -> None:
    model = nn.Sequential(nn.Linear(inner, out))
    with contextlib.suppress(PadstError):
        padst.sparsify(model, SparsitySpec(text, sparsity, permutation="random"))
        x = torch.randn(2, inner)
        torch.testing.assert_close(padst.densify(copy.deepcopy(model))(x), model(x))


# Cache files


def problem(tokens: int = 64) -> LayerProblem:
    return LayerProblem("block:4", 8, 8, 16, tokens, "float32", "in", False, "cpu", ("native", "dense"), "bias")


TIMES = (
    Timing(Candidate("native"), 2e-3),
    Timing(Candidate("native", Tile(64, 0, 0)), 1e-3),
    Timing(Candidate("dense"), 3e-3),
)


def sound(entry: Entry) -> bool:
    """Whether an entry is one that a search could have written."""
    times = [timing.seconds for timing in entry.timings]
    return bool(times) and all(isinstance(t, float) and 0 < t < math.inf for t in times) and entry.winner in entry.timings


@given(data=st.data())
def test_a_damaged_cache_file_is_read_as_a_result_or_ignored(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    key, near = Key(problem(), environment("cpu")), Key(problem(128), environment("cpu"))
    form = json.loads(json.dumps(stored_form(key.to_dict(), Entry("quick", TIMES))))
    content = data.draw(
        st.binary(max_size=100)
        | mutated(form).map(lambda value: json.dumps(value).encode())
        | st.integers(0, 300).map(lambda cut: json.dumps(form).encode()[:cut])
    )
    folder = tmp_path_factory.mktemp("tuning")
    (folder / f"{key.name}.json").write_bytes(content)
    library = Library(Cache(folder), folder / "none")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for found in (library.exact(key), library.near(near)):
            assert found is None or (sound(found.entry) and found.tokens == 64)
        for _, entry in library.cache.results_of(environment("cpu").processor):
            assert sound(entry)
        library.cache.write(key, Entry("quick", TIMES))
    assert Cache(folder).read(key) == Entry("quick", TIMES)


@pytest.mark.parametrize("change", [{"tokens": 10**400}, {"tokens": -1}, {"tokens": True}, {"epilogue": None}])
def test_a_result_for_an_impossible_problem_is_ignored(tmp_path: Path, change: dict[str, Any]) -> None:
    key = Key(problem(), environment("cpu"))
    form = json.loads(json.dumps(stored_form(key.to_dict(), Entry("quick", TIMES))))
    form["key"]["problem"].update(change)
    (tmp_path / f"{key.name}.json").write_text(json.dumps(form))
    with pytest.warns(UserWarning, match="unusable"):
        assert Library(Cache(tmp_path), tmp_path / "none").near(Key(problem(128), environment("cpu"))) is None


@given(JSON)
def test_no_json_makes_reading_a_result_fail_in_an_unknown_way(value: Any) -> None:
    with contextlib.suppress(ValueError, TypeError, KeyError):
        read_stored(value)


# Index tensors


@st.composite
def corrupted(draw: st.DrawFn, tensor: torch.Tensor) -> torch.Tensor:
    """An index tensor of the same shape and dtype with other numbers in one to three places."""
    found = tensor.clone()
    assume(found.numel() > 0)
    flat = found.view(-1)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, found.numel() - 1))
        if found.dtype == torch.bool:
            flat[at] = draw(st.booleans())
        else:
            info = torch.iinfo(found.dtype)
            near = st.integers(max(info.min, -2), min(info.max, 50))
            flat[at] = draw(near | st.integers(info.min, info.max) | st.sampled_from([info.min, info.max]))
    return found


def layer_of(packed: PackedWeight, dtype: torch.dtype) -> padst.PermutedSparseLinear:
    model = nn.Sequential(nn.Linear(packed.shape.in_features, packed.shape.out_features))
    sparsity = None if packed.structure.natural_sparsity() is not None else packed.sparsity
    padst.sparsify(model, SparsitySpec(packed.structure, sparsity, permutation="random", init="random"))
    (layer,) = (layer for _, layer in padst.sparse_layers(model))
    return layer.to(dtype)


def independent_weight(structure: Structure, values: torch.Tensor, topology: Topology, shape: Shape) -> torch.Tensor | None:
    """The dense weight, or None where some index cannot be one; with plain loops over plain numbers."""
    kind, _, sizes = structure.to_string().partition(":")
    numbers = [int(size) for size in sizes.replace("x", ":").split(":") if size]
    if kind == "unstructured":
        return values.where(topology[0], torch.zeros_like(values))
    indices = [index.tolist() for index in topology]
    entries = {"block": _of_blocks, "nm": _of_groups, "diagonal": _of_diagonals}[kind](numbers, indices, shape)
    if entries is None:
        return None
    dense = torch.zeros(shape.out_features, shape.in_features, dtype=values.dtype)
    for row, column, place in entries:
        if row < shape.out_features and column < shape.in_features:  # else it is padding
            dense[row, column] = values[place]
    return dense


Entries = list[tuple[int, int, tuple[int, ...]]]  # row, column, and where in the values


def _of_blocks(sizes: list[int], indices: list[Any], shape: Shape) -> Entries | None:
    (rows, columns), (pointers, places) = sizes, indices
    down, across = -(-shape.out_features // rows), -(-shape.in_features // columns)
    if pointers[0] != 0 or pointers[-1] != len(places) or pointers != sorted(pointers):
        return None
    entries: Entries = []
    for row in range(down):
        numbers = range(pointers[row], pointers[row + 1])
        own = [places[number] for number in numbers]
        if own != sorted(set(own)) or any(not 0 <= place < across for place in own):
            return None
        inside = [(r, c) for r in range(rows) for c in range(columns)]
        entries += [(row * rows + r, places[k] * columns + c, (k, c, r)) for k in numbers for r, c in inside]
    return entries


def _of_groups(sizes: list[int], indices: list[Any], shape: Shape) -> Entries | None:
    n, m, vector = (*sizes, 1)[:3]
    entries: Entries = []
    for group, offsets in enumerate(indices[0]):
        for slot, offset in enumerate(offsets):
            column = slot // n * m + offset
            if offset >= m or column >= shape.in_features or (slot % n and offsets[slot - 1] >= offset):
                return None
            entries += [(group * vector + member, column, (group, slot, member)) for member in range(vector)]
    return entries


def _of_diagonals(sizes: list[int], indices: list[Any], shape: Shape) -> Entries | None:
    (offsets,), (length, period) = indices, sorted((shape.out_features, shape.in_features))
    group = (*sizes, 1)[0]
    classes = period if group == 1 else length // group
    kept = {offset % classes for offset in offsets}
    if offsets != [offset for offset in range(period) if offset % classes in kept]:
        return None
    entries: Entries = []
    for number, offset in enumerate(offsets):
        for k in range(length):
            other = (k + offset) % period
            row, column = (k, other) if shape.in_features >= shape.out_features else (other, k)
            entries.append((row, column, (number, k)))
    return entries


@given(data=st.data(), packed=packed_weights(12), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_corrupt_index_tensors_are_refused_before_a_kernel_sees_them(
    data: st.DataObject, packed: PackedWeight, dtype: torch.dtype
) -> None:
    """In a checkpoint, and when somebody overwrites them in place: forward and backward, C++ kernels and ATen."""
    layer = layer_of(packed, dtype)
    structure, shape = layer.config.structure, layer.config.shape
    number = data.draw(st.integers(0, len(layer.topology) - 1))
    name, bad = structure.index_names[number], data.draw(corrupted(layer.topology[number]))
    topology = tuple(bad if i == number else index for i, index in enumerate(layer.topology))
    weight = independent_weight(structure, layer.values.detach(), topology, shape)

    loaded, state = copy.deepcopy(layer), {**layer.state_dict(), name: bad}
    with _refused(RuntimeError, when=weight is None):
        loaded.load_state_dict(state)

    order = layer.permutation.long()
    getattr(layer, name).copy_(bad)
    x = torch.randn(3, shape.in_features, dtype=dtype, requires_grad=True)
    with _refused((InvalidTopologyError, RuntimeError), when=weight is None):
        y = layer(x)
        y.sum().backward()
        expected = nn.functional.linear(x[:, order], weight, layer.bias)
        torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)
        grad = torch.zeros_like(x).index_add_(1, order, weight.sum(0).expand(3, -1))
        torch.testing.assert_close(x.grad, grad, atol=1e-4, rtol=1e-4)
    with _refused(InvalidTopologyError, when=weight is None):
        padst.densify(nn.Sequential(layer))


@contextlib.contextmanager
def _refused(errors: Any, *, when: bool) -> Any:
    if not when:
        yield
        return
    with pytest.raises(errors):
        yield


@given(data=st.data(), size=st.integers(1, 9), side=st.sampled_from(["input", "output"]))
def test_corrupt_permutations_are_refused(data: st.DataObject, size: int, side: str) -> None:
    spec = SparsitySpec("unstructured", 0.0, permutation="random", permutation_side=side)
    layer = padst.sparsify(nn.Sequential(nn.Linear(size, size)), spec)[0]
    bad = data.draw(corrupted(layer.permutation))
    valid = sorted(bad.tolist()) == list(range(size))
    with _refused(RuntimeError, when=not valid):
        copy.deepcopy(layer).load_state_dict({**layer.state_dict(), "permutation": bad})
    with _refused(InvalidPermutationError, when=not valid):
        layer.set_permutation(bad)


@given(packed_weights(12), st.data())
def test_index_tensors_of_other_shapes_and_dtypes_are_refused(packed: PackedWeight, data: st.DataObject) -> None:
    number = data.draw(st.integers(0, len(packed.topology) - 1))
    index = packed.topology[number]
    change: Callable[[torch.Tensor], torch.Tensor] = data.draw(
        st.sampled_from(
            [torch.Tensor.float, torch.Tensor.cfloat, lambda t: t[None], lambda t: t[..., :0], lambda t: t.reshape(-1, 1, 1)]
        )
    )
    bad = change(index)
    assume(bad.shape != index.shape or bad.dtype != index.dtype)
    layer = layer_of(packed, torch.float32)
    with pytest.raises(RuntimeError):
        layer.load_state_dict({**layer.state_dict(), packed.structure.index_names[number]: bad})


def test_the_loops_above_know_every_structure() -> None:
    for text in ("block:2x3", "nm:1:2", "nm:2:4:3", "diagonal", "diagonal:2", "unstructured"):
        structure, shape = parse(text), Shape(4, 8)
        weight = torch.arange(1.0, 33.0).reshape(4, 8)
        topology = structure.choose(weight, 0.5)
        values = structure.pack(weight, topology)
        found = independent_weight(structure, values, topology, shape)
        assert found is not None and torch.equal(found, structure.unpack(values, topology, shape))
