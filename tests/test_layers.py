"""`PermutedSparseLinear`: what it computes, keeps, saves, loads and refuses."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import padst_compile as padst
from padst_compile import NM, Block, Diagonal, PermutedSparseLinear, SparsitySpec, Unstructured, permutation
from padst_compile.errors import FeatureMismatchError, InvalidPermutationError
from padst_compile.kernels.soft_permute import HARD, SOFT
from padst_compile.layers import SoftPermutation
from padst_compile.structures import Structure
from padst_compile.testing.accuracy import assert_within_error_bound

STRUCTURES = (Block(4), Block((3, 5)), NM(1, 4), NM(2, 5, vector=2), Diagonal(), Diagonal(4), Unstructured())
each_structure = pytest.mark.parametrize("structure", STRUCTURES, ids=str)
each_permutation = pytest.mark.parametrize(
    ("kind", "side"),
    [("none", "input"), ("random", "input"), ("random", "output"), ("random", "smaller"), ("learned", "input")],
)


def whole(*size: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    """Whole numbers without 0, so that every sum is exact and every kept weight shows."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, size, generator=generator) * 2 - 1
    return (torch.randint(1, 5, size, generator=generator) * signs).to(dtype)


def dense_linear(inputs: int = 15, outputs: int = 12, *, bias: bool = True, dtype: torch.dtype = torch.float64) -> nn.Linear:
    """A dense layer of whole numbers."""
    layer = nn.Linear(inputs, outputs, bias=bias, dtype=dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(whole(*parameter.shape, dtype=dtype))
    return layer


def sparse_linear(structure: Structure, kind: str = "random", side: str = "input", **options: Any) -> PermutedSparseLinear:
    """The same layer made sparse."""
    sparsity = None if isinstance(structure, NM) else 0.6
    spec = SparsitySpec(structure, sparsity, permutation=kind, permutation_side=side)  # type: ignore[arg-type]
    layer: nn.Module = padst.sparsify(dense_linear(**options), spec)
    assert isinstance(layer, PermutedSparseLinear)
    return layer


# ---- what it computes


@each_structure
@each_permutation
@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_equals_its_dense_form_exactly(structure: Structure, kind: str, side: str, bias: bool) -> None:
    layer = sparse_linear(structure, kind, side, bias=bias)
    with torch.no_grad():
        if layer.permutation is not None:  # a learned one starts as the identity
            layer.set_permutation(torch.randperm(layer.permutation.numel(), generator=torch.Generator().manual_seed(3)))
    x = whole(2, 5, 15)
    y = layer(x)
    dense: nn.Module = padst.densify(copy.deepcopy(layer))
    assert type(dense) is nn.Linear
    assert torch.equal(y, dense(x))
    assert torch.equal(layer.weight, dense.weight)
    assert (dense.bias is not None) == bias


@each_structure
def test_the_input_side_reads_permuted_inputs_and_the_output_side_returns_permuted_outputs(structure: Structure) -> None:
    x = whole(4, 15)
    for side, size in (("input", 15), ("output", 12)):
        layer = sparse_linear(structure, "learned", side)
        assert layer.bias is not None
        with torch.no_grad():
            plain = layer(x) - layer.bias
            indices = torch.randperm(size)
            layer.set_permutation(indices)
            before = layer.values.clone()
            expected = plain[:, indices] + layer.bias if side == "output" else None
            if side == "input":
                scattered = torch.empty_like(x)
                scattered[:, indices] = x
                assert torch.equal(layer(scattered) - layer.bias, plain)
            else:
                assert expected is not None
                assert torch.equal(layer(x), expected)
            assert torch.equal(layer.values, before)


@pytest.mark.parametrize(("inputs", "outputs", "side"), [(8, 12, "input"), (12, 8, "output"), (8, 8, "input")])
def test_the_smaller_side_is_permuted(inputs: int, outputs: int, side: str) -> None:
    layer = sparse_linear(Block(2), "random", "smaller", inputs=inputs, outputs=outputs)
    assert layer.config.permuted == side
    assert layer.permutation is not None
    assert layer.permutation.numel() == min(inputs, outputs)


@each_permutation
def test_every_gradient_equals_that_of_the_dense_form(kind: str, side: str) -> None:
    layer = sparse_linear(Block((3, 5)), kind, side)
    x, direction = whole(6, 15).requires_grad_(), whole(6, 12, seed=1)
    dense: nn.Module = padst.densify(copy.deepcopy(layer))
    (into,) = torch.autograd.grad(dense(x), x, direction)
    dense.zero_grad()
    dense(x).backward(direction)
    layer(x).backward(direction)
    assert torch.equal(x.grad - into, into)  # type: ignore[operator]  # both backwards added theirs
    assert layer.bias is not None
    assert torch.equal(layer.bias.grad, dense.bias.grad)  # type: ignore[arg-type, union-attr]
    # The dense gradient, moved to where the sparse weights are.
    gradient = dense.weight.grad
    assert isinstance(gradient, torch.Tensor)
    if layer.permutation is not None and layer.config.permuted == "input":
        gradient = gradient[:, layer.permutation.long()]
    elif layer.permutation is not None:
        gradient = gradient[permutation.inverse(layer.permutation).long()]
    assert torch.equal(layer.values.grad, layer.config.structure.pack(gradient, layer.topology))  # type: ignore[arg-type]


@each_structure
def test_conv1d_keeps_its_transposed_weight(structure: Structure) -> None:
    layer = Conv1D(12, 15).double()
    with torch.no_grad():
        layer.weight.copy_(whole(15, 12))
    sparsity = None if isinstance(structure, NM) else 0.6
    sparse: nn.Module = padst.sparsify(layer, SparsitySpec(structure, sparsity, permutation="random"))
    assert isinstance(sparse, PermutedSparseLinear)
    assert sparse.weight.shape == (15, 12)
    assert sparse.values.is_contiguous()
    x = whole(3, 4, 15)
    y = sparse(x)
    dense: nn.Module = padst.densify(sparse)
    assert type(dense) is Conv1D
    assert (dense.nx, dense.nf) == (15, 12)
    assert dense.weight.is_contiguous()
    assert torch.equal(dense(x), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@each_structure
def test_lower_precisions_stay_within_the_error_bound(structure: Structure, dtype: torch.dtype) -> None:
    layer = sparse_linear(structure, "random", "output")
    with torch.no_grad():
        layer.values.mul_(torch.rand_like(layer.values))
        x = torch.randn(9, 15, dtype=torch.float64).to(dtype)
        y, wide = layer.to(dtype)(x), layer.double()
        assert wide.bias is not None
        magnitude = x.double().abs() @ wide.weight.abs().T + wide.bias.abs()
        assert_within_error_bound(y, wide(x.double()), magnitude, 15 + 2)


@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16], ids=str)
@each_permutation
def test_under_autocast_the_result_has_the_type_a_dense_layer_gives(lower: torch.dtype, kind: str, side: str) -> None:
    layer, x = sparse_linear(Block(4), kind, side, dtype=torch.float32), whole(3, 15, dtype=torch.float32)
    with torch.autocast("cpu", lower):
        y = layer(x)
        assert y.dtype == dense_linear(dtype=torch.float32)(x).dtype == lower
    y.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


