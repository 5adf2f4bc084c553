"""Hypothesis strategies for shapes, structures, specifications, permutations and packed weights."""

from __future__ import annotations

import dataclasses
from typing import get_args

import torch
from hypothesis import strategies as st

from padst_compile.spec import DEFAULT_IGNORE, PermutationKind, SparsitySpec
from padst_compile.structures import NM, Block, Diagonal, Shape, Structure, Topology, Unstructured

_SEEDS = st.integers(0, 2**32 - 1)


@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """A dense weight and what a structure keeps of it.

    Attributes:
        structure: the family of masks.
        shape: of the weight.
        sparsity: at which the topology was chosen.
        weight: the dense float64 weight; its entries are whole numbers, none of them zero.
        topology: the index tensors of the active weights.
        values: the active weights.
    """

    structure: Structure
    shape: Shape
    sparsity: float
    weight: torch.Tensor
    topology: Topology
    values: torch.Tensor


def shapes(largest: int = 40) -> st.SearchStrategy[Shape]:
    """Sizes of linear layers, from 1 to `largest` features on either side; most divide by nothing useful."""
    sizes = st.integers(1, largest)
    return st.builds(Shape, sizes, sizes)


def structures(largest: int = 12) -> st.SearchStrategy[Structure]:
    """Structures of every kind with sizes up to `largest`; they fit some shapes and not others."""
    sizes = st.integers(1, largest)
    return st.one_of(
        st.builds(Block, st.one_of(sizes, st.tuples(sizes, sizes))),
        st.builds(lambda n, extra, vector: NM(n, n + extra, vector), st.integers(1, 4), st.integers(0, largest), sizes),
        st.builds(Diagonal, sizes),
        st.just(Unstructured()),
    )


def sparsities() -> st.SearchStrategy[float]:
    """Fractions of zeros that most layers can have."""
    return st.floats(0.0, 0.95)


def permutations(size: int) -> st.SearchStrategy[torch.Tensor]:
    """Permutations of `size` features, int32 `[size]`."""
    return st.permutations(range(size)).map(lambda order: torch.tensor(order, dtype=torch.int32))


def weights(shape: Shape) -> st.SearchStrategy[torch.Tensor]:
    """Float64 weights `[out_features, in_features]` of whole numbers from -9 to 9 without 0: sums of them are exact."""

    def draw(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        size = (shape.out_features, shape.in_features)
        magnitudes = torch.randint(1, 10, size, generator=generator)
        signs = torch.randint(0, 2, size, generator=generator) * 2 - 1
        return (magnitudes * signs).double()

    return _SEEDS.map(draw)


@st.composite
def packed_weights(draw: st.DrawFn, largest: int = 40) -> PackedWeight:
    """Weights with a structure that fits them, and the topology that keeps the most of them."""
    shape = draw(shapes(largest))
    sparsity = draw(sparsities())
    structure = draw(structures().filter(lambda candidate: _fits(candidate, shape, sparsity)))
    weight = draw(weights(shape))
    topology = structure.choose(weight.abs(), sparsity)
    return PackedWeight(structure, shape, sparsity, weight, topology, structure.pack(weight, topology))


@st.composite
def specs(draw: st.DrawFn) -> SparsitySpec:
    """Specifications with any valid value in every field."""
    structure = draw(structures())
    natural = structure.natural_sparsity()
    permutation = draw(st.sampled_from(get_args(PermutationKind)))
    searched = permutation == "search"
    patterns = st.lists(st.sampled_from(("*", "blocks.*", "re:.*fc[12]", "héad", "[ab]?")), max_size=3).map(tuple)
    return SparsitySpec(
        structure,
        draw(sparsities()) if natural is None else draw(st.sampled_from((None, natural))),
        permutation=permutation,
        permutation_side=draw(st.sampled_from(("input", "output", "smaller"))),
        permutation_group=draw(
            st.sampled_from(("any", "foldable") if permutation not in ("search", "kaleidoscope") else ("any",))
        ),
        distribution=draw(st.sampled_from(("uniform", "erk") if natural is None else ("uniform",))),
        targets=draw(patterns),
        ignore=draw(st.one_of(patterns, st.just(DEFAULT_IGNORE))),
        init=draw(st.sampled_from(("magnitude", "activation") if searched else ("magnitude", "activation", "random"))),
        seed=draw(st.integers()),
    )


def _fits(structure: Structure, shape: Shape, sparsity: float) -> bool:
    try:
        structure.check(shape, sparsity, "layer")
    except ValueError:
        return False
    return True
