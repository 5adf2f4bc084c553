"""`padst tune`: measure what runs the layers of a model fastest, before it is first compiled."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from rich.table import Table
from torch import nn

from padst_compile.autotune import kernel_choice, mlp_choice
from padst_compile.autotune.effort import Effort
from padst_compile.autotune.kernel_choice import KernelChoice
from padst_compile.autotune.mlp_choice import MlpChoice
from padst_compile.autotune.problem import LayerProblem, MlpProblem
from padst_compile.autotune.space import describe_tile
from padst_compile.explain import explain
from padst_compile.kernels.launch import Tile


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


@dataclasses.dataclass(frozen=True)
class TunedPair:
    """What runs all pairs of layers, one behind the other, of one shape: two kernels or one.

    Args:
        problem: both layers, and all else that their speed depends on.
        choice: what won, and where that is known from.
        pairs: how many pairs of the model share the shape.
    """

    problem: MlpProblem
    choice: MlpChoice
    pairs: int

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What `tune` found, in the order of the model.

    Args:
        shapes: one for each shape of layer.
        pairs: one for each shape of two layers that one kernel could run.
    """

    shapes: tuple[TunedShape, ...]
    pairs: tuple[TunedPair, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {"shapes": [shape.to_dict() for shape in self.shapes], "pairs": [pair.to_dict() for pair in self.pairs]}


def tune(
    model: nn.Module, *inputs: Any, effort: Effort = "quick", progress: Callable[[], Any] = lambda: None, **keyword_inputs: Any
) -> Tuned:
    """Capture a model on the given inputs and tune its sparse layers; nothing is compiled to machine code.

    Grad mode and training mode are those of the caller, and so is what is tuned: inference or training.

    Args:
        model: a sparsified model.
        inputs: positional inputs, as for calling it.
        effort: "quick" or "full"; with "cached", what is known is listed and nothing is measured.
        progress: called after each layer.
        keyword_inputs: keyword inputs.

    Returns:
        One result for each shape of layer, and for each shape of pairs of layers.
    """
    layers: _Tally[LayerProblem, KernelChoice] = _Tally()
    pairs: _Tally[MlpProblem, MlpChoice] = _Tally()

    def note(problem: LayerProblem, choice: KernelChoice) -> None:
        layers.add(problem, choice)
        progress()

    with kernel_choice.observed(note), mlp_choice.observed(pairs.add):
        explain(model, *inputs, options={"autotune": effort}, **keyword_inputs)
    return Tuned(
        tuple(TunedShape(problem, *found) for problem, found in layers.items()),
        tuple(TunedPair(problem, *found) for problem, found in pairs.items()),
    )


def tuning_table(tuned: Tuned, title: str) -> Table:
    """One row per shape: milliseconds of the default, the best and the dense product, and where they come from.

    Of pairs of layers the default is two kernels, and the best is one for both.
    """
    table = Table(title=title, title_justify="left")
    for column in ("layers", "in -> out", "structure", "permuted", "tokens"):
        table.add_column(column)
    for column in ("default ms", "best ms", "dense ms", "best to dense"):
        table.add_column(column, justify="right")
    for column in ("runs on", "tile", "source"):
        table.add_column(column)
    for shape in tuned.shapes:
        table.add_row(*_layer_row(shape))
    for pair in tuned.pairs:
        table.add_row(*_pair_row(pair))
    return table


def sources(tuned: Tuned) -> str:
    """A sentence about where the results come from."""
    if not tuned.shapes:
        return "no sparse layer is reached with these inputs"
    layers = _sources("of layers", [shape.choice for shape in tuned.shapes])
    pairs = [pair.choice for pair in tuned.pairs if pair.choice.apart_seconds is not None]
    return f"{layers}; {_sources('of pairs', pairs)}" if pairs else layers


P = TypeVar("P")
C = TypeVar("C")


class _Tally(dict[P, tuple[C, int]], Generic[P, C]):
    """What was chosen for each problem, and how often it occurred."""

    def add(self, problem: P, choice: C) -> None:
        """Later layers of a shape find the result of the first, whose choice says more."""
        first, count = self.get(problem, (choice, 0))
        self[problem] = first, count + 1


def _layer_row(shape: TunedShape) -> tuple[str, ...]:
    problem, choice = shape.problem, shape.choice
    times = (choice.default_seconds, choice.sparse_seconds, choice.dense_seconds)
    return (
        str(shape.layers), f"{problem.in_features} -> {problem.out_features}", problem.structure, problem.permuted,
        str(problem.tokens), *map(_milliseconds, times), _ratio(choice), choice.kernel, _tile(choice.tile), choice.source,
    )  # fmt: skip


def _pair_row(pair: TunedPair) -> tuple[str, ...]:
    problem, choice = pair.problem, pair.choice
    measured = choice.apart_seconds is not None
    return (
        f"{pair.pairs} x 2", f"{problem.in_features} -> {problem.hidden_features} -> {problem.out_features}",
        problem.structure, problem.permuted, str(problem.tokens), _milliseconds(choice.apart_seconds),
        _milliseconds(choice.fused_seconds), "", "", "one kernel" if choice.fused else "two kernels", _tile(choice.tile),
        choice.source if measured else "not measured",
    )  # fmt: skip


def _sources(of: str, choices: Sequence[KernelChoice | MlpChoice]) -> str:
    counts = Counter(choice.source for choice in choices)
    listed = ", ".join(f"{count} {source}" for source, count in counts.items())
    return f"{len(choices)} {'shape' if len(choices) == 1 else 'shapes'} {of}: {listed}"


def _tile(tile: Tile | None) -> str:
    return "default" if tile is None else describe_tile(tile)


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.3f}"


def _ratio(choice: KernelChoice) -> str:
    if choice.sparse_seconds is None or choice.dense_seconds is None:
        return ""
    return f"{choice.dense_seconds / choice.sparse_seconds:.2f}x"
