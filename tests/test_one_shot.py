"""Sparsifying a model that is trained already: searched permutations, and scores from example batches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import padst_compile as padst
from padst_compile.errors import CalibrationError, MissingInputsError, SpecError
from padst_compile.testing.equivalence import assert_equivalent

STRUCTURES = (padst.Block(8), padst.NM(1, 4), padst.NM(1, 4, 4), padst.Diagonal())


def hidden_blocks(seed: int = 0) -> nn.Sequential:
    """A model whose first layer has blocks behind a shuffle, under small noise."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 64))
    mask = torch.rand(4, 8, generator=generator).ge(0.75).repeat_interleave(8, 0).repeat_interleave(8, 1)
    weight = torch.randn(32, 64, generator=generator) * (mask + 0.01)
    with torch.no_grad():
        model[0].weight.copy_(weight[:, torch.randperm(64, generator=generator)])
    return model


def spec(structure: padst.structures.Structure, **fields: Any) -> padst.SparsitySpec:
    sparsity = None if isinstance(structure, padst.NM) else 0.75
    return padst.SparsitySpec(structure, sparsity, **fields)


def magnitude(model: nn.Module) -> float:
    return sum(float(layer.weight.detach().abs().sum()) for _, layer in padst.sparse_layers(model))


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda s: s.to_string())
def test_a_search_keeps_more_than_no_search_and_the_layer_means_its_dense_weights(structure: Any, side: str) -> None:
    dense = hidden_blocks()
    plain = padst.sparsify(copy.deepcopy(dense), spec(structure, permutation="none"))
    found = padst.sparsify(copy.deepcopy(dense), spec(structure, permutation="search", permutation_side=side))
    again = padst.sparsify(copy.deepcopy(dense), spec(structure, permutation="search", permutation_side=side))
    nothing_to_order = side == "output" and structure == padst.NM(1, 4)
    assert magnitude(found) == pytest.approx(magnitude(plain)) if nothing_to_order else magnitude(found) > magnitude(plain)
    for (name, layer), (_, twin) in zip(padst.sparse_layers(found), padst.sparse_layers(again), strict=True):
        assert torch.equal(layer.permutation, twin.permutation)
        kept = layer.weight != 0  # in the order of the dense layer
        assert torch.equal(layer.weight[kept], dense.get_submodule(name).weight[kept])


def test_hidden_blocks_are_found_where_plain_blocks_miss_most() -> None:
    dense = hidden_blocks()
    first = spec(padst.Block(8), targets=("0",))
    total = float(dense[0].weight.abs().sum())
    plain = magnitude(padst.sparsify(copy.deepcopy(dense), first)) / total
    found = magnitude(padst.sparsify(copy.deepcopy(dense), spec(padst.Block(8), targets=("0",), permutation="search"))) / total
    assert found - plain > 0.5 * (1 - plain)


def test_a_searched_model_compiles_to_the_same_function() -> None:
    model = padst.sparsify(hidden_blocks(), spec(padst.Block(8), permutation="search")).eval()
    assert_equivalent(model, torch.randn(5, 64))


def test_activation_scores_are_magnitudes_times_input_norms_over_all_batches() -> None:
    """Against the definition: what S keeps are the largest |w| ‖x‖ that N:M allows."""
    dense = hidden_blocks().train()
    batches = [torch.randn(3, 2, 64) * torch.rand(64) ** 3, torch.randn(4, 64)]
    inputs = torch.cat([batch.reshape(-1, 64) for batch in batches])
    chosen = spec(padst.NM(1, 4), init="activation", targets=("0",))
    sparse = padst.sparsify(copy.deepcopy(dense), chosen, calibration=[(batches[0],), {"input": batches[1]}])
    scores = dense[0].weight.detach().abs().double() * inputs.double().norm(dim=0)
    wanted = torch.zeros(32, 16, 4).scatter_(2, scores.reshape(32, 16, 4).argmax(-1, keepdim=True), 1).reshape(32, 64).bool()
    assert torch.equal(sparse[0].weight != 0, wanted)
    assert not torch.equal(padst.sparsify(copy.deepcopy(dense), spec(padst.NM(1, 4), targets=("0",)))[0].weight != 0, wanted)
    assert dense.training and sparse.training


@pytest.mark.parametrize("permutation", ["random", "search"])
@pytest.mark.parametrize("side", ["input", "output"])
def test_activation_scores_follow_the_permutation(permutation: str, side: str) -> None:
    """Inputs of zero are worth nothing, wherever the permutation puts them."""
    dense = hidden_blocks()
    batch = torch.randn(9, 64)
    batch[:, ::2] = 0
    chosen = spec(padst.NM(1, 4), init="activation", targets=("0",), permutation=permutation, permutation_side=side)
    weight = padst.sparsify(dense, chosen, calibration=[batch])[0].weight
    alive = (weight != 0).sum(0)
    assert int(alive[1::2].sum()) > 0.8 * int(alive.sum())


WRONG = {
    "no batches": ({"init": "activation"}, [], CalibrationError, "no batches"),
    "none given": ({"init": "activation"}, None, MissingInputsError, "calibration="),
    "for nothing": ({}, [torch.randn(2, 64)], CalibrationError, "leave it out"),
    "not finite": ({"init": "activation"}, [torch.full((2, 64), torch.inf)], CalibrationError, "'0' are not finite"),
}


@pytest.mark.parametrize(("fields", "batches", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_calibrations_leave_the_model_as_it_was(fields: Any, batches: Any, error: Any, message: str) -> None:
    model = hidden_blocks()
    with pytest.raises(error, match=message):
        padst.sparsify(model, spec(padst.Block(8), **fields), calibration=batches)
    assert [type(module) for module in model] == [nn.Linear, nn.GELU, nn.Linear]
    assert not any(module._forward_pre_hooks for module in model)
    assert model.training


def test_a_layer_that_no_batch_reaches_is_named() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].add_module("idle", nn.Linear(8, 8))
    with pytest.raises(CalibrationError, match="'0.idle'"):
        padst.sparsify(model, padst.SparsitySpec(padst.Block(4), 0.5, init="activation"), calibration=[torch.randn(2, 8)])


@pytest.mark.parametrize("fields", [{"init": "random"}, {"permutation_group": "foldable"}], ids=str)
def test_a_search_with_nothing_to_search_for_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="goes with"):
        spec(padst.Block(8), permutation="search", **fields)
