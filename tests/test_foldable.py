"""Which permutations a model folds for nothing, and that those are just the ones that leave no index table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import padst_compile as padst
from padst_compile.errors import MissingInputsError
from padst_compile.passes.pipeline import Pipeline
from padst_compile.testing.capture import capture
from padst_compile.testing.small_models import (
    HEADS,
    HIDDEN,
    MLP,
    WIDTH,
    Attention,
    FusedAttention,
    Gated,
    Mixer,
    Stream,
    ids,
    tables,
    whole_heads,
    within_heads,
    x,
)

BLOCK = padst.Block(4)


def spec(*targets: str, **fields: Any) -> padst.SparsitySpec:
    structure = fields.pop("structure", BLOCK)
    return padst.SparsitySpec(structure, 0.5, targets=targets, ignore=(), **fields)


def tokens() -> torch.Tensor:
    return x(2, 5, WIDTH)


KINDS: dict[str, tuple[Callable[[], nn.Module], padst.SparsitySpec, Callable[[], torch.Tensor], str, str, str]] = {
    "hidden": (MLP, spec("fc2"), tokens, "fc2", "any", "any order"),
    "input": (MLP, spec("fc1"), tokens, "fc1", "identity", "it is an input of the graph"),
    "sparse producer": (MLP, spec("fc1", "fc2"), tokens, "fc2", "identity", "fc1 would need an index table"),
    "diagonal": (MLP, spec("fc1", "fc2", structure=padst.Diagonal()), tokens, "fc1", "any", "reads through an index table"),
    "attention": (Attention, spec("proj"), tokens, "proj", "whole heads and within heads", "divides the features"),
    "fused attention": (FusedAttention, spec("proj"), tokens, "proj", "whole heads and within heads", "divides the features"),
    "grouped": (lambda: Attention(2), spec("proj"), tokens, "proj", "whole heads and within heads", "divides the features"),
    "sparse values": (Attention, spec("proj", "v"), tokens, "proj", "identity", "v would need an index table"),
    "sparse queries": (Attention, spec("proj", "q"), tokens, "proj", "within heads", "q would need an index table"),
    "output": (MLP, spec("fc1", permutation_side="output"), tokens, "fc1", "any", "any order"),
    "stream": (Stream, spec("blocks.0.fc1"), ids, "blocks.0.fc1", "any", "any order"),
    "mixer tokens": (Mixer, spec("tokens2"), lambda: x(2, 8, WIDTH), "tokens2", "any", "any order"),
}


@pytest.mark.parametrize("case", KINDS)
def test_the_group_of(case: str) -> None:
    build, chosen, inputs, name, kind, reason = KINDS[case]
    group = padst.foldable_permutations(build().double(), chosen, inputs())[name]
    assert group.kind == kind
    assert reason in group.reason
    assert kind in str(group)


@pytest.mark.parametrize("case", [case for case, row in KINDS.items() if row[4] != "identity" and case != "diagonal"])
@pytest.mark.parametrize("seed", range(2))
def test_a_permutation_of_the_group_leaves_no_table(case: str, seed: int) -> None:
    build, chosen, inputs, name, _, _ = KINDS[case]
    group = padst.foldable_permutations(build().double(), chosen, inputs())[name]
    drawn = group.random(torch.Generator().manual_seed(seed))
    assert group.contains(drawn)
    others = {
        layer: torch.arange(len(permutation))
        for layer, permutation in random_permutations(build, chosen).items()
        if layer != name
    }
    model = padst.sparsify(build().double(), random(chosen), permutations={**others, name: drawn}).eval()
    with torch.no_grad():
        facts = capture(model, inputs()).context(inference=True)
        Pipeline(kernels=None).run(facts)
    assert tables(facts) == 0


def random(chosen: padst.SparsitySpec) -> padst.SparsitySpec:
    return padst.SparsitySpec.from_dict({**chosen.to_dict(), "permutation": "random"})


def random_permutations(build: Callable[[], nn.Module], chosen: padst.SparsitySpec) -> dict[str, torch.Tensor]:
    model = padst.sparsify(build().double(), random(chosen))
    return {name: layer.permutation for name, layer in padst.sparse_layers(model) if layer.permutation is not None}


def test_membership() -> None:
    group = padst.foldable_permutations(Attention().double(), spec("proj"), tokens())["proj"]
    assert group.contains(torch.tensor(within_heads()))
    assert group.contains(torch.tensor(whole_heads(2, 0, 1, 3)[within_heads()]))
    assert not group.contains(torch.arange(WIDTH).roll(1))
    size = WIDTH // HEADS
    swapped = np.arange(WIDTH)
    swapped[[0, size]] = swapped[[size, 0]]
    assert not group.contains(torch.tensor(swapped))


def test_grouped_heads_read_the_same_values() -> None:
    group = padst.foldable_permutations(Attention(2).double(), spec("proj"), tokens())["proj"]
    assert group.contains(torch.tensor(whole_heads(3, 2, 0, 1)))
    assert not group.contains(torch.tensor(whole_heads(0, 2, 1, 3)))
    assert not group.contains(torch.tensor(within_heads()))


def test_siblings_share_their_permutation() -> None:
    model = nn.Sequential(nn.Linear(6, WIDTH), Gated()).double()
    groups = padst.foldable_permutations(model, spec("1.gate", "1.up"), x(2, 6))
    assert groups["1.gate"].kind == "any"
    assert groups["1.gate"].shared_with == ("1.up",)
    assert "shared with 1.up" in str(groups["1.gate"])


@pytest.mark.parametrize("build", [
    lambda: nn.Sequential(nn.Linear(6, WIDTH), Gated()), lambda: nn.Sequential(nn.Linear(6, WIDTH), MLP(), nn.Linear(WIDTH, 3)),
    lambda: nn.Sequential(nn.Linear(6, WIDTH), nn.Unflatten(0, (2, 5)), FusedAttention()),
])  # fmt: skip
def test_sparsify_draws_from_the_group(build: Callable[[], nn.Module]) -> None:
    model, inputs = build().double().eval(), x(10, 6)
    chosen = spec("1.gate", "1.up", "1.fc1", "2.proj", permutation="random", permutation_group="foldable")
    chosen = padst.SparsitySpec.from_dict({**chosen.to_dict(), "targets": ["re:.*(gate|up|fc1|proj)"]})
    padst.sparsify(model, chosen, inputs)
    moved = [not torch.equal(layer.permutation, torch.arange(layer.permutation.numel()))  # type: ignore[union-attr]
             for _, layer in padst.sparse_layers(model)]  # fmt: skip
    assert moved
    assert all(moved)
    with torch.no_grad():
        facts = capture(model, inputs).context(inference=True)
        Pipeline(kernels=None).run(facts)
    assert tables(facts) == 0


def test_a_foldable_specification_needs_inputs_and_leaves_the_model_untouched() -> None:
    model = MLP()
    before = [type(module) for module in model.modules()]
    with pytest.raises(MissingInputsError, match=r"sparsify\(model, spec, \*example_inputs\)"):
        padst.sparsify(model, spec("fc2", permutation="random", permutation_group="foldable"))
    with pytest.raises(MissingInputsError, match="example inputs"):
        padst.foldable_permutations(model, spec("fc2"))
    assert [type(module) for module in model.modules()] == before


def test_a_layer_that_is_called_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.relu(self.a(self.b(torch.relu(self.a(x))))))

    group = padst.foldable_permutations(Twice().double(), spec("b"), x(3, HIDDEN))["b"]
    assert (group.kind, group.reason) == ("identity", "the layer is called several times")


def test_the_model_is_left_as_it_is() -> None:
    model = MLP().double().train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    padst.foldable_permutations(model, spec("fc*"), tokens())
    assert model.training
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
