"""Training under `permutation_group="foldable"`: whatever is learned is one of the permutations that the graph folds."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import padst_compile as padst
from padst_compile.backend import padst as padst_backend
from padst_compile.errors import AttachError, SpecError
from padst_compile.passes.context import HOISTED
from padst_compile.passes.pipeline import Pipeline
from padst_compile.testing.capture import capture
from padst_compile.testing.small_models import HEADS, WIDTH, Attention, FusedAttention, Gated, tables, x

TARGETS = ("1.proj", "1.q", "3.gate", "3.up")


class Block(nn.Sequential):
    """Attention and a gated product, with dense layers around them that can take orders on."""

    def __init__(self, kv_heads: int = HEADS) -> None:
        super().__init__(nn.Linear(6, WIDTH), Attention(kv_heads), nn.Linear(WIDTH, WIDTH), Gated(), nn.Linear(WIDTH, 3))


def spec(*targets: str, **fields: Any) -> padst.SparsitySpec:
    fields = {"structure": padst.Block(2), "permutation": "learned", "permutation_group": "foldable", **fields}
    return padst.SparsitySpec(sparsity=0.5, targets=targets or TARGETS, ignore=(), **fields)


def make(chosen: padst.SparsitySpec | None = None, kv_heads: int = HEADS) -> nn.Module:
    torch.manual_seed(0)
    return padst.sparsify(Block(kv_heads).double(), chosen or spec(), tokens())


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def config(method: str, steps: int = 16) -> padst.DSTConfig:
    learned = padst.LearnedPermutation(method, learning_rate=10.0, deadline=1.0, interval=2, fraction=1.0, gain=0.0)
    return padst.DSTConfig("set", interval=4, end=1.0, total_steps=steps, permutation=learned, check_invariants=True)


def train(model: nn.Module, method: str, steps: int = 16) -> padst.Runtime:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    runtime = padst.attach(model, optimizer, config(method, steps))
    for step in range(steps):
        model(tokens(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return runtime


def permutations(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: layer.permutation for name, layer in padst.sparse_layers(model) if layer.permutation is not None}


def moved(model: nn.Module) -> set[str]:
    return {name for name, order in permutations(model).items() if not torch.equal(order, torch.arange(len(order)))}


def gathers(model: nn.Module) -> int:
    """Operations of the inference graph that read by index, whatever they read."""
    with torch.no_grad():
        facts = capture(model, tokens()).context(inference=True)
        Pipeline(kernels=None).run(facts)
    nodes = [node for node in facts.module.graph.nodes if not node.meta.get(HOISTED)]
    return tables(facts) + sum(word in str(node.target) for node in nodes for word in ("index", "gather", "take"))


@pytest.mark.parametrize(
    ("method", "kv_heads", "kind", "expected"),
    [
        ("sinkhorn_ste", HEADS, "learned", {"1.proj", "1.q", "3.gate", "3.up"}),
        ("sinkhorn_ste", 2, "random", {"1.proj", "1.q", "3.gate", "3.up"}),
        ("regroup", HEADS, "learned", {"1.proj", "1.q"}),  # gate and up, which share theirs, keep it
    ],
)
def test_what_is_learned_folds_away(method: str, kv_heads: int, kind: str, expected: set[str]) -> None:
    model = make(spec(permutation=kind), kv_heads)
    before = permutations(copy.deepcopy(model))
    groups = padst.foldable_permutations(Block(kv_heads).double(), spec(), tokens())
    train(model, method)
    padst.finalize(model).eval()
    after = permutations(model)
    assert {name for name, order in after.items() if not torch.equal(order, before[name])} == expected
    assert all(groups[name].contains(order) for name, order in after.items())
    assert torch.equal(after["3.gate"], after["3.up"])
    assert gathers(model) == gathers(make(spec(permutation="none"), kv_heads).eval()) == 0


def test_the_compiled_model_has_no_permutation_and_the_same_results() -> None:
    model = make()
    train(model, "sinkhorn_ste")
    padst.finalize(model).eval()
    assert moved(model) == set(TARGETS)
    with torch.no_grad():
        explained = padst.explain(model, tokens()).permutations
        assert explained.total == explained.folded == len(TARGETS)
        compiled = torch.compile(model, backend=padst_backend)(tokens(99))
        torch.testing.assert_close(compiled, model(tokens(99)), rtol=1e-12, atol=1e-12)


def test_a_resumed_training_learns_the_same_together() -> None:
    whole = make()
    runtime = train(whole, "sinkhorn_ste", 6)
    state = copy.deepcopy((whole.state_dict(), runtime.state_dict()))
    other = make()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    resumed = padst.attach(other, optimizer, config("sinkhorn_ste", 6))
    other.load_state_dict(state[0])
    resumed.load_state_dict(state[1])
    for name, learner in runtime.learners.items():
        assert same_state(learner.state_dict(), resumed.learners[name].state_dict())
    assert {name for name, learner in runtime.learners.items() if learner.state_dict()} == {"1.proj", "1.q", "3.gate"}


def same_state(one: dict[str, Any], other: dict[str, Any]) -> bool:
    same = (
        torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
        for name, value in one.items()
    )
    return one.keys() == other.keys() and all(same)


def test_copies_and_pickles_keep_the_restriction() -> None:
    model = make()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        layers = dict(padst.sparse_layers(other))
        assert (
            layers["3.gate"].exchanges is layers["3.up"].exchanges is not dict(padst.sparse_layers(model))["3.gate"].exchanges
        )
        assert [places.shape for places in layers["1.proj"].exchanges.sets] == [(1, WIDTH // HEADS)] * HEADS
        train(other, "sinkhorn_ste", 4)
        assert torch.equal(layers["3.gate"].permutation, layers["3.up"].permutation)


def test_layers_that_cannot_follow_each_other_keep_their_permutation() -> None:
    frozen = make()
    dict(padst.sparse_layers(frozen))["3.up"].values.requires_grad_(False)
    assert train(frozen, "sinkhorn_ste", 4).learners.keys() == {"1.proj", "1.q"}
    unlike = {"3.up": spec("3.up", permutation="none"), "*": spec()}
    model = padst.sparsify(Block().double(), unlike, tokens())
    assert train(model, "sinkhorn_ste", 4).learners.keys() == {"1.proj", "1.q"}


def test_soft_matrices_are_refused_where_only_some_features_may_change_places() -> None:
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(AttachError, match=r"'1.proj' may exchange only some .* 'sinkhorn_ste' or 'regroup', or .*'any'"):
        padst.attach(model, optimizer, config("autoshuffle"))
    assert all(layer.soft is None for _, layer in padst.sparse_layers(model))
    one = make(spec("1.q"))  # any order is free there
    assert train(one, "autoshuffle", 4).learners.keys() == {"1.q"}


def test_where_nothing_folds_there_is_nothing_to_learn() -> None:
    model = make(spec("0"))  # reads the model's input
    with pytest.raises(AttachError, match="no layer in training has a permutation that it may learn: what folds for free"):
        padst.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), config("sinkhorn_ste"))


def test_kaleidoscopes_are_not_drawn_from_the_group() -> None:
    with pytest.raises(SpecError, match="'kaleidoscope' draws from a family of its own, not from the group 'foldable'"):
        spec(permutation="kaleidoscope")


@pytest.mark.parametrize("build", [Attention, lambda: Attention(2), FusedAttention])
def test_orders_of_all_sets_together_are_in_the_group(build: Callable[[], nn.Module]) -> None:
    chosen = padst.SparsitySpec(padst.Block(4), 0.5, targets=("proj",), ignore=())
    group = padst.foldable_permutations(build().double(), chosen, x(2, 5, WIDTH))["proj"]
    sets = group.group.exchanges()
    assert sorted(place for places in sets for place in places.flat) == list(range(WIDTH))
    order = torch.arange(WIDTH)
    for places in map(torch.from_numpy, sets):
        turned = torch.randperm(places.shape[1], generator=torch.Generator().manual_seed(1))
        order[places] = places[:, turned]
        if len(places) > 1:  # rows of a set must move alike
            one = torch.arange(WIDTH)
            one[places[0]] = places[0].roll(1)
            assert not group.contains(one)
    assert group.contains(order)
    assert not torch.equal(order, torch.arange(WIDTH))
