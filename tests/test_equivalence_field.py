"""Arithmetic modulo the prime: against Python's integers and fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from padst_compile.equivalence import field, oracles, products
from padst_compile.equivalence.field import PRIME, from_floats, from_number, inverse, multiply, power

RESIDUES = st.integers(0, PRIME - 1)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
SMALL = st.floats(-1e3, 1e3, width=32)


def residue(fraction: Fraction) -> int:
    """The residue of a fraction, by Python's integers."""
    return fraction.numerator * pow(fraction.denominator, -1, PRIME) % PRIME


def some(*shape: int, seed: int = 0) -> torch.Tensor:
    return oracles.random_residues(math.prod(shape), seed, "test").reshape(shape)


# --- arithmetic ---


@given(RESIDUES, RESIDUES)
def test_products_are_those_of_python(x: int, y: int) -> None:
    assert int(multiply(torch.tensor(x), torch.tensor(y))) == x * y % PRIME


@given(RESIDUES, st.integers(-20, 40))
def test_powers_are_those_of_python(x: int, exponent: int) -> None:
    assume(x != 0)
    assert int(power(torch.tensor(x), exponent)) == pow(x, exponent, PRIME)


@given(st.integers(1, PRIME - 1))
def test_a_number_times_its_inverse_is_one(x: int) -> None:
    assert int(multiply(torch.tensor(x), inverse(torch.tensor(x)))) == 1


def test_the_inverse_of_zero_does_not_hide_what_it_meets() -> None:
    assert int(inverse(torch.tensor(0))) == field.INVERSE_OF_ZERO


# --- floating-point numbers ---


@given(FLOATS)
def test_a_float_is_the_fraction_that_it_stores(value: float) -> None:
    assume(value > torch.finfo(torch.float64).min)
    assert int(from_floats(torch.tensor(value, dtype=torch.float64))) == residue(Fraction(value))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_dtype_is_mapped_by_the_numbers_that_it_holds(dtype: torch.dtype) -> None:
    values = torch.randn(500, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert from_floats(values).tolist() == [residue(Fraction(value)) for value in values.tolist()]


@given(SMALL, SMALL)
def test_exact_sums_and_products_of_floats_stay_exact(x: float, y: float) -> None:
    one, other = (from_floats(torch.tensor(value, dtype=torch.float64)) for value in (x, y))
    assert int(from_floats(torch.tensor(x * y, dtype=torch.float64))) == int(multiply(one, other))
    if Fraction(x) + Fraction(y) == Fraction(x + y):
        assert int(from_floats(torch.tensor(x + y, dtype=torch.float64))) == int((one + other) % PRIME)


def test_what_is_no_number_has_a_residue_of_its_own() -> None:
    values = from_floats(torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0]))
    assert values.tolist() == [field.INFINITY, field.MINUS_INFINITY, field.NOT_A_NUMBER, 0, 0]
    assert [from_number(value, torch.float32) for value in (math.inf, -math.inf, math.nan)] == values[:3].tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_lowest_number_masks_like_minus_infinity(dtype: torch.dtype) -> None:
    lowest = torch.finfo(dtype).min
    assert from_number(lowest, dtype) == int(from_floats(torch.tensor(lowest, dtype=dtype))) == field.MINUS_INFINITY
    assert from_number(lowest / 2, dtype) != field.MINUS_INFINITY


@given(st.integers(-(2**62), 2**62))
def test_integers_wrap(value: int) -> None:
    assert int(from_floats(torch.tensor(value))) == value % PRIME
    assert from_number(value, torch.float32) == value % PRIME


def test_a_number_of_the_program_is_rounded_as_the_operation_rounds_it() -> None:
    stored = from_floats(torch.tensor(0.044715, dtype=torch.float32))
    assert from_number(0.044715, torch.float32) == from_number(0.044715, torch.bfloat16) == int(stored)
    assert from_number(0.044715, torch.float64) == residue(Fraction(0.044715))


@pytest.mark.parametrize("size", [2, 3, 5, 12, 48, 80, 96, 128, 4095])
def test_dividing_by_a_root_is_multiplying_by_its_inverse(size: int) -> None:
    for dtype in (torch.float32, torch.float64):
        assert from_number(math.sqrt(size), dtype) * from_number(size**-0.5, dtype) % PRIME == 1
        assert from_number(-math.sqrt(size), dtype) == PRIME - from_number(math.sqrt(size), dtype)


@pytest.mark.parametrize("size", [2, 5, 8, 48, 96, 128])
def test_two_fourth_roots_are_a_square_root(size: int) -> None:
    for sign in (1, -1):
        assert from_number(size ** (sign / 4), torch.float32) ** 2 % PRIME == from_number(size ** (sign / 2), torch.float32)


