"""When the topology is updated, and how much of it."""

from __future__ import annotations

import math

from padst_compile.training.config import DSTConfig


def is_due(step: int, config: DSTConfig, offset: int = 0) -> bool:
    """Whether the topology is updated after the optimizer's `step`-th step, counted from 1.

    Args:
        step: of the optimizer.
        config: of the training.
        offset: steps, fewer than the interval, by which a layer comes later than others.
    """
    if config.method in ("static", "dynadiag") or step < max(1, config.start) or step > config.last_update:
        return False
    return step >= config.interval and (step - offset) % config.interval == 0


def fraction_at(step: int, config: DSTConfig) -> float:
    """The fraction of active units to replace: cosine from `fraction` to 0 at the end (Evci et al. 2020, section 3)."""
    return config.fraction / 2 * (1 + math.cos(math.pi * min(1.0, step / max(1, config.last_update))))


def sparsity_at(step: int, config: DSTConfig, first: float) -> float:
    """The sparsity of gradual pruning from `first` to `final_sparsity`, a cubic (Zhu & Gupta 2017, equation 1)."""
    assert config.final_sparsity is not None  # a configuration with magnitude pruning has it
    span = max(1, config.last_update - config.start)
    done = min(1.0, max(0.0, (step - config.start) / span))
    return config.final_sparsity + (first - config.final_sparsity) * (1 - done) ** 3
