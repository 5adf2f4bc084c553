"""How good a model is, and whether its compiled form is the same model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from padst_compile.backend import padst
from padst_compile.benchmarking.check import Check, check_compiled
from padst_compile.benchmarking.models import ModelCase, first_tensor
from padst_compile.recipes.data import Batch, Data
from padst_compile.tolerance import relative_error

Forward = Callable[[torch.Tensor], Any]


@dataclasses.dataclass(frozen=True)
class Scores:
    """Of a validation set.

    Args:
        loss: mean cross-entropy in nats, of an image or a token.
        accuracy: fraction of images or tokens whose highest logit is the right one.
        examples: images or windows of text.
    """

    loss: float
    accuracy: float
    examples: int


@dataclasses.dataclass(frozen=True)
class CompiledCheck:
    """A trained model beside its compiled form.

    Args:
        eager: scores of the model as it is.
        compiled: scores under `torch.compile(backend="padst")`.
        first: the first batch, compared with a dense float64 model as well.
        error: largest difference of logits in any batch, relative to the largest logit in it.
    """

    eager: Scores
    compiled: Scores
    first: Check
    error: float

    @property
    def passed(self) -> bool:
        """Whether they differ by rounding alone; False for NaN."""
        return self.first.passed and self.error <= 2 * self.first.bound


class _Sums:
    """Scores in the making; sums are in float64, of what is computed batch by batch."""

    def __init__(self) -> None:
        self.loss = self.right = 0.0
        self.examples = self.targets = 0

    def add(self, logits: torch.Tensor, batch: Batch) -> None:
        kept, targets = logits[: batch.count], batch.targets[: batch.count]
        self.loss += cross_entropy(kept, targets, reduction="none").double().sum().item()
        self.right += (kept.argmax(-1) == targets).sum().item()
        self.examples, self.targets = self.examples + batch.count, self.targets + targets.numel()

    def scores(self) -> Scores:
        return Scores(self.loss / self.targets, self.right / self.targets, self.examples)


def cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, *, reduction: str = "mean", label_smoothing: float = 0.0
) -> torch.Tensor:
    """Of logits `[..., classes]` and targets int64 `[...]`, in float32: a number, or for reduction "none" one per target."""
    return F.cross_entropy(
        logits.float().flatten(0, -2), targets.flatten(), reduction=reduction, label_smoothing=label_smoothing
    )


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """The context in which a run with this dtype computes."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


@torch.no_grad()
def evaluate(forward: Forward, data: Data, device: torch.device, dtype: str) -> Scores:
    """Scores of a model, in evaluation mode, on the validation set."""
    sums = _Sums()
    for batch in data.validation_batches():
        moved = batch.to(device)
        with autocast(device, dtype):
            logits = first_tensor(forward(moved.inputs))
        sums.add(logits, moved)
    return sums.scores()


@torch.no_grad()
def check_trained(model: nn.Module, data: Data, device: torch.device, dtype: str) -> CompiledCheck:
    """Score a model as it is and compiled with the backend `padst`, on the same batches, and compare the logits.

    Args:
        model: finalized; it is left in evaluation mode.
        data: the validation set; all its batches have one size, so there is one compilation.
        device: of the model.
        dtype: "float32", or "bfloat16" for autocast.
    """
    model.eval()
    compiled = torch.compile(model, backend=padst, dynamic=False)
    eager_sums, compiled_sums, first, worst = _Sums(), _Sums(), None, 0.0
    for batch in data.validation_batches():
        moved = batch.to(device)
        with autocast(device, dtype):
            found, expected = (first_tensor(forward(moved.inputs)) for forward in (compiled, model))
            if first is None:
                case = ModelCase("", model, (moved.inputs,), {})
                first = check_compiled(case, model, found, torch.float32)  # what autocast rounds shows in the bound
        error = relative_error([found], [expected.double()])
        worst = error if not error <= worst else worst  # keeps a NaN
        eager_sums.add(expected, moved)
        compiled_sums.add(found, moved)
    assert first is not None  # data without validation examples is refused when it is read
    return CompiledCheck(eager_sums.scores(), compiled_sums.scores(), first, worst)
