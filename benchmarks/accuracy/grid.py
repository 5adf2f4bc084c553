"""The cells of the accuracy study: which models are trained how, and how often."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from padst_compile.recipes import TrainConfig
from padst_compile.recipes.shorthand import LEARNED, SparseTraining

SPARSITIES = (0.8, 0.9, 0.95)
UPDATES = 40  # of the topology, if they went on to the end
_MAIN_SPARSITY = 0.9
_ROUNDING = 1e-9


@dataclasses.dataclass(frozen=True)
class Task:
    """A model on data.

    Args:
        name: short.
        metric: of the results; "loss" (lower is better) or "accuracy".
        fields: of `TrainConfig`, without data.
        kind: of data: "images" or "text".
    """

    name: str
    metric: str
    fields: dict[str, Any]
    kind: str


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to train sparse layers, at a sparsity.

    Args:
        name: of the row in the report.
        training: in the short names of `padst train`, without sparsity.
        fixed: the sparsity that its structure fixes; None where any goes.
        replays: another method, whose learned permutations this one begins with and keeps.
    """

    name: str
    training: SparseTraining
    fixed: float | None = None
    replays: str | None = None


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training run of the study."""

    task: Task
    method: Method
    sparsity: float
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return self._name_with(self.method.name)

    @property
    def source(self) -> str | None:
        """The name of the cell whose permutations this one keeps."""
        return None if self.method.replays is None else self._name_with(self.method.replays)

    def _name_with(self, method: str) -> str:
        return f"{self.task.name}/{method.replace(':', '-')}/{self.sparsity:g}/{self.seed}"

    def config(self, data: dict[str, str], threads: int | None, device: str) -> TrainConfig:
        """What `recipes.run` takes.

        Args:
            data: path by kind of data.
            threads: of the CPU.
            device: "cpu" or "cuda".
        """
        steps = self.task.fields["steps"]
        training = self.method.training
        if training.structure != "dense":
            sparsity = None if self.method.fixed is not None else self.sparsity
            training = dataclasses.replace(training, sparsity=sparsity, interval=max(2, steps // UPDATES))
        spec, dst = training.resolve(steps=steps, seed=self.seed)
        return TrainConfig(
            data=data[self.task.kind], sparsity=spec, dst=dst, seed=self.seed, threads=threads, device=device,  # type: ignore[arg-type]  # checked there
            **self.task.fields,
        )  # fmt: skip


TEXT_SMALL = Task(
    "gpt-small", "loss",
    {"model": "hf:gpt2,n_layer=2,n_embd=128,n_head=4", "steps": 800, "batch": 16, "context": 64, "lr": 3e-3, "eval_limit": 400,
     "eval_interval": 100, "checkpoint_interval": 400}, "text",
)  # fmt: skip
_IMAGES_SMALL = {"steps": 1200, "batch": 64, "lr": 1e-3, "eval_limit": 2000, "eval_interval": 200, "checkpoint_interval": 400}
# Two to three times the arithmetic of gpt-small, of which images need more than text does.
VIT_SMALL = Task(
    "vit-small", "accuracy",
    {"model": "timm:vit_tiny_patch16_224,depth=3,embed_dim=128,num_heads=4,patch_size=8", **_IMAGES_SMALL}, "images",
)  # fmt: skip
MIXER_SMALL = Task(
    "mixer-small", "accuracy", {"model": "mixer:patch_size=4,embed_dim=96,num_blocks=2", **_IMAGES_SMALL}, "images"
)
TEXT_LARGE = Task(
    "gpt-384", "loss",
    {"model": "hf:gpt2,n_layer=6,n_embd=384,n_head=6", "steps": 5000, "batch": 64, "context": 256, "lr": 1e-3,
     "eval_interval": 500, "dtype": "bfloat16"}, "text",
)  # fmt: skip
IMAGES_LARGE = Task(
    "vit-tiny", "accuracy",
    {"model": "timm:vit_tiny_patch16_224,patch_size=4", "steps": 20_000, "batch": 128, "lr": 1e-3, "eval_interval": 2000,
     "dtype": "bfloat16"}, "images",
)  # fmt: skip
MIXER_LARGE = Task(
    "mixer", "accuracy", {**IMAGES_LARGE.fields, "model": "mixer:patch_size=4,embed_dim=256,num_blocks=8"}, "images"
)
# The fewest steps of which the early deadline leaves one to learn permutations in.
TEXT_TINY = Task(
    "gpt-tiny", "loss",
    {"model": "hf:gpt2,n_layer=1,n_embd=64,n_head=2", "steps": 10, "batch": 4, "context": 16, "lr": 1e-3, "eval_limit": 8},
    "text",
)  # fmt: skip
TASKS = {"tiny": (TEXT_TINY,), "cpu": (TEXT_SMALL, VIT_SMALL, MIXER_SMALL), "gpu": (TEXT_LARGE, IMAGES_LARGE, MIXER_LARGE)}

DENSE = Method("dense", SparseTraining(structure="dense", method="none"))
PLAIN_N_OF_M = {"nm:1:5": 0.8, "nm:1:10": 0.9, "nm:1:20": 0.95}  # with the sparsities that they fix
_PERMUTATIONS = ("none", "random", "autoshuffle", "sinkhorn_ste", "regroup")
_UNSTRUCTURED = (
    Method("rigl", SparseTraining(structure="unstructured", method="rigl")),
    Method("set", SparseTraining(structure="unstructured", method="set")),
)


def methods() -> Iterator[Method]:
    """Every method, the ones that decide most first: dense and unstructured, then blocks, then the other structures."""
    yield DENSE
    yield from _UNSTRUCTURED
    for structure in ("block:16", "diagonal"):
        yield Method(f"{structure} static", SparseTraining(structure=structure, method="static"))
        for permutation in _PERMUTATIONS:
            yield Method(f"{structure} {permutation}", SparseTraining(structure=structure, permutation=permutation))
        for permutation in ("autoshuffle", "sinkhorn_ste"):  # whether they would do better in less of the training
            training = SparseTraining(structure=structure, permutation=permutation, deadline=0.1)
            yield Method(f"{structure} {permutation} early", training)
    for plain, fixed in PLAIN_N_OF_M.items():
        yield from _n_of_m(plain, fixed)
    yield from _why("block:16")


def _n_of_m(plain: str, fixed: float) -> Iterator[Method]:
    """N:M, vector N:M, and N:M with SRigL's ablation."""
    for structure in (plain, f"{plain}:8"):
        yield Method(f"{structure} static", SparseTraining(structure=structure, method="static"), fixed)
        for permutation in _PERMUTATIONS:
            yield Method(f"{structure} {permutation}", SparseTraining(structure=structure, permutation=permutation), fixed)
    for permutation in _PERMUTATIONS:
        training = SparseTraining(structure=plain, permutation=permutation, ablation=0.3)
        yield Method(f"{plain.replace('nm', 'srigl')} {permutation}", training, fixed)


