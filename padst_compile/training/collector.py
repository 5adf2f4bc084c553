"""Hears of the dense gradient of a layer, and hands it on to whoever needs it, a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from padst_compile.kernels import gradient_tap
from padst_compile.training.passes import Passes
from padst_compile.training.reducer import Reducer
from padst_compile.training.unit_scores import SampledScores


class DenseGradient:
    """Listens to one layer between two optimizer steps (`gradient_tap`) and hands its dense gradient on, in parts.

    No dense gradient ever exists as a whole, unless a layer that runs dense hands one over. Over several backward passes
    (gradient accumulation, ranks) magnitudes are added, not gradients: a signed sum would be a dense gradient per layer.

    Args:
        magnitudes: who gets `|gradient|`.
        signed: who gets the gradient itself.
        sampled: who gets `|gradient|` of some output rows. Where nobody else wants any, only those are computed.
        passes: knows which backward passes were in vain; None where none are.

    Attributes:
        poisoned: whether a gradient had NaN or infinite entries. Then nothing is left of those before it, and nothing of
            others is handed on until `clear`: the step is as good as lost.
    """

    def __init__(
        self,
        magnitudes: Sequence[Reducer],
        signed: Sequence[Reducer] = (),
        sampled: SampledScores | None = None,
        passes: Passes | None = None,
    ) -> None:
        self.magnitudes, self.signed, self.sampled, self._passes = tuple(magnitudes), tuple(signed), sampled, passes
        self.poisoned = False
        if passes is not None:
            passes.watch(self)

    def products(
        self, grad: torch.Tensor, x: torch.Tensor, rows: torch.Tensor | None = None, columns: torch.Tensor | None = None
    ) -> None:
        """See `GradientListener.products`."""
        if not self._wanted():
            return
        height = grad.shape[1] if rows is None else len(rows)
        step = gradient_tap.part_height(height, rows)
        with torch.no_grad():
            if self.magnitudes or self.signed:
                self._hand_on(partial(gradient_tap.product_part, grad, x, rows, columns), height, step)
            if self.sampled is not None and not self.poisoned:
                wanted = self.sampled.rows if rows is None else rows[self.sampled.rows]
                self._hand_rows_on(self.sampled, gradient_tap.product(grad, x, wanted, columns))

    def weight(self, gradient: torch.Tensor) -> None:
        """See `GradientListener.weight`."""
        if not self._wanted():
            return
        step = gradient_tap.part_height(len(gradient))
        with torch.no_grad():
            if self.magnitudes or self.signed:
                self._hand_on(
                    lambda begin, count: gradient[begin : begin + count].to(torch.float32, copy=True), len(gradient), step
                )
            if self.sampled is not None and not self.poisoned:
                self._hand_rows_on(self.sampled, gradient[self.sampled.rows].float())

    def clear(self) -> None:
        """See `Restartable.clear`."""
        self.poisoned = False
        for reducer in self._reducers():
            reducer.clear()

    def to(self, device: torch.device) -> None:
        """See `GradientListener.to`."""
        for reducer in self._reducers():
            reducer.to(device)

    def _reducers(self) -> tuple[Reducer, ...]:
        return (*self.magnitudes, *self.signed, *(() if self.sampled is None else (self.sampled,)))

    def _wanted(self) -> bool:
        """Whether anybody wants the gradient of the backward pass that runs now."""
        if self._passes is not None:
            self._passes.enter()
        return bool(self._reducers()) and not self.poisoned

    def _hand_on(self, part_at: Callable[[int, int], torch.Tensor], height: int, step: int) -> None:
        """A gradient of so many rows, of which `part_at` gives the next `step`; they are ours to overwrite."""
        sums = [self._hand_part_on(part_at(begin, step), begin) for begin in range(0, height, step)]
        self._check(torch.stack(sums))  # once, for on a GPU each look is a wait
        if not self.poisoned:
            for reducer in (*self.magnitudes, *self.signed):
                reducer.end()

    def _hand_part_on(self, part: torch.Tensor, begin: int) -> torch.Tensor:
        """Returns its sum; a function of its own, so that no name holds the part while the next one is computed."""
        total = part.sum()
        for reducer in self.signed:
            reducer.add(part, begin)
        part.abs_()
        for reducer in self.magnitudes:
            reducer.add(part, begin)
        return total

    def _hand_rows_on(self, sampled: SampledScores, part: torch.Tensor) -> None:
        """`part` `[rows, in]` is ours to overwrite."""
        self._check(part.sum())
        if not self.poisoned:
            sampled.add_rows(part.abs_())

    def _check(self, sums: torch.Tensor) -> None:
        if not bool(sums.isfinite().all()):
            self.clear()
            self.poisoned = True
