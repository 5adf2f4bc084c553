"""When a learner of permutations acts that does so every so many steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from padst_compile.errors import AttachError
from padst_compile.training.config import DSTConfig, LearnedPermutation
from padst_compile.training.schedule import is_due
from padst_compile.training.trained_layer import TrainedLayer


@dataclasses.dataclass(frozen=True)
class ActingSteps:
    """Halfway through each interval, or at the first step from there on that updates no topology of the layers concerned.

    What has grown must meet the order that it grew for. With the interval of the topology, learner and updates alternate, so
    that weights have settled under a new order, too, before others grow.

    Args:
        interval: of the learner.
        offset: steps by which its layer comes later than others.
        last: the last step that may act.
        config: says when topologies are updated.
        updated: offsets of the layers whose features move.
    """

    interval: int
    offset: int
    last: int
    config: DSTConfig
    updated: tuple[int, ...] = ()

    @property
    def first(self) -> int:
        """The middle of the first interval."""
        return (self.interval // 2 + self.offset) % self.interval or self.interval

    def __contains__(self, step: int) -> bool:
        middle = step - (step - self.first) % self.interval  # what an earlier one puts off until this step, this one does, too
        return self.first <= middle and step <= self.last and self._free(middle, step) == step

    def __iter__(self) -> Iterator[int]:
        acting: int | None = 0
        for middle in range(self.first, self.last + 1, self.interval):
            if acting is not None and middle > acting:  # or the one before was put off so far that they are one
                acting = self._free(middle, self.last)
                if acting is not None:
                    yield acting

    def _free(self, begin: int, end: int) -> int | None:
        """The first step from `begin` to `end` that updates no topology."""
        steps = range(begin, end + 1)
        return next((step for step in steps if not any(is_due(step, self.config, offset) for offset in self.updated)), None)


def acting_steps(
    layers: Sequence[TrainedLayer], config: DSTConfig, method: LearnedPermutation, last: int, end: str
) -> ActingSteps:
    """The steps at which a learner with an interval acts on these layers, `last` at the latest, which `end` decides.

    Raises:
        AttachError: there are none.
    """
    interval, first = method.interval or config.interval, layers[0]
    acting = ActingSteps(interval, first.offset, last, config, tuple({trained.offset for trained in layers}))
    if next(iter(acting), None) is None:
        raise AttachError(
            f"the permutation of layer {first.name!r} would never learn: {method.method!r} first acts at step {acting.first}, "
            f"or the next one without a topology update, and {end} ends it at step {last}; give LearnedPermutation a shorter "
            f"interval than {interval}, a later end, or the topology a longer interval than {config.interval}"
        )
    return acting
