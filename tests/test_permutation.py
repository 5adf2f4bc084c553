"""The permutation algebra: its laws, and what `check` refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from padst_compile import permutation
from padst_compile.errors import InvalidPermutationError
from padst_compile.kernels.permute import permute
from padst_compile.testing.strategies import permutations

SIZES = st.integers(1, 20)


def several(count: int) -> st.SearchStrategy[tuple[torch.Tensor, ...]]:
    """`count` permutations of the same features."""
    return SIZES.flatmap(lambda size: st.tuples(*[permutations(size)] * count))


@given(several(2))
def test_compose_applies_the_first_then_the_second(pair: tuple[torch.Tensor, ...]) -> None:
    first, second = pair
    x = torch.arange(3 * first.numel()).reshape(3, -1)
    assert torch.equal(permute(permute(x, first), second), permute(x, permutation.compose(first, second)))


@given(several(3))
def test_composition_is_associative(three: tuple[torch.Tensor, ...]) -> None:
    a, b, c = three
    left = permutation.compose(permutation.compose(a, b), c)
    assert torch.equal(left, permutation.compose(a, permutation.compose(b, c)))


@given(several(1))
def test_the_identity_changes_nothing_on_either_side(one: tuple[torch.Tensor, ...]) -> None:
    (p,) = one
    neutral = permutation.identity(p.numel())
    assert torch.equal(permutation.compose(p, neutral), p)
    assert torch.equal(permutation.compose(neutral, p), p)


@given(several(1))
def test_a_permutation_and_its_inverse_cancel_in_either_order(one: tuple[torch.Tensor, ...]) -> None:
    (p,) = one
    assert permutation.is_identity(permutation.compose(p, permutation.inverse(p)))
    assert permutation.is_identity(permutation.compose(permutation.inverse(p), p))
    assert torch.equal(permutation.inverse(permutation.inverse(p)), p)


@given(several(2))
def test_the_inverse_of_a_composition_undoes_the_last_one_first(pair: tuple[torch.Tensor, ...]) -> None:
    p, q = pair
    undone = permutation.compose(permutation.inverse(q), permutation.inverse(p))
    assert torch.equal(permutation.inverse(permutation.compose(p, q)), undone)


@given(several(1))
def test_applying_a_permutation_multiplies_by_its_matrix(one: tuple[torch.Tensor, ...]) -> None:
    (p,) = one
    size = p.numel()
    matrix = torch.zeros(size, size, dtype=torch.float64)
    matrix[torch.arange(size), p.long()] = 1.0  # Π[i, p[i]] = 1
    x = torch.randn(4, size, dtype=torch.float64)
    assert torch.equal(permute(x, p), x @ matrix.T)


@given(several(1))
def test_only_the_identity_is_the_identity(one: tuple[torch.Tensor, ...]) -> None:
    (p,) = one
    assert permutation.is_identity(p) == (p.tolist() == list(range(p.numel())))


@given(several(1), st.sampled_from((torch.int64, torch.int32, torch.int16, torch.uint8)))
def test_check_accepts_every_integer_type_and_returns_int32(one: tuple[torch.Tensor, ...], dtype: torch.dtype) -> None:
    (p,) = one
    checked = permutation.check(p.to(dtype), p.numel(), "fc")
    assert checked.dtype == torch.int32
    assert torch.equal(checked, p)


def test_the_algebra_keeps_the_index_type() -> None:
    for dtype in (torch.int32, torch.int64):
        p = torch.tensor([2, 0, 1], dtype=dtype)
        assert permutation.inverse(p).dtype == dtype
        assert permutation.compose(p, p).dtype == dtype
        assert permutation.is_identity(torch.arange(3, dtype=dtype))


def test_a_random_permutation_is_reproducible_from_its_generator() -> None:
    first, again, other = (permutation.random(64, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(permutation.check(first, 64, "fc"), first)


def test_a_random_permutation_ignores_the_default_device() -> None:
    with torch.device("meta"):
        assert permutation.random(8, torch.Generator("cpu").manual_seed(0)).device.type == "cpu"


@given(SIZES.filter(lambda size: size > 1).flatmap(permutations), st.data())
def test_check_refuses_a_feature_that_occurs_twice(p: torch.Tensor, data: st.DataObject) -> None:
    i, j = data.draw(st.permutations(range(p.numel())))[:2]
    p[i] = p[j]
    with pytest.raises(InvalidPermutationError, match=f"fc: every feature 0 … {p.numel() - 1} must occur exactly once"):
        permutation.check(p, p.numel(), "fc")


@pytest.mark.parametrize("wrong", [-1, 3, 2**31 - 1, -(2**31)])
def test_check_refuses_an_index_out_of_range(wrong: int) -> None:
    with pytest.raises(InvalidPermutationError, match="every feature 0 … 2 must occur exactly once"):
        permutation.check(torch.tensor([0, 1, wrong]), 3, "fc")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bool, torch.complex64], ids=str)
def test_check_refuses_what_is_no_integer_and_names_the_conversion(dtype: torch.dtype) -> None:
    with pytest.raises(InvalidPermutationError, match=rf"fc: .* not {dtype}; pass indices\.long\(\)"):
        permutation.check(torch.tensor([0, 1]).to(dtype), 2, "fc")


@pytest.mark.parametrize("shape", [(2,), (4,), (3, 1), (1, 3), ()], ids=str)
def test_check_refuses_a_wrong_shape_and_names_the_right_one(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidPermutationError, match=r"fc: a permutation of 3 features has shape \[3\], not \["):
        permutation.check(torch.zeros(shape, dtype=torch.int64), 3, "fc")


def test_identity_and_random_are_int32_on_the_device_that_is_asked_for() -> None:
    assert permutation.identity(3).dtype == permutation.random(3, torch.Generator()).dtype == torch.int32
    assert permutation.identity(3, device="meta").device.type == "meta"