@pytest.mark.parametrize("shape", [(14,), (3, 16), (15, 3), (2, 3, 1)], ids=str)
def test_an_input_of_the_wrong_width_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(FeatureMismatchError, match=rf"expected 15 input features, got an input of shape \[{shape[0]}"):
        sparse_linear(Block(4))(torch.zeros(shape, dtype=torch.float64))


# ---- the permutation


@pytest.mark.parametrize(
    "indices", [torch.arange(14), torch.zeros(15, dtype=torch.int64), torch.arange(15.0), torch.arange(1, 16)], ids=str
)
def test_set_permutation_refuses_what_is_none_and_keeps_the_old_one(indices: torch.Tensor) -> None:
    layer = sparse_linear(Block(4))
    assert layer.permutation is not None
    before = layer.permutation.clone()
    with pytest.raises(InvalidPermutationError, match="PermutedSparseLinear"):
        layer.set_permutation(indices)
    assert torch.equal(layer.permutation, before)


def test_a_layer_made_without_a_permutation_takes_none() -> None:
    with pytest.raises(InvalidPermutationError, match="made with permutation='none'; choose 'random' or 'learned'"):
        sparse_linear(Block(4), "none").set_permutation(torch.arange(15))


def test_set_permutation_works_in_place() -> None:
    layer = sparse_linear(Block(4))
    buffer = layer.permutation
    layer.set_permutation(torch.arange(15).flip(0))
    assert layer.permutation is buffer
    assert buffer is not None
    assert buffer.tolist() == list(range(14, -1, -1))


# ---- what it tells


@each_structure
def test_active_and_density_count_the_weights_that_can_differ_from_zero(structure: Structure) -> None:
    layer = sparse_linear(structure)
    assert layer.active == int(layer.weight.count_nonzero())
    assert layer.density == layer.active / (12 * 15)


def test_printing_names_shape_structure_density_and_permutation() -> None:
    text = repr(sparse_linear(Block(4), "random", "output", bias=False))
    assert "in_features=15, out_features=12, structure=block:4x4, density=" in text
    assert "permutation=output, bias=False" in text


