"""What an update takes in memory beyond any other step: at most one layer's dense gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import padst_compile as padst
from padst_compile.benchmarking.memory import peak_bytes

COARSE = ("block:16", "nm:1:16:8", "diagonal")  # a unit has many weights
FINE = ("nm:1:8", "unstructured")  # scores are as large as gradients
PERMUTATIONS = (("none", "input"), ("random", "input"), ("random", "output"))
WIDTH, HIDDEN, INTERVAL = 128, 256, 4
DENSE = 4 * WIDTH * HIDDEN


class Training:
    """Two layers that are updated every fourth step; those with fine units one two steps after the other."""

    def __init__(
        self,
        structure: str,
        permutation: tuple[str, str] = PERMUTATIONS[0],
        tokens: int = 64,
        learned: padst.LearnedPermutation | None = None,
        **settings: Any,
    ) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH))
        order, side = permutation
        sparsity = None if structure.startswith("nm") else 0.9
        spec = {"permutation": order, "permutation_side": side}
        self.model = padst.sparsify(model, padst.SparsitySpec(structure, sparsity=sparsity, **spec))  # type: ignore[arg-type]  # literals
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        config = padst.DSTConfig(interval=INTERVAL, total_steps=10**6, permutation=learned, **settings)
        self.runtime = padst.attach(self.model, self.optimizer, config)
        self.x = torch.randn(tokens, WIDTH)
        for _ in range(INTERVAL):  # what is made once is there then, such as moments
            self.backward()
            self.update()

    def backward(self) -> None:
        self.model(self.x).square().mean().backward()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def both(self) -> None:
        self.backward()
        self.update()

    def extra(self, call: Callable[[], None], rest: Callable[[], None] = lambda: None) -> int:
        """By how much `call` takes more memory at some step of an interval than at the quiet ones, at least two of four."""
        updates, peaks = self.runtime.updates, []
        for _ in range(INTERVAL):
            peaks.append(peak_bytes(call))
            rest()
        assert self.runtime.updates > updates
        return max(peaks) - sorted(peaks)[1]


@pytest.mark.parametrize("permutation", PERMUTATIONS, ids="-".join)
@pytest.mark.parametrize("structure", [*COARSE, *FINE])
def test_while_gradients_arrive_fine_scores_take_no_more_than_one_and_others_less(
    structure: str, permutation: tuple[str, str]
) -> None:
    """Activations are still there at that time, so this is what limits the size of a model."""
    training = Training(structure, permutation)
    extra = training.extra(training.backward, training.update)
    assert extra <= DENSE if structure in FINE else extra < DENSE // 2


@pytest.mark.parametrize(
    "settings",
    [{}, {"method": "set"}, {"method": "mest"}, {"score": "l2"}, {"gradient_rows": 0.25}],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
@pytest.mark.parametrize("structure", COARSE)
def test_whole_steps_with_coarse_units_take_less_than_a_dense_gradient(structure: str, settings: dict[str, Any]) -> None:
    """However few the tokens are."""
    training = Training(structure, **settings)
    assert training.extra(training.both) < DENSE


def test_pruning_takes_less_than_a_dense_gradient() -> None:
    training = Training("block:16", method="magnitude", final_sparsity=0.95)
    assert training.extra(training.both) < DENSE


@pytest.mark.parametrize("settings", [{}, {"method": "set"}, {"gradient_rows": 0.25}], ids=["rigl", "set", "sampled"])
@pytest.mark.parametrize("structure", FINE)
def test_whole_steps_with_fine_units_hide_behind_the_activations_of_some_tokens(
    structure: str, settings: dict[str, Any]
) -> None:
    """Of eight for each feature, fewer than a small batch of a vision transformer has."""
    training = Training(structure, tokens=8 * WIDTH, **settings)
    assert training.extra(training.both) <= DENSE


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("learned", ["sinkhorn_ste", "regroup"])
@pytest.mark.parametrize("structure", ["block:16", "nm:1:8"])
def test_nor_does_learning_a_permutation_take_more(structure: str, learned: Any, side: str) -> None:
    """It happens halfway between updates, from dense gradients, too."""
    training = Training(structure, ("learned", side), tokens=8 * WIDTH, learned=padst.LearnedPermutation(learned))
    assert training.extra(training.both) <= DENSE
