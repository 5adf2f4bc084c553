"""How the sparsity of a model is shared out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from padst_compile.distribution import erdos_renyi, uniform
from padst_compile.structures import Shape
from padst_compile.testing.strategies import shapes

MODELS = st.lists(shapes(largest=300), min_size=1, max_size=8)
SPARSITIES = st.floats(0.0, 0.999)


@given(MODELS, SPARSITIES)
def test_uniform_gives_every_layer_the_same(model: list[Shape], sparsity: float) -> None:
    assert uniform(model, sparsity) == [sparsity] * len(model)


@given(MODELS, SPARSITIES)
def test_erdos_renyi_keeps_the_total(model: list[Shape], sparsity: float) -> None:
    kept = sum((1 - s) * shape.numel for s, shape in zip(erdos_renyi(model, sparsity), model, strict=True))
    assert kept == pytest.approx((1 - sparsity) * sum(shape.numel for shape in model), rel=1e-9)


@given(MODELS, SPARSITIES)
def test_erdos_renyi_stays_between_empty_and_dense(model: list[Shape], sparsity: float) -> None:
    assert all(0.0 <= s < 1.0 for s in erdos_renyi(model, sparsity))


@given(MODELS, SPARSITIES)
def test_erdos_renyi_densities_are_proportional_to_fan_over_size_until_they_reach_one(
    model: list[Shape], sparsity: float
) -> None:
    raw = [(shape.in_features + shape.out_features) / shape.numel for shape in model]
    ratios = [(1 - s) / r for s, r in zip(erdos_renyi(model, sparsity), raw, strict=True)]
    factor = max(ratios)
    for s, r, ratio in zip(erdos_renyi(model, sparsity), raw, ratios, strict=True):
        assert ratio == pytest.approx(factor, rel=1e-9) or (s == 0.0 and r * factor >= 1.0 - 1e-9)


def test_erdos_renyi_leaves_a_small_layer_dense_and_takes_the_rest_from_the_large_one() -> None:
    small, large = Shape(2, 2), Shape(100, 100)
    dense, sparse = erdos_renyi([small, large], 0.9)
    assert dense == 0.0
    assert (1 - sparse) * large.numel == pytest.approx(0.1 * (4 + 10_000) - 4)


def test_erdos_renyi_treats_equal_layers_equally() -> None:
    assert erdos_renyi([Shape(64, 32)] * 3, 0.8) == pytest.approx([0.8] * 3)