def test_a_layer_on_the_meta_device_can_be_printed() -> None:
    assert "structure=block:4x4" in repr(sparse_linear(Block(4)).to("meta"))


@pytest.mark.parametrize("structure", [Block(64), NM(1, 10), Diagonal()], ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), [(768, 3072), (3072, 768)])
def test_a_tenth_of_the_weights_takes_little_more_than_a_tenth_of_the_memory(
    structure: Structure, inputs: int, outputs: int
) -> None:
    dense = nn.Linear(inputs, outputs)
    before = sum(tensor.nbytes for tensor in dense.state_dict().values())
    layer: nn.Module = padst.sparsify(dense, SparsitySpec(structure, 0.9, permutation="random"))
    assert sum(tensor.nbytes for tensor in layer.state_dict().values()) <= 0.13 * before


# ---- copies and conversions


def copies(layer: PermutedSparseLinear) -> list[PermutedSparseLinear]:
    """The layer by every way of copying it."""
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)]


@each_structure
def test_copies_compute_the_same_and_share_nothing(structure: Structure) -> None:
    layer, x = sparse_linear(structure), whole(3, 15)
    y = layer(x)
    for twin in copies(layer):
        assert torch.equal(twin(x), y)
        with torch.no_grad():
            twin.values.zero_()
            twin.set_permutation(torch.arange(15))
        assert torch.equal(layer(x), y)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@each_structure
def test_converting_the_type_converts_weights_and_no_index(structure: Structure, dtype: torch.dtype) -> None:
    layer = sparse_linear(structure)
    types = {name: buffer.dtype for name, buffer in layer.named_buffers()}
    layer.to(dtype)
    assert {name: buffer.dtype for name, buffer in layer.named_buffers()} == types
    assert {parameter.dtype for parameter in layer.parameters()} == {dtype}
    assert torch.equal(layer(whole(3, 15, dtype=dtype)).double(), sparse_linear(structure)(whole(3, 15)))


def test_half_works_like_to() -> None:
    assert sparse_linear(Block(4)).half()(whole(3, 15, dtype=torch.float16)).dtype == torch.float16


def test_training_modes_and_frozen_weights_are_kept() -> None:
    dense = dense_linear().eval()
    dense.weight.requires_grad_(False)
    layer: nn.Module = padst.sparsify(dense, SparsitySpec(Block(4), 0.5))
    assert not layer.training
    assert not layer.values.requires_grad  # type: ignore[union-attr]
    assert layer.bias.requires_grad  # type: ignore[union-attr]
    back: nn.Module = padst.densify(layer)
    assert not back.training
    assert not back.weight.requires_grad  # type: ignore[union-attr]
    assert back.bias is dense.bias


# ---- checkpoints


