"""Sparse tensor cores: which N:M layers they can multiply, packing, the op, its choice, and the library where there is one."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import padst_compile as padst
from padst_compile.kernels.cusparselt import reference, support
from padst_compile.kernels.cusparselt.legality import MOST, WINDOW, most_active
from padst_compile.structures import NM, Shape
from padst_compile.testing.accuracy import assert_within_error_bound

PACK, LINEAR = torch.ops.padst.two_of_four_pack.default, torch.ops.padst.two_of_four_linear.default
CPU, HALF = torch.device("cpu"), torch.bfloat16

each_dtype = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
on_device = pytest.mark.skipif(
    not (torch.cuda.is_available() and torch.backends.cusparselt.is_available()),
    reason="needs a GPU with sparse tensor cores, and a PyTorch with cuSPARSELt",
)


# --- which structures are 2:4 ---


@st.composite
def structures(draw: Any) -> tuple[NM, int]:
    """Small structures and a number of inputs that their last group may not fill."""
    m = draw(st.integers(1, 9))
    n = draw(st.integers(1, m))
    in_features = draw(st.integers(m, 27))
    assume(not 0 < in_features % m < n)
    return NM(n, m), in_features


def kept_by_brute_force(structure: NM, inputs: range, in_features: int) -> int:
    """The most that any choice keeps of `inputs`: all choices of all groups that these meet."""
    found = 0
    groups = [range(start, min(start + structure.m, in_features)) for start in range(0, in_features, structure.m)]
    met = [itertools.combinations(group, structure.n) for group in groups if set(group) & set(inputs)]
    for choices in itertools.product(*met):
        found = max(found, len(set(itertools.chain(*choices)) & set(inputs)))
    return found


@given(structures())
def test_windows_hold_as_much_as_some_choice_keeps_and_no_more(case: tuple[NM, int]) -> None:
    structure, in_features = case
    windows = [range(start, min(start + WINDOW, in_features)) for start in range(0, in_features, WINDOW)]
    assert most_active(structure, in_features) == max(kept_by_brute_force(structure, w, in_features) for w in windows)


@given(structures(), st.integers(0, 2**32))
def test_no_choice_of_a_legal_structure_needs_more_than_two_of_four(case: tuple[NM, int], seed: int) -> None:
    structure, in_features = case
    assume(most_active(structure, in_features) <= MOST)
    scores = torch.rand(3, in_features, generator=torch.Generator().manual_seed(seed))
    shape, topology = Shape(3, in_features), structure.choose(scores, structure.natural_sparsity())
    weight = structure.unpack(torch.ones_like(structure.pack(scores, topology)), topology, shape)
    assert reference.is_two_of_four(F.pad(weight, (0, -in_features % WINDOW)))


@pytest.mark.parametrize(
    ("n", "m", "legal"),
    [(1, 1, False), *((1, m, True) for m in range(2, 21)), (2, 2, False), (2, 3, False), (2, 4, True), (2, 5, False),
     (2, 6, False), (2, 7, False), (2, 8, True), (2, 10, False), (2, 12, True), (3, 8, False), (3, 256, False)],
)  # fmt: skip
@pytest.mark.parametrize("inputs", [768, 763])
def test_one_of_two_and_more_and_two_of_multiples_of_four_are_legal(n: int, m: int, legal: bool, inputs: int) -> None:
    assert (most_active(NM(n, m), inputs) <= MOST) == legal


# --- packing ---


def two_of_four(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Whole numbers, at most two of four neighbours, many windows with fewer."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-3, 4, (rows, columns), generator=generator)
    whole = F.pad(weight, (0, -columns % WINDOW)).view(rows, -1, WINDOW)
    order = torch.rand(whole.shape, generator=generator).argsort(-1)
    return whole.masked_fill(order >= MOST, 0).view(rows, -1)[:, :columns].to(dtype)


@each_dtype
@given(rows=st.integers(1, 5), words=st.integers(1, 4), seed=st.integers(0, 2**32))
def test_what_is_packed_unpacks_to_the_same(dtype: torch.dtype, rows: int, words: int, seed: int) -> None:
    weight = two_of_four(rows, 16 * words, dtype, seed)
    packed = reference.compress(weight)
    assert (packed.shape, packed.dtype) == ((rows, 9 * words), dtype)
    assert torch.equal(reference.decompress(packed), weight)


def test_numbers_of_all_kinds_are_packed_bit_for_bit() -> None:
    kinds = torch.tensor([torch.inf, -torch.inf, torch.nan, torch.finfo(HALF).smallest_normal / 2, 1e38, -1.0], dtype=HALF)
    weight = torch.zeros(6, 16, dtype=HALF)
    weight[:, 3], weight[:, 9] = kinds, kinds.flip(0)
    unpacked = reference.decompress(reference.compress(weight))
    assert torch.equal(unpacked.view(torch.int16), weight.view(torch.int16))


def test_what_is_not_two_of_four_is_not_packed() -> None:
    weight = torch.zeros(2, 16, dtype=HALF)
    weight[1, 5:8] = 1
    with pytest.raises(RuntimeError, match="more than two of four"):
        PACK(weight)
    with pytest.raises(RuntimeError, match="float16 and bfloat16"):
        PACK(torch.zeros(2, 16))


# --- the op ---


@pytest.mark.parametrize("shape", [(16, 16), (33, 67), (1, 3), (48, 40)])
@pytest.mark.parametrize("sizes", [(), (1,), (7,), (2, 4), (2, 0, 3), (0,)])
@each_dtype
def test_the_product_is_exact_for_all_sizes(shape: tuple[int, int], sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    out, inputs = shape
    weight, table = two_of_four(out, inputs, dtype), torch.randperm(inputs).int()
    x, bias = torch.randint(-2, 3, (*sizes, inputs)).to(dtype), torch.randint(-9, 9, (out,)).to(dtype)
    packed = PACK(weight)
    for added, into in itertools.product((None, bias), (None, table)):
        y = LINEAR(x, packed, added, into, out)
        assert y.is_contiguous()
        assert torch.equal(y, F.linear(x if into is None else x[..., into], weight, added))


def test_any_strides_are_read() -> None:
    weight = two_of_four(32, 24, HALF)
    packed = PACK(weight)
    for x in (torch.ones(24, 5, dtype=HALF).cumsum(0).T, torch.ones(5, 48, dtype=HALF).cumsum(1)[:, ::2]):
        assert torch.equal(LINEAR(x, packed, None, None, 32), F.linear(x, weight))


@each_dtype
def test_the_ops_keep_what_they_promise(dtype: torch.dtype) -> None:
    weight = two_of_four(33, 67, dtype)
    packed = PACK(weight)
    torch.library.opcheck(PACK, (weight,))
    table, bias = torch.randperm(67).int(), torch.zeros(33, dtype=dtype)
    torch.library.opcheck(LINEAR, (torch.ones(2, 5, 67, dtype=dtype), packed, bias, table, 33))
    torch.library.opcheck(LINEAR, (torch.ones(4, 67, dtype=dtype), packed, None, None, 33))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.ones(2, 64)}, "x is torch.float32 but values are torch.bfloat16"),
        ({"x": torch.ones(2, 64), "packed": torch.ones(32, 36)}, "float16 and bfloat16, got torch.float32"),
        ({"packed": torch.ones(16, 36, dtype=HALF)}, r"packed must be \[32, …\], got \[16, 36\]"),
        ({"bias": torch.ones(31, dtype=HALF)}, "bias must be"),
        ({"input_permutation": torch.arange(63).int()}, "input_permutation must have 64 entries"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    arguments = {
        "x": torch.ones(2, 64, dtype=HALF), "packed": torch.ones(32, 36, dtype=HALF), "bias": None, "input_permutation": None,
        "out_features": 32, **changes,
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=message):
        LINEAR(**arguments)


# --- on a GPU ---


@on_device
@each_dtype
@pytest.mark.parametrize("shape", [Shape(768, 768), Shape(3072, 768), Shape(33, 67)])
@pytest.mark.parametrize("tokens", [1, 13, 1576])
def test_the_library_multiplies_within_the_error_bound(shape: Shape, tokens: int, dtype: torch.dtype) -> None:
    device, structure = torch.device("cuda"), NM(1, 10)
    reason = support.why_not(structure, shape, device, dtype)
    if reason is not None:
        pytest.skip(reason)
    torch.manual_seed(0)
    weight = torch.randn(shape.out_features, shape.in_features, device=device, dtype=dtype)
    topology = structure.choose(weight.float().abs(), structure.natural_sparsity())
    weight = structure.unpack(structure.pack(weight, topology), topology, shape)
    x = torch.randn(tokens, shape.in_features, device=device, dtype=dtype)
    bias, table = torch.randn(shape.out_features, device=device, dtype=dtype), torch.randperm(shape.in_features).int().cuda()
    y = LINEAR(x, PACK(weight), bias, table, shape.out_features)
    read = x[:, table].double()
    exact = F.linear(read, weight.double(), bias.double())
    magnitude = F.linear(read.abs(), weight.double().abs(), bias.double().abs())
    assert_within_error_bound(y, exact, magnitude, shape.in_features + 2)


@on_device
@pytest.mark.parametrize("structure", ["nm:1:10", "nm:2:4"])
def test_a_model_on_a_gpu_is_tuned_with_it_among_the_candidates(
    structure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PADST_CACHE_DIR", str(tmp_path))
    torch.manual_seed(0)
    spec = padst.SparsitySpec(structure, permutation="random", permutation_side="output", ignore=())
    model = padst.sparsify(nn.Sequential(nn.Linear(40, 24)), spec)
    with torch.no_grad():
        model[0].values.copy_(torch.randint(-3, 4, model[0].values.shape))
        model, x = model.to("cuda", HALF).eval(), torch.randint(-2, 3, (512, 40)).to("cuda", HALF)
        (layer,) = padst.explain(model, x).layers
        assert "cusparselt" in layer.kernel + layer.reason
        assert torch.equal(torch.compile(model, backend="padst")(x), model(x))
