"""Updates that are spread over the interval: who is updated when, and how many scores exist at once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import padst_compile as padst
from padst_compile.training.runtime import Runtime


def trained(structure: str, **settings: object) -> tuple[Runtime, list[tuple[int, tuple[str, ...], int]]]:
    """The runtime, and for each step with an update the layers that it changed and the layers that had scores."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 64))
    sparsity = None if structure.startswith("nm") else 0.5
    order = "learned" if "permutation" in settings else "none"
    model = padst.sparsify(model, padst.SparsitySpec(structure, sparsity=sparsity, permutation=order))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)  # larger steps silence tanh, and layers without gradients stay
    config = padst.DSTConfig(interval=6, end=1.0, total_steps=24, check_invariants=True, **settings)
    runtime = padst.attach(model, optimizer, config)
    seen = []
    for step in range(1, 19):
        model(torch.randn(8, 32)).square().sum().backward()
        scores = sum(member.scores is not None for member in runtime._members)
        before = runtime.updates
        optimizer.step()
        optimizer.zero_grad()
        if runtime.updates > before:
            seen.append((step, tuple(update.layer for update in runtime.last_update), scores))
    return runtime, seen


@pytest.mark.parametrize("structure", ["nm:1:4", "unstructured"])
def test_scores_as_fine_as_weights_exist_for_one_layer_at_a_time(structure: str) -> None:
    _, seen = trained(structure)
    places = [(6, "0"), (8, "2"), (10, "4"), (12, "0"), (14, "2"), (16, "4"), (18, "0")]
    assert seen == [(step, (layer,), 1) for step, layer in places]


def test_diagonals_take_turns_where_regroup_looks_at_each_of_their_weights() -> None:
    _, seen = trained("diagonal", permutation=padst.LearnedPermutation("regroup"))
    assert [layers for _, layers, _ in seen][:4] == [("0",), ("2",), ("4",), ("0",)]


@pytest.mark.parametrize(
    ("structure", "settings"),
    [("block:8", {}), ("diagonal", {}), ("nm:1:4:8", {}), ("nm:1:4", {"staggered": False}), ("nm:1:4", {"method": "set"})],
)
def test_other_layers_are_updated_together(structure: str, settings: dict[str, object]) -> None:
    _, seen = trained(structure, **settings)
    assert [(step, layers) for step, layers, _ in seen] == [(step, ("0", "2", "4")) for step in (6, 12, 18)]


def test_any_layers_may_be_staggered() -> None:
    _, seen = trained("block:8", staggered=True)
    assert [(step, layers) for step, layers, _ in seen][:3] == [(6, ("0",)), (8, ("2",)), (10, ("4",))]