def model(spec: SparsitySpec, seed: int = 0) -> nn.Sequential:
    """Two sparse layers."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        dense = nn.Sequential(nn.Linear(15, 12), nn.ReLU(), nn.Linear(12, 15, bias=False))
    return padst.sparsify(dense, spec)


def spec_of(structure: Structure, **options: Any) -> SparsitySpec:
    """A specification with a random permutation unless told otherwise."""
    return SparsitySpec(structure, None if isinstance(structure, NM) else 0.5, **{"permutation": "random", **options})


@each_structure
def test_the_state_is_plain_contiguous_tensors_of_weights_indices_and_permutation(structure: Structure) -> None:
    state = sparse_linear(structure).state_dict()
    assert set(state) == {"values", "bias", "permutation", *structure.index_names}
    assert all(type(tensor) is torch.Tensor and tensor.is_contiguous() for tensor in state.values())


@each_structure
def test_a_checkpoint_restores_another_model_exactly(structure: Structure, tmp_path: Path) -> None:
    source, target = model(spec_of(structure)), model(spec_of(structure, seed=1, init="random"), seed=1)
    x = torch.randn(4, 15)
    assert not torch.equal(source(x), target(x))
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    assert target.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True) == ([], [])
    assert torch.equal(source(x), target(x))
    for name, tensor in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], tensor)


FIX = "sparsify the model with the checkpoint's specification first"


@pytest.mark.parametrize(
    ("saved", "loaded", "message"),
    [
        (spec_of(Block(4)), spec_of(Block(3)), r"values is \[\d+, 4, 4\] in the checkpoint and \[\d+, 3, 3\] here"),
        (spec_of(Block(3)), SparsitySpec(Block(3), 0.8, permutation="random"), "in the checkpoint and"),
        (spec_of(Block(4)), spec_of(Diagonal()), "the checkpoint holds bias, columns, permutation, row_pointers, values; this"),
        (spec_of(NM(1, 4)), spec_of(Diagonal()), "in the checkpoint and"),
        (spec_of(Diagonal()), spec_of(Unstructured()), "the checkpoint holds bias, offsets"),
        (
            spec_of(Block(4)),
            spec_of(Block(4), permutation="none"),
            "the checkpoint holds .*permutation.*; this layer bias, col",
        ),
        (spec_of(Block(4), permutation="none"), spec_of(Block(4)), "; this layer bias, columns, permutation, row"),
        (
            spec_of(Block(4)),
            spec_of(Block(4), permutation_side="output"),
            r"permutation is \[15\] in the checkpoint and \[12\]",
        ),
    ],
    ids=range(8),
)
def test_a_checkpoint_of_another_specification_is_refused_with_layer_and_fix(
    saved: SparsitySpec, loaded: SparsitySpec, message: str
) -> None:
    with pytest.raises(RuntimeError, match=f"layer '0': .*{message}.*; {FIX}"):
        model(loaded).load_state_dict(model(saved).state_dict())


def test_a_dense_checkpoint_is_refused_with_layer_and_fix() -> None:
    dense = nn.Sequential(nn.Linear(15, 12), nn.ReLU(), nn.Linear(12, 15, bias=False))
    with pytest.raises(RuntimeError, match=f"layer '2': the checkpoint holds a dense weight, this layer a sparse one; {FIX}"):
        model(spec_of(Block(4))).load_state_dict(dense.state_dict())


@pytest.mark.parametrize(
    ("structure", "name", "message"),
    [
        (Block(4), "columns", "columns must lie in"),
        (Block(4), "row_pointers", "row_pointers must"),
        (NM(1, 4), "offsets", "offsets must stay inside their group of 4"),
        (Diagonal(), "offsets", "offsets must lie in"),
        (Diagonal(), "permutation", "every feature 0 … 14 must occur exactly once"),
    ],
)
def test_corrupted_indices_in_a_checkpoint_are_refused_and_not_loaded(structure: Structure, name: str, message: str) -> None:
    target = model(spec_of(structure))
    state = {key: tensor.clone() for key, tensor in target.state_dict().items()}
    state[f"0.{name}"] += 100
    with pytest.raises(RuntimeError, match=f"layer '0': .*{message}"):
        target.load_state_dict(state)
    assert not torch.equal(target.state_dict()[f"0.{name}"], state[f"0.{name}"])


def test_a_partial_checkpoint_loads_when_that_is_asked_for() -> None:
    source, target = model(spec_of(Block(4))), model(spec_of(Block(4)), seed=1)
    result = target.load_state_dict({"0.bias": source.state_dict()["0.bias"]}, strict=False)
    assert "0.values" in result.missing_keys
    assert torch.equal(target.state_dict()["0.bias"], source.state_dict()["0.bias"])


# ---- inside PyTorch's own modules


def test_a_transformer_layer_gives_the_same_in_its_fast_path() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).double().eval()
    padst.sparsify(block, SparsitySpec(Block(4), 0.5, permutation="random"))
    assert isinstance(block.linear1, PermutedSparseLinear)
    dense = padst.densify(copy.deepcopy(block))
    x = torch.randn(2, 3, 16, dtype=torch.float64)
    with torch.no_grad():  # the fast path reads the weights instead of calling the layers
        assert torch.equal(block(x), dense(x))


@pytest.mark.parametrize("side", ["input", "output"])
def test_the_dense_weight_has_what_is_still_being_learned_multiplied_in(side: str) -> None:
    torch.manual_seed(0)
    layer = padst.sparsify(
        nn.Sequential(nn.Linear(24, 16, dtype=torch.float64)),
        padst.SparsitySpec(Diagonal(), sparsity=0.5, permutation="learned", permutation_side=side),
    )[0]
    assert isinstance(layer, PermutedSparseLinear)
    size = 24 if side == "input" else 16
    layer.soft = SoftPermutation(torch.rand(size, size, dtype=torch.float64), torch.tensor([SOFT], dtype=torch.uint8))
    layer.gate = torch.rand(layer.values.shape[0], 1, dtype=torch.float64)
    x = torch.randn(5, 24, dtype=torch.float64)
    expected = F.linear(x, layer.dense_weight(), layer.bias)
    assert torch.allclose(layer(x), expected, rtol=0, atol=1e-12)
    layer.soft.state.fill_(HARD)
    assert torch.allclose(layer(x), F.linear(x, layer.dense_weight(), layer.bias), rtol=0, atol=1e-12)
    assert not torch.allclose(layer(x), expected)