def _why(structure: str) -> Iterator[Method]:
    """What tells why learned permutations do as they do: their result from the beginning, and other ways to find it."""
    for permutation in LEARNED:
        training = SparseTraining(structure=structure, permutation="random")
        yield Method(f"{structure} replayed {permutation}", training, replays=f"{structure} {permutation}")
    early = SparseTraining(structure=structure, permutation="autoshuffle", deadline=0.1)
    for words, change in {
        "weak penalty": {"penalty_weight": 0.1},
        "strong penalty": {"penalty_weight": 10.0},
        "slow": {"permutation_lr": 0.1},
        "fast": {"permutation_lr": 10.0},
        "settled topology": {"end": 0.1},
    }.items():
        yield Method(f"{structure} autoshuffle early, {words}", dataclasses.replace(early, **change))


def _in_small_grid(task: Task, method: Method, sparsity: float) -> bool:
    """Every method is trained on text at 90 %; those that decide also on images at 90 %, and on text at other sparsities."""
    text, main = task is TEXT_SMALL, sparsity == _MAIN_SPARSITY
    return (text and main) or ((text or main) and decides(method))


def decides(method: Method) -> bool:
    """Whether the grid of a CPU trains a method on other tasks and at other sparsities than its first."""
    structure, _, permutation = method.name.partition(" ")
    if structure == "block:16":
        return permutation in ("static", "none", "random", "autoshuffle early", "regroup")
    if structure == "diagonal" or structure in PLAIN_N_OF_M:
        return permutation in ("none", "random", "regroup")
    return not permutation


def cells(size: str, seeds: int, sparsities: tuple[float, ...] = SPARSITIES) -> Iterator[Cell]:
    """All cells, such that whatever is done first can be read: 90 % before other sparsities, every seed of a method together.

    Args:
        size: "cpu", "gpu", or "tiny", which only shows that everything runs.
        seeds: of each method.
        sparsities: to study.
    """
    for sparsity in sorted(sparsities, key=lambda s: abs(s - _MAIN_SPARSITY)):
        for task in TASKS[size]:
            for method in methods():
                dense_again = method is DENSE and sparsity != min(sparsities, key=lambda s: abs(s - _MAIN_SPARSITY))
                other = method.fixed is not None and abs(method.fixed - sparsity) > _ROUNDING
                spared = size == "cpu" and not _in_small_grid(task, method, sparsity)
                if not (dense_again or other or spared):
                    yield from (Cell(task, method, sparsity, seed) for seed in range(seeds))
