"""The specification and the training of sparse layers from the short names of the command line."""

from __future__ import annotations

import dataclasses
from typing import Any, cast, get_args

from padst_compile.errors import TrainingConfigError, UnknownFieldError
from padst_compile.spec import Distribution, PermutationKind, PermutationSide, SparsitySpec
from padst_compile.structures import parse
from padst_compile.training import DSTConfig, LearnedPermutation
from padst_compile.training.config import Method, PermutationMethod, UnitScore

DENSE = "dense"
FIXED = "none"  # as a method: no runtime at all; as a permutation: there is none
LEARNED: tuple[PermutationMethod, ...] = get_args(PermutationMethod)
PERMUTATIONS = (FIXED, "random", "kaleidoscope", *LEARNED)
METHODS = (FIXED, *get_args(Method))
PRUNING: tuple[Method, ...] = ("magnitude", "dynadiag")  # they begin with all weights
_SPARSITY = 0.9


@dataclasses.dataclass(frozen=True)
class SparseTraining:
    """What to make sparse and how to train it, in short names.

    Args:
        structure: as on the command line (`block:16`), or "dense" for none.
        sparsity: of the trained model; None for what the structure fixes, or 0.9.
        permutation: one of `PERMUTATIONS`: none, random and fixed, or how it is learned.
        side: input, output or smaller.
        foldable: only permutations that cost nothing.
        targets: patterns of layers; none for all.
        method: one of `METHODS`: how the topology changes; "none" for not at all, without a runtime; "static" for a runtime
            that only learns permutations.
        interval: steps between updates of the topology.
        fraction: of active weights that the first update replaces.
        end: fraction of the training after which the topology stays.
        ablation: with rigl, SRigL's: outputs of N:M layers of which less than this fraction is salient are given up.
        deadline: fraction of the training after which learned permutations are hard, if they were not before.
        distribution: of the sparsity over layers, uniform or erk.
        score: of a unit, the norm of its weights or gradients: l1 or l2.
        mest_weight: λ of mest, the weight of the gradient beside the magnitude.
        gradient_rows: fraction of the output rows from which rigl estimates gradients.
        penalty_weight: λ of autoshuffle.
        threshold: of its normalised penalty, under which a permutation becomes hard.
        permutation_warmup: fraction of the training over which λ rises.
        permutation_lr: of soft matrices and logits, as a multiple of the method's own.
    """

    structure: str = "block:16"
    _: dataclasses.KW_ONLY
    sparsity: float | None = None
    permutation: str = FIXED
    side: str = "input"
    foldable: bool = False
    targets: tuple[str, ...] = ()
    method: str = "rigl"
    interval: int = 100
    fraction: float = 0.3
    end: float = 0.75
    ablation: float | None = None
    deadline: float = 0.5
    distribution: str = "uniform"
    score: str = "l1"
    mest_weight: float = 1.0
    gradient_rows: float = 1.0
    penalty_weight: float = 1.0
    threshold: float = 0.11
    permutation_warmup: float = 0.1
    permutation_lr: float = 1.0

    def resolve(self, *, steps: int, seed: int) -> tuple[SparsitySpec | None, DSTConfig | None]:
        """Specification and training of a run; both None if it is dense, the latter for method "none".

        Raises:
            SpecError: a value that makes no sense, or a name that does not exist.
            TrainingConfigError: the same for what concerns training, or values that contradict each other.
        """
        for what, name, known in (("permutation", self.permutation, PERMUTATIONS), ("method", self.method, METHODS)):
            if name not in known:
                raise UnknownFieldError(what, name, known)
        if self.structure == DENSE:
            if self.permutation != FIXED or self.sparsity is not None:
                raise TrainingConfigError("structure 'dense' has neither sparsity nor permutations; leave them out")
            return None, None
        spec = self._spec(seed)
        if self.method != FIXED:
            return spec, self._training(steps, seed)
        if self.permutation in LEARNED:
            raise TrainingConfigError(
                f"method 'none' trains nothing but weights, so permutation {self.permutation!r} would never be learned; "
                "method 'static' keeps the topology and learns it"
            )
        return spec, None

    def _spec(self, seed: int) -> SparsitySpec:
        structure = parse(self.structure)
        fixed = structure.natural_sparsity()
        if self.method in PRUNING and fixed is not None:
            raise TrainingConfigError(f"method {self.method!r} prunes step by step, and {self.structure} fixes the sparsity")
        if self.method in PRUNING and self.distribution != "uniform":
            raise TrainingConfigError(
                f"method {self.method!r} prunes all layers alike; leave distribution {self.distribution!r} out"
            )
        fields: dict[str, Any] = {"targets": self.targets} if self.targets else {}
        spec = SparsitySpec(
            structure=structure,
            sparsity=_SPARSITY if self.sparsity is None and fixed is None else self.sparsity,
            permutation="learned" if self.permutation in LEARNED else cast("PermutationKind", self.permutation),
            permutation_side=cast("PermutationSide", self.side),
            permutation_group="foldable" if self.foldable else "any",
            distribution=cast("Distribution", self.distribution),
            seed=seed,
            **fields,
        )
        return dataclasses.replace(spec, sparsity=0.0) if self.method in PRUNING else spec

    def _training(self, steps: int, seed: int) -> DSTConfig:
        learned = None
        if self.permutation in LEARNED:
            learned = LearnedPermutation(
                method=self.permutation,
                learning_rate=self.permutation_lr,
                penalty_weight=self.penalty_weight,
                threshold=self.threshold,
                warmup=self.permutation_warmup,
                deadline=self.deadline,
            )
        final = _SPARSITY if self.sparsity is None else self.sparsity
        return DSTConfig(
            method=cast("Method", self.method),
            interval=self.interval,
            fraction=self.fraction,
            end=self.end,
            ablation=self.ablation,
            total_steps=steps,
            score=cast("UnitScore", self.score),
            mest_weight=self.mest_weight,
            gradient_rows=self.gradient_rows,
            final_sparsity=final if self.method in PRUNING else None,
            permutation=learned,
            seed=seed,
        )
