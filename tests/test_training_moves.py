"""Models that move to other memory or another device while they train: what a runtime keeps goes with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import padst_compile as padst
from padst_compile.errors import AttachError
from padst_compile.kernels import gradient_tap
from padst_compile.testing.training import layers_of, loss_at, small_model

TOTAL = 14
META = torch.device("meta")
# structure, method, learned permutation, permuted side
TRAININGS = (
    ("block:4", "rigl", "autoshuffle", "output"),
    ("nm:2:4:2", "rigl", "regroup", "input"),
    ("diagonal:4", "mest", "sinkhorn_ste", "output"),
    ("block:8x4", "magnitude", "sinkhorn_ste", "input"),
    ("unstructured", "rigl", None, None),
    ("diagonal", "dynadiag", None, None),
)
Training = tuple[str, str, str | None, str | None]
Move = Callable[[nn.Module], object]


def nowhere(model: nn.Module) -> None:
    """No move."""


def to_other_memory(model: nn.Module) -> None:
    """As a move to a device and back does."""
    model._apply(torch.clone)


def begin(training: Training) -> tuple[nn.Sequential, torch.optim.Optimizer, padst.Runtime]:
    structure, method, learned, side = training
    permuted = {} if learned is None else {"permutation": "learned", "permutation_side": side}
    sparsity = {"sparsity": 0.0} if method == "dynadiag" else {}
    model = small_model(structure, **permuted, **sparsity)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    config = padst.DSTConfig(
        method=method,  # type: ignore[arg-type]  # a method
        interval=3,
        total_steps=TOTAL,
        final_sparsity=0.9 if method in ("magnitude", "dynadiag") else None,
        permutation=None if learned is None else padst.LearnedPermutation(learned, interval=2, gain=0.0, fraction=0.5),  # type: ignore[arg-type]  # a method
        check_invariants=True,
        staggered=False,
    )
    return model, optimizer, padst.attach(model, optimizer, config)


def trained(training: Training, between: Move, amid: Move) -> dict[str, Any]:
    """What a training ends with, whose model moves between steps, and between the backward passes before one."""
    model, optimizer, runtime = begin(training)
    for step in range(TOTAL):
        between(model)
        loss_at(model, 2 * step).backward()
        amid(model)
        loss_at(model, 2 * step + 1).backward()
        amid(model)
        optimizer.step()
        optimizer.zero_grad()
    metrics = {name: number for name, number in runtime.metrics().items() if not name.endswith("_seconds")}
    assert metrics["skipped_updates"] == 0
    padst.finalize(model)
    return {**model.state_dict(), **metrics}


@pytest.mark.parametrize("moves", [(to_other_memory, nowhere), (nowhere, to_other_memory)], ids=["between", "amid"])
@pytest.mark.parametrize("training", TRAININGS, ids=lambda training: f"{training[1]}-{training[2]}")
def test_a_model_that_moves_in_memory_trains_as_one_that_stays(training: Training, moves: tuple[Move, Move]) -> None:
    expected, found = trained(training, nowhere, nowhere), trained(training, *moves)
    for name, value in expected.items():
        assert torch.equal(value, found[name]) if isinstance(value, torch.Tensor) else value == found[name], name


def test_a_layer_whose_weights_were_replaced_is_refused_before_a_step_that_would_miss_it() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    padst.attach(model, optimizer, padst.DSTConfig(interval=2, total_steps=8))
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    loss_at(model, 0).backward()
    before = [layer.values.clone() for layer in layers_of(model)]
    with pytest.raises(AttachError, match="layer '0' has other weights than those .* optimizer.*finalize.*attach"):
        optimizer.step()
    assert all(torch.equal(old, layer.values) for old, layer in zip(before, layers_of(model), strict=True))
    padst.finalize(model)
    padst.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), padst.DSTConfig(interval=2, total_steps=8))


def devices(*tensors: torch.Tensor) -> set[torch.device]:
    return {tensor.device for tensor in tensors}


def test_what_has_been_added_up_moves_to_the_device_of_its_layer() -> None:
    """And what the sums are taken by: the rows of a sample, the places of a learner."""
    model, _, runtime = begin(("block:4", "rigl", "sinkhorn_ste", "input"))
    others, *_ = begin(("nm:1:4", "rigl", "regroup", "input"))
    loss_at(model, 0).backward()
    loss_at(others, 0).backward()
    heard = [gradient_tap.listener_of(each[0].topology) for each in (model, others)]  # type: ignore[arg-type]  # of layers
    for listener in heard:
        assert listener is not None
        assert all(reducer.total is not None for reducer in (*listener.magnitudes, *listener.signed))  # type: ignore[attr-defined]  # a DenseGradient
        listener.to(META)
        assert {META} == devices(*(reducer.total for reducer in (*listener.magnitudes, *listener.signed)))  # type: ignore[attr-defined]  # as above
    state = runtime.learners["0"].state_dict()
    assert {META} == devices(*(tensor for name, tensor in state.items() if name != "steps"))
    assert {META} == devices(heard[1].magnitudes[0].units.active, heard[1].magnitudes[0].units.group)  # type: ignore[union-attr]  # as above


@pytest.mark.parametrize("steps", [0, TOTAL])
def test_a_soft_permutation_moves_whether_it_has_memory_or_not(steps: int) -> None:
    model, optimizer, _ = begin(("block:4", "static", "autoshuffle", "input"))
    for step in range(steps):
        loss_at(model, step).backward()
        optimizer.step()
    soft = layers_of(model)[0].soft
    assert soft is not None
    assert soft.is_soft == (steps == 0)
    size = soft.matrix.shape
    soft.to(META)
    assert devices(soft.matrix, soft.anchor) == {META}
    assert soft.matrix.shape == size
    assert soft.anchor.requires_grad


def test_what_is_pruned_moves_with_its_layer() -> None:
    model, optimizer, runtime = begin(("block:4", "magnitude", None, None))
    for step in range(3):
        loss_at(model, step).backward()
        optimizer.step()
    trained_layer = runtime.layers[0]
    assert trained_layer.alive is not None
    model[0].to(META)
    trained_layer.follow()
    assert trained_layer.mask is not None
    assert devices(trained_layer.alive, trained_layer.mask) == {META}
