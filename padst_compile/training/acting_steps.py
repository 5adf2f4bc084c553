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
        if not self.first <= step <= self.last or self._is_taken(step):
            return False
        begin = step  # of the steps that would put off until this one
        while begin > self.first and self._is_taken(begin - 1):
            begin -= 1
        return (step - self.first) % self.interval <= step - begin

    def __iter__(self) -> Iterator[int]:
        acting = 0
        for middle in range(self.first, self.last + 1, self.interval):
            if middle <= acting:  # put off so far that it is one with the next
                continue
            acting = next((step for step in range(middle, self.last + 1) if not self._is_taken(step)), self.last + 1)
            if acting <= self.last:
                yield acting

    def _is_taken(self, step: int) -> bool:
        return any(is_due(step, self.config, offset) for offset in self.updated)


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
