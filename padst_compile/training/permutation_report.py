"""`permutation_report`: where the permutations of a training stand, layer by layer."""

from __future__ import annotations

import dataclasses
import io
from typing import TYPE_CHECKING, Any

from padst_compile.training.permutations.report import Distance, distance
from padst_compile.training.runtime import Runtime
from padst_compile.training.trained_layer import TrainedLayer

if TYPE_CHECKING:
    from rich.table import Table


@dataclasses.dataclass(frozen=True)
class LayerPermutation:
    """One layer's permutation.

    Args:
        layer: module name.
        features: of the permuted side.
        hard: whether the layer applies a permutation; if not, `from_start` and `from_identity` are of the one it would become.
        penalty: normalised, in [0, 1); 0 once hard.
        hardened_at: optimizer step at which it became hard; 0 for one that always was, None for a soft one.
        from_identity: its distance from doing nothing.
        from_start: its distance from where the training began.
        products: multiply-adds of its soft matrix for a token, over those of the layer's active weights; 0 once hard.
    """

    layer: str
    features: int
    hard: bool
    penalty: float
    hardened_at: int | None
    from_identity: Distance
    from_start: Distance
    products: float


@dataclasses.dataclass(frozen=True)
class PermutationReport:
    """What `permutation_report` found; `print` it, or take `to_dict()`.

    Args:
        method: of learning; None where permutations stay as they are.
        step: optimizer steps so far.
        layers: one entry for each layer with a permutation.
        seconds_per_step: mean time that learning permutations took in the hook after a step: penalties, projections and steps
            of soft matrices, assignments, moved features. Of the steps since `attach`, or since a checkpoint was loaded. What
            soft matrices and dense gradients cost in forward and backward passes is no part of it, for it cannot be told from
            the rest of a step; `products` says how large the former are.
    """

    method: str | None
    step: int
    layers: tuple[LayerPermutation, ...]
    seconds_per_step: float

    @property
    def hardened(self) -> int:
        """Layers whose permutation is hard."""
        return sum(layer.hard for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {**dataclasses.asdict(self), "hardened": self.hardened}

    def table(self) -> Table:
        """For `rich`."""
        from rich.table import Table

        table = Table(title=f"permutations at step {self.step}, method {self.method or 'none'}", title_justify="left")
        columns = ("layer", "features", "penalty", "hard since", "moved", "displacement", "moved from start", "products")
        for column in columns:
            table.add_column(column, justify="left" if column == "layer" else "right")
        for row in self.layers:
            since = "soft" if row.hardened_at is None else f"step {row.hardened_at}" if row.hardened_at else "always"
            distances = row.from_identity.moved, row.from_identity.displacement, row.from_start.moved
            numbers = (f"{part:.3f}" for part in (row.penalty, *distances))
            table.add_row(row.layer, str(row.features), next(numbers), since, *numbers, f"{row.products:.2f}")
        table.caption = (
            f"{self.hardened} of {len(self.layers)} hard; {self.seconds_per_step * 1e3:.2f} ms per step in hooks to learn "
            "them; products: of soft matrices, over those of active weights"
        )
        return table

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=140).print(self.table())
        return text.getvalue()


def permutation_report(runtime: Runtime) -> PermutationReport:
    """Penalty, distances and hardening of every layer that has a permutation, and what learning them costs."""
    learners = runtime.learners
    rows = []
    for trained in runtime.layers:
        learner = learners.get(trained.name)
        current = trained.layer.permutation if learner is None else learner.permutation()
        if current is None or trained.start is None:
            continue
        rows.append(
            LayerPermutation(
                trained.name,
                current.numel(),
                learner is None or learner.hard,
                0.0 if learner is None else learner.penalty,
                0 if learner is None else learner.hardened_at,
                distance(current),
                distance(current, trained.start),
                _products(trained),
            )
        )
    config = runtime.config.permutation
    seconds = runtime.learning_seconds / max(1, runtime.timed_steps)
    return PermutationReport(None if config is None else config.method, runtime.step, tuple(rows), seconds)


def _products(trained: TrainedLayer) -> float:
    soft = trained.layer.soft
    if soft is None or not soft.is_soft:
        return 0.0
    return soft.matrix.numel() / max(1, trained.active_weights())
