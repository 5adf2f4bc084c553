"""The cost of a permutation by where it is put: orders that hold for every number of tokens."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, get_args

import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

from padst_compile.passes.costs import TOKENS, CostModel, Kind, always_cheaper, at, cheaper

RESULT = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "cpu-permute-costs.json"
KINDS = get_args(Kind)
MODELS = st.builds(CostModel, element_bytes=st.sampled_from([2, 4, 8]), device=st.sampled_from(["cpu", "cuda"]))
FEATURES = st.integers(1, 8192)


def never_dearer(a: Any, b: Any) -> bool:
    return always_cheaper(b, a) is False


@given(MODELS, st.sampled_from(KINDS), FEATURES)
def test_a_fold_costs_no_more_than_a_kernel_and_a_kernel_no_more_than_an_op(model: CostModel, kind: Kind, n: int) -> None:
    for in_kernel in (model.load(n, kind), model.store(n, kind)):
        assert never_dearer(model.fold(n), in_kernel)
        assert never_dearer(in_kernel, model.separate(n))


@given(MODELS)
def test_doing_nothing_beats_a_fold_and_a_fold_any_op(model: CostModel) -> None:
    nothing = sympy.Integer(0)
    assert always_cheaper(nothing, model.fold(768)) is True
    assert always_cheaper(model.fold(768), model.separate(1)) is True


@pytest.mark.parametrize("kind", KINDS)
def test_outside_the_cpu_only_a_fold_saves_the_op(kind: Kind) -> None:
    model = CostModel(device="cuda")
    expected = model.fold(64) if kind in ("dense", "unstructured") else model.separate(64)
    assert model.load(64, kind) == model.store(64, kind) == expected


def test_kernels_that_read_through_an_index_gather_for_the_price_of_the_table() -> None:
    model = CostModel()
    assert model.load(768, "nm") == model.store(768, "diagonal") == 4 * 768
    assert always_cheaper(model.load(768, "nm"), model.load(768, "block")) is True


def test_costs_read_as_formulas() -> None:
    model = CostModel(kernel_gather=3, separate_gather=6, dispatch=1000)
    assert str(model.fold(768)) == "1"
    assert str(model.load(768, "block")) == "2304*T + 3072"
    assert str(model.separate(768)) == "10752*T + 4072"
    assert str(dataclasses.replace(model, tokens=4 * TOKENS).load(10, "block")) == "120*T + 40"
    assert str(dataclasses.replace(model, tokens=7).separate(10)) == "2020"


@given(MODELS, st.sampled_from(KINDS), FEATURES, st.integers(1, 10_000))
def test_more_features_or_tokens_never_cost_less(model: CostModel, kind: Kind, n: int, tokens: int) -> None:
    for place in (model.fold, model.separate, lambda n: model.load(n, kind), lambda n: model.store(n, kind)):
        assert never_dearer(place(n), place(n + 1))
        assert at(place(n), tokens) <= at(place(n), tokens + 1)


def test_larger_elements_cost_more_only_in_an_op_of_its_own() -> None:
    half, single = CostModel(element_bytes=2), CostModel(element_bytes=4)
    assert half.load(768, "block") == single.load(768, "block")
    assert always_cheaper(half.separate(768), single.separate(768)) is True


def test_a_fixed_number_of_tokens_is_that_value_of_the_formula() -> None:
    assert at(CostModel(tokens=197).separate(768), 1) == at(CostModel().separate(768), 197)
    assert at(CostModel(tokens=TOKENS / 4, kernel_gather=3).load(1, "block"), 2) == 6  # 5.5, rounded up


def test_one_sign_for_all_tokens_decides_whatever_the_hint() -> None:
    assert cheaper(3 * TOKENS, 3 * TOKENS + 1, hint=1)
    assert cheaper(2 * TOKENS - 1, 2 * TOKENS**2, hint=5)
    assert not cheaper(TOKENS, TOKENS, hint=1)


def test_the_hint_decides_where_the_number_of_tokens_does() -> None:
    gathers, one_op = 100 * TOKENS, TOKENS + 5000
    assert always_cheaper(gathers, one_op) is None
    assert cheaper(gathers, one_op, hint=50)
    assert not cheaper(gathers, one_op, hint=51)


@given(st.integers(-9, 9), st.integers(-9, 9), st.integers(1, 100))
def test_a_decision_for_all_tokens_holds_for_each(slope: int, offset: int, tokens: int) -> None:
    difference = slope * TOKENS + offset
    decided = always_cheaper(difference, sympy.Integer(0))
    assert decided in (None, at(difference, tokens) < 0)


def test_the_coefficients_are_those_recorded() -> None:
    recorded = json.loads(RESULT.read_text())["coefficients"]
    assert {name: getattr(CostModel(), name) for name in recorded} == recorded
