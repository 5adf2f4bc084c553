"""A run in the terminal: a bar with loss, rate and remaining time, and a table at the end."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from padst_compile.recipes.result import Result

if TYPE_CHECKING:
    from typing_extensions import Self

_NUMBERS = {"loss": "loss", "validation_loss": "validation", "validation_accuracy": "accuracy", "density": "density"}
_PERCENT = 100


class Display:
    """A reporter for the terminal; a context, in which the bar is shown. Into a pipe it writes a line per validation.

    Args:
        console: where to.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=None, visible=False, numbers="", rate="")
        self._first: tuple[int, float] | None = None
        self._said = ""

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, soft_wrap=True, highlight=False)

    def progress(self, step: int, steps: int, numbers: Mapping[str, float]) -> None:
        """Move the bar."""
        now = time.perf_counter()
        self._first = self._first or (step - 1, now)
        first, began = self._first
        rate = f"{(step - first) / (now - began):.2f} steps/s" if now > began else ""
        text = ", ".join(f"{label} {numbers[name]:.4g}" for name, label in _NUMBERS.items() if name in numbers)
        self._bar.update(self._task, total=steps, completed=step, visible=True, numbers=text, rate=rate)
        validated = f"{numbers['validation_loss']}" if "validation_loss" in numbers else ""
        if not self._console.is_terminal and validated != self._said:
            self._said = validated
            self.say(f"step {step} of {steps}: {text}, {rate}")


def result_table(result: Result) -> Table:
    """Scores of the trained model as it is and compiled, and their difference."""
    table = Table(title="the trained model", title_justify="left")
    for column in ("", "validation loss", "accuracy"):
        table.add_column(column, justify="right" if column else "left")
    for name, scores in (("eager", result.eager), ("compiled, backend padst", result.compiled)):
        table.add_row(name, f"{scores.loss:.6f}", f"{_PERCENT * scores.accuracy:.2f} %")
    loss = result.compiled.loss - result.eager.loss
    accuracy = result.compiled.accuracy - result.eager.accuracy
    table.add_row("difference", f"{loss:+.1e}", f"{_PERCENT * accuracy:+.2f} %")
    return table


def result_line(result: Result) -> str:
    """The verdict and the sizes in a sentence."""
    verdict = "they differ by rounding alone" if result.passed else "[red]they differ by more than rounding[/red]"
    return (
        f"{verdict}: logits by {result.logit_error:.1e} of the largest, where {result.bound:.1e} may be; "
        f"{result.parameters:,} weights, density of sparse layers {result.density:.4g}, "
        f"{result.steps} steps in {result.seconds:.0f} s"
    )
