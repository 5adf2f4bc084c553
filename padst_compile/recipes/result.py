"""What a finished run found."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from padst_compile.recipes.evaluation import CompiledCheck, Scores

_EAGER, _COMPILED = "eager", "compiled"


@dataclasses.dataclass(frozen=True)
class Result:
    """Of a run of `padst train`.

    Args:
        eager: validation scores of the finalized model, loaded from its files.
        compiled: those of the same model under `torch.compile(backend="padst")`.
        logit_error: largest difference between the two in a logit, relative to the largest logit.
        bound: what rounding may make of it.
        passed: whether they differ by rounding alone.
        density: active weights of the sparse layers over those of dense ones.
        parameters: weights of the model, active ones alone in sparse layers.
        steps: of the optimizer.
        seconds: of training, validation and checkpoints.
    """

    eager: Scores
    compiled: Scores
    logit_error: float
    bound: float
    passed: bool
    density: float
    parameters: int
    steps: int
    seconds: float

    @classmethod
    def of(cls, check: CompiledCheck, *, density: float, parameters: int, steps: int, seconds: float) -> Result:
        """From the comparison of the trained model with its compiled form."""
        error, bound = max(check.error, check.first.eager_error), 2 * check.first.bound
        return cls(check.eager, check.compiled, error, bound, check.passed, density, parameters, steps, seconds)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Result:
        """Read the JSON form back.

        Raises:
            TypeError: it is not one.
        """
        scores = {name: Scores(**data[name]) for name in (_EAGER, _COMPILED)}
        return cls(**{**data, **scores})
