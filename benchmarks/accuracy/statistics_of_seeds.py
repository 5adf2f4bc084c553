"""What a handful of seeds says: means, intervals, and differences between methods on the same seeds."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

_LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean with half the width of its 95 % confidence interval (Student's t); infinite for a single value."""

    mean: float
    half_width: float
    count: int

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside the interval."""
        return abs(self.mean) > self.half_width


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and interval of `values`, at least one."""
    from scipy.stats import t

    count = len(values)
    if count < 2:
        return Estimate(values[0], math.inf, count)
    spread = statistics.stdev(values) / math.sqrt(count)
    return Estimate(statistics.mean(values), float(t.ppf((1 + _LEVEL) / 2, count - 1)) * spread, count)


def paired(one: Mapping[int, float], other: Mapping[int, float]) -> Estimate | None:
    """The mean of `one - other` over the seeds that both have, with its interval; None if they share none."""
    shared = sorted(one.keys() & other.keys())
    return estimate([one[seed] - other[seed] for seed in shared]) if shared else None


def separates(dense: Sequence[float], structured: Sequence[float], *, lower_is_better: bool) -> bool:
    """Whether a task can tell: dense is better than fixed structured sparsity by more than the wider interval, twice."""
    first, second = estimate(dense), estimate(structured)
    lead = (second.mean - first.mean) if lower_is_better else (first.mean - second.mean)
    return lead > 2 * max(first.half_width, second.half_width)
