"""Published recipes as specifications and training configurations.

Each gives what its source states; numbers that a source leaves open are this package's defaults, and the docstring says which.

    recipe = padst.presets.pa_dst("block:16", 0.9, total_steps=10_000)
    model = padst.sparsify(model, recipe.spec)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3 * recipe.learning_rate_factor)
    runtime = padst.attach(model, optimizer, recipe.config)
"""

from __future__ import annotations

import dataclasses
import math

from padst_compile.spec import SparsitySpec
from padst_compile.structures import NM, Block, Diagonal, Structure, parse
from padst_compile.training.config import DSTConfig, LearnedPermutation


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What to sparsify, how to train it, and by how much to multiply the dense model's learning rate."""

    spec: SparsitySpec
    config: DSTConfig
    learning_rate_factor: float = 1.0


def pa_dst(structure: Structure | str, sparsity: float | None = None, *, total_steps: int, seed: int = 0) -> Recipe:
    """PA-DST (Tyagi et al. 2025): RigL on a structure, with one permutation per layer learned by AutoShuffle.

    The smaller side is permuted (section 3). Interval, fraction and end are SRigL's; the threshold of hardening is on our
    normalised penalty, for the paper does not say how its 0.22 is normalised.
    """
    chosen = parse(structure) if isinstance(structure, str) else structure
    spec = SparsitySpec(chosen, sparsity, permutation="learned", permutation_side="smaller", seed=seed)
    learned = LearnedPermutation(method="autoshuffle")
    return Recipe(spec, DSTConfig(method="rigl", total_steps=total_steps, permutation=learned, seed=seed))


def srigl(n: int, m: int, *, total_steps: int, seed: int = 0) -> Recipe:
    """SRigL (Lasby et al. 2024) on N:M: RigL inside each group, with ablation of neurons that keep few salient weights.

    Interval 100, fraction 0.3, end at 75 %: its configuration for ViT-B/16. The salience threshold is the 0.3 of its CNNs, not
    the 0.95 of its ViT: N:M cannot hand the weights of given-up neurons to the others, so at 0.95 few weights would be left.
    """
    return Recipe(SparsitySpec(NM(n, m), seed=seed), DSTConfig(method="rigl", total_steps=total_steps, ablation=0.3, seed=seed))


def dsb(size: int, sparsity: float, *, total_steps: int, seed: int = 0) -> Recipe:
    """Dynamic shuffled blocks (Jiang et al. 2022): blocks under a shuffle that stays, here a random one; RigL's schedule."""
    spec = SparsitySpec(Block(size), sparsity, permutation="random", seed=seed)
    return Recipe(spec, DSTConfig(method="rigl", total_steps=total_steps, seed=seed))


def structured_dynsparse(size: int, sparsity: float, *, total_steps: int, seed: int = 0) -> Recipe:
    """Structured DynSparse BERT (Dietrich et al. 2021): blocks by their L1 norm, random growth, about 80 updates in all.

    The learning rate follows its equation for `sparsity`, `exp(1.969 s² + 0.2905 s)` times the dense one; half of the blocks
    are replaced at first, decaying along a cosine to the end.
    """
    updates = 80 if size > 1 else 160
    config = DSTConfig(
        method="set", interval=max(1, total_steps // updates), fraction=0.5, end=1.0, total_steps=total_steps, seed=seed
    )
    return Recipe(SparsitySpec(Block(size), sparsity, seed=seed), config, structured_dynsparse_factor(sparsity))


def structured_dynsparse_factor(sparsity: float) -> float:
    """The learning rate of a sparse BERT over that of the dense one (Dietrich et al. 2021, section 4)."""
    return math.exp(1.969 * sparsity**2 + 0.2905 * sparsity)


def dynadiag(sparsity: float, *, total_steps: int, seed: int = 0) -> Recipe:
    """DynaDiag (Tyagi et al. 2025): diagonals chosen by a soft top-K that hardens as its temperature falls from 5 to 0.05.

    The model begins with all diagonals, as many weights as dense, and ends at `sparsity`.
    """
    spec = SparsitySpec(Diagonal(), 0.0, seed=seed)
    return Recipe(spec, DSTConfig(method="dynadiag", final_sparsity=sparsity, total_steps=total_steps, seed=seed))
