"""Kaleidoscope permutations: which ones they are, and how often."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

import padst_compile as padst
from padst_compile import kaleidoscope, permutation

SEEDS = st.integers(0, 2**32 - 1)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(st.integers(1, 100), SEEDS)
def test_a_kaleidoscope_permutation_is_one_and_reproducible(size: int, seed: int) -> None:
    p = kaleidoscope.random(size, seeded(seed))
    assert p.dtype == torch.int32
    assert torch.equal(permutation.check(p, size, "kaleidoscope"), p)
    assert torch.equal(p, kaleidoscope.random(size, seeded(seed)))


def test_a_butterfly_of_four_reaches_sixteen_of_24_permutations_equally_often() -> None:
    generator = seeded(0)
    counts: dict[tuple[int, ...], int] = {}
    for _ in range(3200):
        key = tuple(kaleidoscope.random(4, generator).tolist())
        counts[key] = counts.get(key, 0) + 1
    reachable = set()
    for bits in itertools.product((0, 1), repeat=4):
        p = [0, 1, 2, 3]
        for bit, (a, b) in zip(bits, ((0, 1), (2, 3), (0, 2), (1, 3)), strict=True):
            if bit:
                p[a], p[b] = p[b], p[a]
        reachable.add(tuple(p))
    assert len(reachable) == 16
    assert counts.keys() == reachable
    assert all(120 < count < 280 for count in counts.values())  # 200 +- 6 standard deviations


def test_odd_factors_mix_too() -> None:
    seen = torch.stack([kaleidoscope.random(12, seeded(seed)) for seed in range(300)])
    assert all(seen[:, place].unique().numel() == 12 for place in range(12))


def test_a_layer_may_begin_with_one() -> None:
    def layer(kind: str) -> padst.PermutedSparseLinear:
        spec = padst.SparsitySpec(padst.Block(8), sparsity=0.5, permutation=kind)
        sparse = padst.sparsify(torch.nn.Sequential(torch.nn.Linear(64, 32)), spec)[0]
        assert isinstance(sparse, padst.PermutedSparseLinear)
        return sparse

    first, again, random = layer("kaleidoscope"), layer("kaleidoscope"), layer("random")
    assert torch.equal(first.permutation, again.permutation)
    assert not torch.equal(first.permutation, random.permutation)
    permutation.check(first.permutation, 64, "layer")
