"""How a sparse model is trained: which weights move when, and how permutations are learned."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias, get_args

from padst_compile.errors import TrainingConfigError, UnknownFieldError

Method: TypeAlias = Literal["rigl", "set", "mest", "magnitude", "dynadiag", "static"]
PermutationMethod: TypeAlias = Literal["autoshuffle", "sinkhorn_ste", "regroup"]
UnitScore: TypeAlias = Literal["l1", "l2"]


@dataclasses.dataclass(frozen=True)
class LearnedPermutation:
    """How the permutations of layers with `permutation="learned"` are learned.

    Args:
        method: `"autoshuffle"` relaxes them to doubly stochastic matrices under a penalty (PA-DST; Lyu et al. 2020);
            `"sinkhorn_ste"` keeps them hard and learns logits behind them (PermLLM); `"regroup"` moves columns between units
            by the scores that topology updates use.
        learning_rate: of soft matrices or logits, as a multiple of the method's own. Lower ones follow the task rather than
            chance, and take longer.
        penalty_weight: λ of autoshuffle, reached after `warmup` of the training.
        threshold: normalised penalty, in [0, 1), under which a layer's permutation becomes hard.
        warmup: fraction of `total_steps` over which λ rises.
        deadline: fraction of `total_steps` after which every permutation becomes hard, at a step that updates no topology.
        interval: steps between updates of sinkhorn_ste and regroup, which come halfway through it; None takes that of the
            topology, with whose updates they then alternate. Where both would fall on one step, features move at the next one
            without an update: what grows does so for the order of its gradients.
        group: features that may change places with each other under sinkhorn_ste.
        fraction: of the features that regroup may move at first; it falls as the topology's does.
        gain: least relative gain for which regroup moves a feature.

    Raises:
        TrainingConfigError: a value that makes no sense.
    """

    method: PermutationMethod = "autoshuffle"
    learning_rate: float = 1.0
    penalty_weight: float = 1.0
    threshold: float = 0.11
    warmup: float = 0.1
    deadline: float = 0.5
    interval: int | None = None
    group: int = 64
    fraction: float = 0.05
    gain: float = 0.05

    def __post_init__(self) -> None:
        _choice("LearnedPermutation", "method", self.method, get_args(PermutationMethod))
        for name in ("threshold", "warmup", "deadline", "fraction"):
            _between("LearnedPermutation", name, getattr(self, name), 0.0, 1.0)
        for name in ("learning_rate", "penalty_weight", "gain"):
            _between("LearnedPermutation", name, getattr(self, name), 0.0, float("inf"))
        _count("LearnedPermutation", "group", self.group)
        if self.interval is not None:
            _count("LearnedPermutation", "interval", self.interval)


@dataclasses.dataclass(frozen=True)
class DSTConfig:
    """Dynamic sparse training: drop the weights that matter least, grow others, every so many optimizer steps.

    Args:
        method: `"rigl"` grows where the gradient is large (Evci et al. 2020); `"set"` at random (Mocanu et al. 2018);
            `"mest"` at random and drops by `|w| + mest_weight * |g|` (Yuan et al. 2021); `"magnitude"` only prunes, from the
            sparsity of the model to `final_sparsity` (Zhu & Gupta 2017); `"dynadiag"` chooses diagonals by a soft top-K among
            all of them (Tyagi et al. 2025); `"static"` changes nothing.
        interval: optimizer steps between updates.
        fraction: of the active units that the first update replaces; decays to 0 along a cosine at `end`.
        start: the first optimizer step that may update.
        end: fraction of `total_steps` after which the topology stays.
        total_steps: optimizer steps of the whole training.
        score: of a unit, from its weights or gradients: their `"l1"` or `"l2"` norm.
        mest_weight: λ of mest.
        gradient_rows: fraction of the output rows, drawn anew for each update, from which rigl estimates gradients (Grass,
            Muhamed et al. 2024). Units without any of them stay as they are at that update. Gradients and scores of the others
            take no memory before it, unless a permutation learns from the same backward passes.
        ablation: gamma of SRigL: with rigl, outputs of N:M layers of which less than this fraction is salient are given up.
        final_sparsity: of magnitude and dynadiag, reached at `end`.
        permutation: how permutations are learned; None leaves them as they are.
        check_invariants: check the topology, the optimizer state and the zeros after every update.
        staggered: update layers one after the other, spread over the interval, instead of all at the same step. None does so
            with layers whose units are about as many as their weights (unstructured, N:M with few rows to a vector, diagonals
            under regroup): their scores are as large as dense gradients, of which there is then one at a time.
        seed: of every random choice.

    Raises:
        TrainingConfigError: a value that makes no sense, or one that the method needs is missing.
    """

    method: Method = "rigl"
    interval: int = 100
    fraction: float = 0.3
    start: int = 0
    end: float = 0.75
    total_steps: int | None = None
    score: UnitScore = "l1"
    mest_weight: float = 1.0
    gradient_rows: float = 1.0
    ablation: float | None = None
    final_sparsity: float | None = None
    permutation: LearnedPermutation | None = None
    check_invariants: bool = False
    staggered: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _choice("DSTConfig", "method", self.method, get_args(Method))
        _choice("DSTConfig", "score", self.score, get_args(UnitScore))
        _count("DSTConfig", "interval", self.interval)
        _count("DSTConfig", "start", self.start, least=0)
        for name in ("fraction", "end"):
            _between("DSTConfig", name, getattr(self, name), 0.0, 1.0)
        _between("DSTConfig", "gradient_rows", self.gradient_rows, 0.0, 1.0, above=True)
        if self.gradient_rows < 1 and (self.method != "rigl" or self.ablation is not None):
            other = "ablation" if self.method == "rigl" else f"method {self.method!r}"
            raise TrainingConfigError(
                f"DSTConfig: gradient_rows samples gradients for method 'rigl', and {other} takes no sample; leave one out"
            )
        _between("DSTConfig", "mest_weight", self.mest_weight, 0.0, float("inf"))
        if self.total_steps is not None:
            _count("DSTConfig", "total_steps", self.total_steps)
        elif self.method != "static" or self.permutation is not None:
            what = "learning permutations" if self.method == "static" else f"method {self.method!r}"
            raise TrainingConfigError(
                f"DSTConfig: {what} follows a schedule: total_steps, the optimizer steps in all, is missing"
            )
        if (self.method in ("magnitude", "dynadiag")) != (self.final_sparsity is not None):
            raise TrainingConfigError(
                "DSTConfig: methods 'magnitude' and 'dynadiag', and no others, need final_sparsity, for example 0.9"
            )
        if self.ablation is not None:
            _between("DSTConfig", "ablation", self.ablation, 0.0, 1.0)
            if self.method != "rigl":
                raise TrainingConfigError("DSTConfig: ablation counts salient gradients, which only method 'rigl' collects")
        if self.final_sparsity is not None:
            _between("DSTConfig", "final_sparsity", self.final_sparsity, 0.0, 1.0)
        if self.permutation is not None and not isinstance(self.permutation, LearnedPermutation):
            raise TrainingConfigError(f"DSTConfig: permutation is a LearnedPermutation or None, got {self.permutation!r}")

    @property
    def last_update(self) -> int:
        """The last optimizer step that may update the topology."""
        return 0 if self.total_steps is None else int(self.end * self.total_steps)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DSTConfig:
        """Read the JSON form back.

        Raises:
            TrainingConfigError: wrong values.
            UnknownFieldError: a key that does not exist.
        """
        fields = dict(data)
        _known(cls, fields)
        if isinstance(fields.get("permutation"), Mapping):
            _known(LearnedPermutation, fields["permutation"])
            fields["permutation"] = LearnedPermutation(**fields["permutation"])
        return cls(**fields)


def _known(cls: type[DSTConfig | LearnedPermutation], fields: Mapping[str, Any]) -> None:
    names = [field.name for field in dataclasses.fields(cls)]
    for name in fields:
        if name not in names:
            raise UnknownFieldError(f"key in {cls.__name__}", str(name), names)


def _choice(owner: str, name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UnknownFieldError(f"{name} in {owner}:", str(value), choices)


def _count(owner: str, name: str, value: object, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise TrainingConfigError(f"{owner}: {name} is an integer of at least {least}, got {value!r}")


def _between(owner: str, name: str, value: object, low: float, high: float, *, above: bool = False) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not (low < value if above else low <= value) or not value <= high:  # type: ignore[operator]  # a number
        raise TrainingConfigError(
            f"{owner}: {name} must be {'above' if above else 'at least'} {low:g}"
            + (f" and at most {high:g}" if high < float("inf") else "")
            + f", got {value!r}"
        )
