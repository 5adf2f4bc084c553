"""Published recipes: each trains a small model with the structure that it is for, updates as it says, and can be finished."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math

import pytest
import torch
from torch import nn

import padst_compile as padst
from padst_compile.errors import PadstError
from padst_compile.recipes.published import PRESETS, published
from padst_compile.testing.training import CLASSES, HIDDEN, WIDTH, layers_of, loss_at
from padst_compile.tolerance import allowed_error, relative_error
from padst_compile.training.presets import Recipe, structured_dynsparse_factor
from padst_compile.training.runtime import Runtime

STEPS = 240  # of which the updates of interval 100 take place at 100, and end at 180
SPARSITY = 0.75
RATE = 2e-3

RECIPES = {
    "pa_dst": padst.presets.pa_dst("block:4", SPARSITY, total_steps=STEPS),
    "srigl": padst.presets.srigl(1, 4, total_steps=STEPS),
    "dsb": padst.presets.dsb(4, SPARSITY, total_steps=STEPS),
    "structured_dynsparse": padst.presets.structured_dynsparse(4, SPARSITY, total_steps=STEPS),
    "dynadiag": padst.presets.dynadiag(SPARSITY, total_steps=STEPS),
}
UPDATES = {"pa_dst": 1, "srigl": 2, "dsb": 1, "structured_dynsparse": 80, "dynadiag": 0}  # N:M layers take turns


def trained(recipe: Recipe) -> tuple[nn.Sequential, Runtime, float, float]:
    """The small model after the recipe's training, and its mean loss over the first and the last steps."""
    torch.manual_seed(0)
    layers = (nn.Linear(WIDTH, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, WIDTH), nn.Tanh(), nn.Linear(WIDTH, CLASSES))
    model = padst.sparsify(nn.Sequential(*layers), dataclasses.replace(recipe.spec, targets=("0", "2")))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE * recipe.learning_rate_factor)
    runtime = padst.attach(model, optimizer, dataclasses.replace(recipe.config, check_invariants=True))
    losses = []
    for step in range(STEPS):
        loss = loss_at(model, step % 4)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model, runtime, sum(losses[:8]) / 8, sum(losses[-8:]) / 8


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_its_structure_to_the_end(name: str) -> None:
    recipe = RECIPES[name]
    model, runtime, first, last = trained(recipe)
    assert len(layers_of(model)) == 2 and all(layer.config.structure == recipe.spec.structure for layer in layers_of(model))
    assert last < first
    assert (runtime.updates, runtime.skipped) == (UPDATES[name], 0)
    metrics = runtime.metrics()
    if name == "srigl":
        assert metrics["density"] == pytest.approx((1 - metrics["ablated"] / (HIDDEN + WIDTH)) * (1 - SPARSITY), rel=0.2)
    else:
        assert metrics["density"] == 1 - SPARSITY and metrics["ablated"] == 0
    if UPDATES[name]:
        assert metrics["exploration"] > metrics["density"]
    assert metrics["hardened"] == (2 if name == "pa_dst" else 0)
    padst.finalize(model)
    permuted = name in ("pa_dst", "dsb")
    assert all((layer.permutation is not None) == permuted for layer in layers_of(model))
    dense = padst.densify(copy.deepcopy(model))
    x = torch.randn(6, WIDTH)
    with torch.no_grad():
        exact = dense.double()(x.double())
        own = relative_error([dense.float()(x)], [exact])
        assert relative_error([model(x)], [exact]) <= allowed_error(own, torch.float32)


def test_pa_dst_learns_the_smaller_side_of_any_structure() -> None:
    for structure in ("block:4", "nm:1:4", "diagonal", "unstructured"):
        recipe = padst.presets.pa_dst(structure, None if structure == "nm:1:4" else SPARSITY, total_steps=STEPS)
        assert (recipe.spec.permutation, recipe.spec.permutation_side) == ("learned", "smaller")
        assert recipe.config.permutation == padst.LearnedPermutation("autoshuffle") and recipe.learning_rate_factor == 1.0


