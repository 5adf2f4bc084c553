"""`padst tune`: measure what runs the layers of a model fastest, before it is first compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from rich.table import Table
from torch import nn

from padst_compile.autotune.effort import Effort
from padst_compile.autotune.kernel_choice import KernelChoice, observed
from padst_compile.autotune.problem import LayerProblem
from padst_compile.autotune.space import describe_tile
from padst_compile.explain import explain


@dataclasses.dataclass(frozen=True)
class TunedShape:
    """What runs all layers of one shape.

    Args:
        problem: the shape, and all else that its speed depends on.
        choice: what won, and where that is known from.
        layers: how many layers of the model share the shape.
    """

    problem: LayerProblem
    choice: KernelChoice
    layers: int

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return dataclasses.asdict(self)


def tune(
    model: nn.Module, *inputs: Any, effort: Effort = "quick", progress: Callable[[], Any] = lambda: None, **keyword_inputs: Any
) -> list[TunedShape]:
    """Capture a model on the given inputs and tune its sparse layers; nothing is compiled to machine code.

    Grad mode and training mode are those of the caller, and so is what is tuned: inference or training.

    Args:
        model: a sparsified model.
        inputs: positional inputs, as for calling it.
        effort: "quick" or "full"; with "cached", what is known is listed and nothing is measured.
        progress: called after each layer.
        keyword_inputs: keyword inputs.

    Returns:
        One result for each shape of layer, in the order of the model.
    """
    first: dict[LayerProblem, KernelChoice] = {}
    layers: dict[LayerProblem, int] = {}

    def note(problem: LayerProblem, choice: KernelChoice) -> None:
        first.setdefault(problem, choice)  # later layers of the shape find the result of the first
        layers[problem] = layers.get(problem, 0) + 1
        progress()

    with observed(note):
        explain(model, *inputs, options={"autotune": effort}, **keyword_inputs)
    return [TunedShape(problem, choice, layers[problem]) for problem, choice in first.items()]


def tuning_table(shapes: list[TunedShape], title: str) -> Table:
    """One row per shape: milliseconds of the default, the best and the dense product, and where they come from."""
    table = Table(title=title, title_justify="left")
    for column in ("layers", "in -> out", "structure", "permuted", "tokens"):
        table.add_column(column)
    for column in ("default ms", "best ms", "dense ms", "best to dense"):
        table.add_column(column, justify="right")
    for column in ("runs on", "tile", "source"):
        table.add_column(column)
    for shape in shapes:
        problem, choice = shape.problem, shape.choice
        times = (choice.default_seconds, choice.sparse_seconds, choice.dense_seconds)
        table.add_row(
            str(shape.layers), f"{problem.in_features} -> {problem.out_features}", problem.structure, problem.permuted,
            str(problem.tokens), *map(_milliseconds, times), _ratio(choice), choice.kernel,
            "default" if choice.tile is None else describe_tile(choice.tile), choice.source,
        )  # fmt: skip
    return table


def sources(shapes: list[TunedShape]) -> str:
    """A sentence about where the results come from."""
    counts: dict[str, int] = {}
    for shape in shapes:
        counts[shape.choice.source] = counts.get(shape.choice.source, 0) + 1
    listed = ", ".join(f"{count} {source}" for source, count in counts.items())
    shapes_of = "shape" if len(shapes) == 1 else "shapes"
    return f"{len(shapes)} {shapes_of} of layers: {listed}" if shapes else "no sparse layer is reached with these inputs"


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.3f}"


def _ratio(choice: KernelChoice) -> str:
    if choice.sparse_seconds is None or choice.dense_seconds is None:
        return ""
    return f"{choice.dense_seconds / choice.sparse_seconds:.2f}x"
