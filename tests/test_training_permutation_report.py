"""`permutation_report`: penalties, distances, hardening and cost, as data and as a table, also after a resume."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import padst_compile as padst
from padst_compile.testing.training import HIDDEN, WIDTH, layers_of, loss_at, small_model
from padst_compile.training.config import PermutationMethod
from padst_compile.training.permutations.report import distance
from padst_compile.training.runtime import Runtime

TOTAL, HARD_FROM = 12, 6

Training = tuple[nn.Sequential, torch.optim.Optimizer, Runtime]


def begin(learned: PermutationMethod | None, structure: str = "block:4", **spec: str) -> Training:
    model = small_model(structure, **{"permutation": "learned" if learned else "random", **spec})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    method = learned and padst.LearnedPermutation(learned, deadline=HARD_FROM / TOTAL, interval=2, fraction=0.5, gain=0.0)
    config = padst.DSTConfig(interval=4, total_steps=TOTAL, end=1.0, permutation=method or None)
    return model, optimizer, padst.attach(model, optimizer, config)


def train(training: Training, steps: int) -> None:
    model, optimizer, runtime = training
    for step in range(runtime.step, runtime.step + steps):
        loss_at(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_soft_permutation_shows_penalty_and_products_until_it_is_hard() -> None:
    training = begin("autoshuffle")
    train(training, HARD_FROM - 1)
    report = padst.permutation_report(training[2])
    assert (report.method, report.step, report.hardened) == ("autoshuffle", HARD_FROM - 1, 0)
    assert [row.layer for row in report.layers] == ["0", "2"]
    assert [row.features for row in report.layers] == [WIDTH, HIDDEN]
    for row, layer in zip(report.layers, layers_of(training[0]), strict=True):
        assert not row.hard and row.hardened_at is None and row.penalty > 0
        assert row.products == row.features**2 / layer.values.numel()
    train(training, 1)
    report = padst.permutation_report(training[2])
    assert report.hardened == 2
    for row, layer in zip(report.layers, layers_of(training[0]), strict=True):
        assert (row.hard, row.hardened_at, row.penalty, row.products) == (True, HARD_FROM, 0.0, 0.0)
        assert row.from_identity == distance(layer.permutation)  # type: ignore[arg-type]  # it has one


@pytest.mark.parametrize("learned", ["sinkhorn_ste", "regroup"])
def test_permutations_that_are_always_hard_move_away_from_where_they_began(learned: PermutationMethod) -> None:
    training = begin(learned)
    for row in padst.permutation_report(training[2]).layers:
        assert row.from_start.moved == row.from_identity.moved == 0.0
    train(training, TOTAL)
    report = padst.permutation_report(training[2])
    assert report.hardened == 2 and all((row.hardened_at, row.penalty, row.products) == (0, 0.0, 0.0) for row in report.layers)
    assert any(row.from_start.moved > 0 for row in report.layers)


def test_permutations_that_stay_are_listed_and_layers_without_one_are_not() -> None:
    training = begin(None)
    train(training, 4)
    report = padst.permutation_report(training[2])
    assert report.method is None and report.hardened == 2
    for row in report.layers:
        assert row.from_start.moved == 0.0 < row.from_identity.moved
    assert padst.permutation_report(begin(None, permutation="none")[2]).layers == ()


def test_the_report_is_plain_data() -> None:
    training = begin("autoshuffle")
    train(training, HARD_FROM)
    report = padst.permutation_report(training[2])
    data = report.to_dict()
    assert json.loads(json.dumps(data)) == {**data, "layers": list(data["layers"])}
    assert data["hardened"] == 2 and data["layers"][0]["from_start"]["moved"] == report.layers[0].from_start.moved


def test_the_table_has_a_line_for_each_layer() -> None:
    training = begin("autoshuffle")
    train(training, 3)
    soft = padst.permutation_report(training[2])
    assert soft.table().row_count == 2
    text = str(soft)
    assert "permutations at step 3, method autoshuffle" in text and "0 of 2 hard" in text
    first = next(line for line in text.splitlines() if line.strip("│ ").startswith("0 "))
    assert [cell.strip() for cell in first.strip("│").split("│")][:4] == [
        "0",
        str(WIDTH),
        f"{soft.layers[0].penalty:.3f}",
        "soft",
    ]
    train(training, TOTAL - 3)
    assert "2 of 2 hard" in str(padst.permutation_report(training[2]))
    assert f"step {HARD_FROM}" in str(padst.permutation_report(training[2]))
    assert "always" in str(padst.permutation_report(begin("regroup")[2]))


def test_seconds_are_those_of_the_steps_that_were_taken_here() -> None:
    """After a resume, too: the steps before it took their time elsewhere."""
    training = begin("autoshuffle")
    assert padst.permutation_report(training[2]).seconds_per_step == 0.0
    train(training, 4)
    model, optimizer, runtime = training
    assert padst.permutation_report(runtime).seconds_per_step == runtime.learning_seconds / 4 > 0
    assert runtime.hook_seconds >= runtime.learning_seconds
    assert runtime.hook_seconds >= runtime.update_seconds > 0
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict(), runtime.state_dict()))
    fresh = begin("autoshuffle")
    for target in (fresh, training):
        for part, stored in zip(target, state, strict=True):
            part.load_state_dict(stored)
        runtime = target[2]
        assert (runtime.step, runtime.timed_steps) == (4, 0)
        assert runtime.update_seconds == runtime.learning_seconds == runtime.hook_seconds == 0.0
        assert padst.permutation_report(runtime).seconds_per_step == 0.0
        train(target, 1)
        assert runtime.timed_steps == 1
        assert padst.permutation_report(runtime).seconds_per_step == runtime.learning_seconds > 0