def test_the_square_of_the_root_of_two_is_two() -> None:
    assert from_number(math.sqrt(2), torch.float64) ** 2 % PRIME == 2


def test_near_misses_of_a_root_are_dyadic() -> None:
    for value in (math.sqrt(48) * (1 + 1e-5), 0.1, 0.25, 3.0, 1.0, 1e-8):
        assert from_number(value, torch.float64) == residue(Fraction(value))


def test_the_constant_of_gelu_is_known_however_it_is_rounded() -> None:
    constants = {from_number(value, torch.float32) for value in (math.sqrt(2 / math.pi), 0.7978845608, 0.79788456)}
    assert len(constants) == 1


# --- products ---


@pytest.mark.parametrize("terms", [1, 2, 64, 127, 128, 129, 768, 3000, 9000])
@pytest.mark.parametrize("rows", [1, 40])
def test_matrix_products_are_exact(terms: int, rows: int) -> None:
    x, y = some(rows, terms), some(terms, 3, seed=1)
    expected = [
        [sum(a * b for a, b in zip(row, column, strict=True)) % PRIME for column in y.T.tolist()] for row in x.tolist()[:2]
    ]
    assert products.matmul(x, y)[:2].tolist() == expected


def test_matrix_products_of_the_largest_residues_are_exact() -> None:
    for terms in (128, 129, 1024, 5000):
        full = torch.full((2, terms), PRIME - 1)
        assert products.matmul(full, full.T).tolist() == [[terms % PRIME] * 2] * 2


@pytest.mark.parametrize(("left", "right"), [((2, 3, 4), (2, 4, 5)), ((7, 1, 3, 4), (2, 4, 5)), ((4,), (4,)), ((3, 4), (4,))])
def test_shapes_are_those_of_torch(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    x, y = some(*left) % 1000, some(*right, seed=1) % 1000
    assert torch.equal(products.matmul(x, y), torch.matmul(x, y) % PRIME)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(("stride", "padding", "dilation", "groups"), [(1, 0, 1, 1), (2, 1, 1, 2), (1, 2, 2, 4), (3, 0, 1, 1)])
def test_convolutions_are_those_of_torch(dims: int, stride: int, padding: int, dilation: int, groups: int) -> None:
    image, weight = some(2, 4, *[9] * dims) % 100, some(8, 4 // groups, *[3] * dims, seed=1) % 100
    convolution = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}[dims]
    expected = convolution(image.double(), weight.double(), None, stride, padding, dilation, groups).long()
    found = products.convolution(image, weight, [stride], [padding], [dilation], groups)
    assert torch.equal(found, expected)


# --- oracles ---


def test_an_oracle_depends_on_seed_name_and_argument() -> None:
    x = torch.arange(10_000)
    answers = [oracles.plain(oracles.key(seed, name), x) for seed in (0, 1) for name in ("exp", "erf")]
    assert torch.cat(answers).unique().numel() > 39_990
    assert torch.equal(answers[0], oracles.plain(oracles.key(0, "exp"), x))


def test_an_oracle_answers_evenly() -> None:
    values = oracles.plain(oracles.key(0, "exp"), torch.arange(160_000)).double()
    counts = torch.histc(values, 16, 0, PRIME)
    assert (counts - 10_000).abs().max() < 6 * math.sqrt(10_000)  # six standard deviations


@given(RESIDUES, st.integers(0, 9))
def test_even_and_odd_oracles_are(x: int, secret: int) -> None:
    argument, opposite = torch.tensor(x), torch.tensor(-x % PRIME)
    assert int(oracles.even(secret, argument)) == int(oracles.even(secret, opposite))
    assert (int(oracles.odd(secret, argument)) + int(oracles.odd(secret, opposite))) % PRIME == 0
    assert int(oracles.positive(secret, argument)) + int(oracles.positive(secret, opposite)) == (x != 0)


def test_a_symmetric_oracle_ignores_order_and_nothing_else() -> None:
    x = some(1, 50)
    expected = oracles.symmetric(7, x, [1], keepdim=False)
    assert torch.equal(expected, oracles.symmetric(7, x.flip(1), [1], keepdim=False))
    assert not torch.equal(expected, oracles.symmetric(7, torch.cat([x[:, :1], x[:, :49]], 1), [1], keepdim=False))


def test_fewer_random_residues_are_the_first_of_more() -> None:
    for size in (1, 5, 16, 17, 1000):
        assert torch.equal(oracles.random_residues(2000, 0, "w")[:size], oracles.random_residues(size, 0, "w"))
