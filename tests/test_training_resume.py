"""A training that is resumed has the losses of an unbroken one, bit for bit, wherever it was cut."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

import padst_compile as padst
from padst_compile.testing.training import layers_of, loss_at, losses, small_model
from padst_compile.training.config import Method, PermutationMethod
from padst_compile.training.runtime import Runtime

TOTAL, INTERVAL = 16, 4
HARD_FROM = 8  # autoshuffle's deadline

Training = tuple[nn.Sequential, torch.optim.Optimizer, Runtime]


def begin(structure: str, method: Method, learned: PermutationMethod | None) -> Training:
    permuted: dict[str, Any] = {"permutation": "learned", "permutation_side": "smaller"} if learned else {}
    if method == "dynadiag":
        permuted["sparsity"] = 0.0
    model = small_model(structure, dtype=torch.float32, **permuted)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    learning = learned and padst.LearnedPermutation(
        method=learned, deadline=HARD_FROM / TOTAL, interval=3, fraction=0.5, gain=0.0
    )
    config = padst.DSTConfig(
        method=method,
        interval=INTERVAL,
        total_steps=TOTAL,
        end=0.75,
        final_sparsity=0.9 if method in ("magnitude", "dynadiag") else None,
        permutation=learning,
        check_invariants=True,
    )
    return model, optimizer, padst.attach(model, optimizer, config)


def saved(training: Training) -> dict[str, Any]:
    """Through a file, as plain tensors and values (`weights_only`)."""
    model, optimizer, runtime = training
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "runtime": runtime.state_dict()}, file)
    file.seek(0)
    state: dict[str, Any] = torch.load(file, weights_only=True)
    return state


def load(training: Training, state: dict[str, Any]) -> None:
    model, optimizer, runtime = training
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    runtime.load_state_dict(state["runtime"])


CASES: list[tuple[str, Method, PermutationMethod | None]] = [
    ("block:4", "rigl", "autoshuffle"),
    ("block:4", "set", "sinkhorn_ste"),
    ("nm:1:4", "rigl", "regroup"),
    ("unstructured", "mest", "autoshuffle"),
    ("block:8x4", "magnitude", None),
    ("diagonal", "dynadiag", None),
]


@pytest.mark.parametrize(("structure", "method", "learned"), CASES)
def test_resumed_losses_are_those_of_an_unbroken_run(structure: str, method: Method, learned: PermutationMethod | None) -> None:
    """Cut in the middle of an interval and of softness, right before and after an update, and after hardening."""
    whole = begin(structure, method, learned)
    expected = losses(*whole[:2], 0, TOTAL)
    for cut in (0, 2, 3, 4, 6, HARD_FROM, 9, 13):
        broken = begin(structure, method, learned)
        assert losses(*broken[:2], 0, cut) == expected[:cut]
        state = saved(broken)
        losses(*broken[:2], cut, TOTAL)  # goes on, and must not disturb the state
        fresh = begin(structure, method, learned)
        load(fresh, state)
        assert losses(*fresh[:2], cut, TOTAL) == expected[cut:], f"cut at {cut}"
        assert fresh[2].metrics() | {"update_seconds": 0, "hook_seconds": 0} == whole[2].metrics() | {
            "update_seconds": 0,
            "hook_seconds": 0,
        }
        for layer, other in zip(layers_of(fresh[0]), layers_of(whole[0]), strict=True):
            assert torch.equal(layer.values, other.values)
            assert all(map(torch.equal, layer.topology, other.topology))


@pytest.mark.parametrize(("structure", "method", "learned"), CASES)
def test_going_back_in_time(structure: str, method: Method, learned: PermutationMethod | None) -> None:
    """A state loads into the training that it came from, also when permutations have become hard since; kept in memory."""
    training = begin(structure, method, learned)
    losses(*training[:2], 0, 5)
    model, optimizer, runtime = training
    kept = runtime.state_dict()  # not copied: what training frees must stay in it
    soft = [learner["learner"] and learner["learner"].get("soft") for learner in kept["layers"].values()]
    state = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "runtime": kept})
    expected = losses(*training[:2], 5, TOTAL)
    for entry in soft:
        assert not entry or bool(entry["parameter"].isfinite().all())
    load(training, state)
    assert runtime.step == 5
    assert losses(*training[:2], 5, TOTAL) == expected


def test_a_finished_model_keeps_its_losses() -> None:
    """`finalize` in the middle of softness hardens; after hardening it changes nothing."""
    for cut, exact in ((3, False), (HARD_FROM + 1, True)):
        training = begin("block:4", "rigl", "autoshuffle")
        losses(*training[:2], 0, cut)
        report = padst.permutation_report(training[2])
        assert report.hardened == (2 if exact else 0)
        before = loss_at(training[0], 99).item()
        chosen = [learner.permutation().clone() for learner in training[2].learners.values()]
        padst.finalize(training[0])
        assert (loss_at(training[0], 99).item() == before) == exact
        for layer, permutation in zip(layers_of(training[0]), chosen, strict=True):
            assert torch.equal(layer.permutation, permutation)  # type: ignore[arg-type]  # it has one
