"""Growth by gradients of some output rows alone (`DSTConfig.gradient_rows`, Grass)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import padst_compile as padst
from padst_compile import permutation
from padst_compile.kernels import gradient_tap
from padst_compile.structures import Structure
from padst_compile.testing.training import STRUCTURES, layers_of, loss_at, small_model
from padst_compile.training.collector import DenseGradient
from padst_compile.training.config import UnitScore
from padst_compile.training.schedule import fraction_at
from padst_compile.training.selection import exchange


class Keep:
    """A reducer that keeps a gradient."""

    def __init__(self) -> None:
        self.parts: list[torch.Tensor] = []

    def add(self, part: torch.Tensor, begin: int) -> None:
        assert begin == sum(map(len, self.parts))
        self.parts.append(part.clone())

    def end(self) -> None:
        """Has all of it."""

    def clear(self) -> None:
        self.parts = []

    def to(self, device: torch.device) -> None:
        """Stays."""


def magnitudes_of_gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    """Of the sparse layers, whole, on the first batch; of a copy of the model."""
    twin = copy.deepcopy(model)
    kept = [Keep() for _ in layers_of(twin)]
    listeners = [DenseGradient((keep,)) for keep in kept]
    for layer, listener in zip(layers_of(twin), listeners, strict=True):
        gradient_tap.listen(layer.topology[0], listener)
    loss_at(twin, 0).backward()
    return [torch.cat(keep.parts) for keep in kept]


def norms(structure: Structure, dense: torch.Tensor, score: UnitScore) -> torch.Tensor:
    """Of units, -inf outside."""
    totals = structure.unit_totals(dense.abs() if score == "l1" else dense.square())
    return totals if score == "l1" else totals.clamp_min(0).sqrt().where(totals >= 0, -torch.inf)


@pytest.mark.parametrize("score", ["l1", "l2"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_units_are_exchanged_by_what_a_sample_of_rows_tells(structure: str, score: UnitScore) -> None:
    """Estimates are scaled to all rows of a unit, and a unit with none in the sample stays as it is."""
    model = small_model(structure)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    config = padst.DSTConfig(
        interval=1, fraction=0.8, total_steps=20, score=score, gradient_rows=0.1, staggered=False, check_invariants=True
    )
    runtime = padst.attach(model, optimizer, config)
    before = [trained.active() for trained in runtime.layers]
    weights = [layer.dense_weight().detach().float() for layer in layers_of(model)]
    gradients = magnitudes_of_gradients(model)
    loss_at(model, 0).backward()
    optimizer.step()
    for trained, active, weight, gradient in zip(runtime.layers, before, weights, gradients, strict=True):
        family, total = trained.structure, trained.shape.out_features
        rows = torch.randperm(total, generator=trained.generator(config.seed, 1, "rows"))[: max(1, round(0.1 * total))]
        sampled = torch.zeros_like(gradient)
        sampled[rows] = 1.0
        sizes, seen = (family.unit_totals(each) for each in (torch.ones_like(gradient), sampled))
        known = seen > 0
        scale = sizes / seen if score == "l1" else (sizes / seen).sqrt()
        grow = (norms(family, gradient * sampled, score) * scale).where(known, -torch.inf)
        count = round(fraction_at(1, config) * int((active & known).sum()))
        after = trained.active()
        assert torch.equal(after, exchange(active, norms(family, weight, score), grow, count))
        assert torch.equal(after[~known], active[~known])
    assert sum(update.dropped for update in runtime.last_update) > 0


@pytest.mark.parametrize("learned", ["sinkhorn_ste", "regroup"])
def test_permutations_are_learned_from_all_rows(learned: padst.training.config.PermutationMethod) -> None:
    permutations = []
    for part in (1.0, 0.1):
        model = small_model("block:4", permutation="learned")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        learning = padst.LearnedPermutation(learned, interval=1, fraction=0.5, gain=0.0, learning_rate=10.0, deadline=1.0)
        config = padst.DSTConfig(interval=1, start=8, total_steps=16, gradient_rows=part, permutation=learning)
        padst.attach(model, optimizer, config)
        for step in range(7):
            loss_at(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
        permutations.append([layer.permutation for layer in layers_of(model)])
    assert all(map(torch.equal, *permutations))  # type: ignore[arg-type]  # tensors
    assert not all(permutation.is_identity(found) for found in permutations[0]), "nothing was learned"  # type: ignore[arg-type]  # tensors


class Largest(TorchDispatchMode):
    """Watches how many numbers the largest tensor has that comes into being."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numbers = max(self.numbers, result.numel())
        return result


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_only_sampled_rows_take_memory(structure: str, dense: bool) -> None:
    """While gradients arrive, as operands or, from a layer that runs dense, as they are; and until the update."""
    model = small_model(structure)
    config = padst.DSTConfig(interval=1, total_steps=9, gradient_rows=0.25, staggered=False)
    padst.attach(model, torch.optim.SGD(model.parameters()), config)
    for layer in layers_of(model):
        listener = gradient_tap.listener_of(layer.topology)
        assert isinstance(listener, DenseGradient)
        grad, x = torch.randn(4, layer.out_features), torch.randn(4, layer.in_features)
        whole = grad.T @ x
        with Largest() as largest:
            if dense:
                listener.weight(whole)
            else:
                listener.products(grad, x)
        assert listener.sampled is not None and listener.sampled.total is not None
        assert max(largest.numbers, listener.sampled.total.numel()) <= layer.config.shape.numel // 4
