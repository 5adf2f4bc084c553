"""When permutations are learned: features never move on a step with a topology update, which grows by the order before it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import padst_compile as padst
from padst_compile.errors import AttachError
from padst_compile.testing.small_models import Gated, x
from padst_compile.testing.training import layers_of, loss_at, small_model
from padst_compile.training.acting_steps import ActingSteps
from padst_compile.training.config import DSTConfig, PermutationMethod
from padst_compile.training.schedule import is_due

INTERVALS = st.integers(1, 9)


def steps_of(model: nn.Module, config: padst.DSTConfig, loss: Any) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """For each sparse layer the steps that changed its topology, and those that changed its permutation."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    padst.attach(model, optimizer, config)
    assert config.total_steps is not None
    grown: dict[str, list[int]] = {}
    moved: dict[str, list[int]] = {}
    for step in range(1, config.total_steps + 1):
        before = {name: [*map(torch.clone, layer.topology), layer.permutation.clone()] for name, layer in named(model)}
        loss(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, layer in named(model):
            *topology, order = before[name]
            if not all(map(torch.equal, topology, layer.topology)):
                grown.setdefault(name, []).append(step)
            if not torch.equal(order, layer.permutation):
                moved.setdefault(name, []).append(step)
    return grown, moved


def named(model: nn.Module) -> list[tuple[str, Any]]:
    return list(padst.sparse_layers(model))


@pytest.mark.parametrize("interval", [1, 3, 4, 8])
@pytest.mark.parametrize("learned", ["sinkhorn_ste", "regroup"])
def test_features_stay_on_steps_that_update_the_topology(learned: PermutationMethod, interval: int) -> None:
    """Whatever interval the learner has of its own; 3 and 8 would meet every update, or every third."""
    method = padst.LearnedPermutation(learned, interval=interval, learning_rate=10.0, fraction=1.0, gain=0.0, deadline=1.0)
    config = padst.DSTConfig(interval=4, total_steps=24, end=1.0, permutation=method, check_invariants=True)
    grown, moved = steps_of(small_model(permutation="learned"), config, loss_at)
    assert grown.keys() == {"0", "2"}
    for name, steps in grown.items():
        assert set(steps) <= {4, 8, 12, 16, 20, 24}
        assert not set(steps) & set(moved.get(name, ()))
    assert max(map(max, moved.values())) > 4, "nothing moved after the first update"


@pytest.mark.parametrize(("deadline", "hard"), [(11, 11), (12, 13)])
def test_soft_permutations_become_hard_on_steps_without_an_update(deadline: int, hard: int) -> None:
    method = padst.LearnedPermutation("autoshuffle", deadline=deadline / 24, threshold=0.0)
    model = small_model(permutation="learned")
    config = padst.DSTConfig(interval=4, total_steps=24, end=1.0, permutation=method)
    grown, moved = steps_of(model, config, loss_at)
    assert moved == {"0": [hard], "2": [hard]}
    assert all(12 in steps for steps in grown.values())


def test_layers_that_move_together_stay_when_any_of_them_is_updated() -> None:
    torch.manual_seed(0)
    targets = ("1.gate", "1.up")
    spec = padst.SparsitySpec(
        padst.Block(2), 0.5, permutation="learned", permutation_group="foldable", targets=targets, ignore=()
    )
    example = x(2, 5, 6)
    model = padst.sparsify(nn.Sequential(nn.Linear(6, 16), Gated()).double(), spec, example)
    method = padst.LearnedPermutation("sinkhorn_ste", interval=1, learning_rate=10.0, deadline=1.0)
    config = padst.DSTConfig(interval=4, total_steps=24, end=1.0, permutation=method, staggered=True)
    grown, moved = steps_of(model, config, lambda trained, step: trained(example / step).square().mean())
    assert moved[targets[0]] == moved[targets[1]]
    assert grown.keys() == set(targets)
    assert not set(grown[targets[0]]) & set(grown[targets[1]])
    assert not {*grown[targets[0]], *grown[targets[1]]} & set(moved[targets[0]])


def test_updates_at_every_step_leave_none_for_moving_features() -> None:
    model = small_model(permutation="learned")
    config = padst.DSTConfig(
        interval=1, total_steps=20, end=1.0, permutation=padst.LearnedPermutation("sinkhorn_ste", deadline=1.0)
    )
    with pytest.raises(AttachError, match=r"layer '0' would never learn.*without a topology update.*step 20.*than 1$"):
        padst.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), config)
    assert all(layer.soft is None for layer in layers_of(model))


@given(INTERVALS, INTERVALS, st.lists(st.integers(0, 8), min_size=1, max_size=3), st.integers(0, 40))
def test_learners_act_halfway_through_intervals_or_at_the_next_step_without_updates(
    interval: int, updates: int, offsets: list[int], last: int
) -> None:
    config = DSTConfig(interval=updates, total_steps=30, end=1.0)
    offsets = [offset % updates for offset in offsets]
    acting = ActingSteps(interval, offsets[0], last, config, tuple(offsets))
    free = [step for step in range(1, last + 1) if not any(is_due(step, config, offset) for offset in offsets)]
    middles = [step for step in range(1, last + 1) if (step - interval // 2 - offsets[0]) % interval == 0]
    expected = {next((step for step in free if step >= middle), last + 1) for middle in middles} - {last + 1}
    assert set(acting) == expected == {step for step in range(-1, 50) if step in acting}
    assert list(acting) == sorted(acting)


@given(st.integers(2, 12), st.integers(0, 11))
def test_learners_with_the_interval_of_the_topology_act_between_its_updates(interval: int, offset: int) -> None:
    config = DSTConfig(interval=interval, total_steps=5 * interval, end=1.0)
    acting = list(ActingSteps(interval, offset % interval, 5 * interval, config, (offset % interval,)))
    due = [step for step in range(5 * interval + 1) if is_due(step, config, offset % interval)]
    assert all(any(before < step < after for step in acting) for before, after in itertools.pairwise(due))
    assert {b - a for a, b in itertools.pairwise(acting)} == {interval}


def test_the_steps_of_learners() -> None:
    alone = DSTConfig("static")
    assert list(ActingSteps(1, 0, 4, alone)) == [1, 2, 3, 4]
    assert list(ActingSteps(10, 3, 30, alone)) == [8, 18, 28]
    assert not list(ActingSteps(10, 0, 4, alone))