def test_shuffles_of_dynamic_blocks_stay() -> None:
    model, runtime, *_ = trained(RECIPES["dsb"])
    assert all(row.from_start.moved == 0 for row in padst.permutation_report(runtime).layers)
    assert all(not torch.equal(layer.permutation.sort().values, layer.permutation) for layer in layers_of(model))  # type: ignore[union-attr]  # they have one


@pytest.mark.parametrize(("size", "updates"), [(1, 160), (8, 80)])
def test_structured_dynsparse_replaces_half_at_first_in_so_many_updates(size: int, updates: int) -> None:
    for total in (160, 1600, 12_345):
        config = padst.presets.structured_dynsparse(size, 0.9, total_steps=total).config
        assert (config.method, config.fraction, config.end) == ("set", 0.5, 1.0)
        assert updates <= total // config.interval <= 1.05 * updates
    assert padst.presets.structured_dynsparse(8, 0.9, total_steps=10).config.interval == 1


def test_the_learning_rate_follows_the_law_of_dynsparse() -> None:
    """Dietrich et al. 2021, section 4: `exp(1.969 s² + 0.2905 s)`."""
    assert structured_dynsparse_factor(0.0) == 1.0
    assert structured_dynsparse_factor(0.9) == pytest.approx(6.400, abs=5e-4)
    assert structured_dynsparse_factor(0.99) == pytest.approx(9.1835, abs=5e-4)
    factors = [structured_dynsparse_factor(sparsity / 10) for sparsity in range(10)]
    assert all(one < other for one, other in itertools.pairwise(factors))
    assert math.log(factors[5]) == pytest.approx(1.969 * 0.25 + 0.2905 * 0.5)
    for sparsity in (0.5, 0.9):
        recipe = padst.presets.structured_dynsparse(16, sparsity, total_steps=100)
        assert recipe.learning_rate_factor == structured_dynsparse_factor(sparsity)


# By name


@pytest.mark.parametrize(
    ("name", "structure", "sparsity", "expected"),
    [
        ("pa_dst", None, None, padst.presets.pa_dst("block:16", 0.9, total_steps=70, seed=3)),
        ("pa_dst", "nm:1:8", None, padst.presets.pa_dst("nm:1:8", total_steps=70, seed=3)),
        ("srigl", None, None, padst.presets.srigl(1, 10, total_steps=70, seed=3)),
        ("srigl", "nm:2:8", None, padst.presets.srigl(2, 8, total_steps=70, seed=3)),
        ("dsb", "block:8", 0.8, padst.presets.dsb(8, 0.8, total_steps=70, seed=3)),
        ("structured_dynsparse", None, 0.8, padst.presets.structured_dynsparse(16, 0.8, total_steps=70, seed=3)),
        ("dynadiag", "diagonal", None, padst.presets.dynadiag(0.9, total_steps=70, seed=3)),
    ],
)
def test_recipes_have_names(name: str, structure: str | None, sparsity: float | None, expected: Recipe) -> None:
    assert published(name, structure, sparsity, steps=70, seed=3) == expected


def test_every_recipe_has_a_name() -> None:
    made = [
        name for name, value in vars(padst.presets).items() if getattr(value, "__annotations__", {}).get("return") == "Recipe"
    ]
    assert sorted(PRESETS) == sorted(made) == sorted(RECIPES)


@pytest.mark.parametrize(
    ("name", "structure", "sparsity", "message"),
    [
        ("pa-dst", None, None, "did you mean 'pa_dst'"),
        ("srigl", "block:4", None, "is for nm:N:M"),
        ("srigl", "nm:1:4:8", None, "is for nm:N:M"),
        ("srigl", None, 0.9, "nm:1:10 at sparsity 0.9"),
        ("dsb", "block:8x4", None, "is for square blocks"),
        ("structured_dynsparse", "diagonal", None, "is for square blocks"),
        ("dynadiag", "diagonal:4", None, "is for diagonals"),
        ("dsb", "blok:4", None, "did you mean 'block'"),
    ],
)
def test_recipes_for_other_structures_are_refused(
    name: str, structure: str | None, sparsity: float | None, message: str
) -> None:
    with pytest.raises(PadstError, match=message):
        published(name, structure, sparsity, steps=70, seed=0)
