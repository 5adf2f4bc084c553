"""Who hears what a run does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Reporter(Protocol):
    """Hears of a run's progress."""

    def say(self, text: str) -> None:
        """A sentence for the user."""

    def progress(self, step: int, steps: int, numbers: Mapping[str, float]) -> None:
        """`step` of `steps` have been taken; the latest numbers, by the names of the rows of metrics."""


class Silent:
    """Hears nothing; for runs that are part of something else."""

    def say(self, text: str) -> None:
        """Nothing."""

    def progress(self, step: int, steps: int, numbers: Mapping[str, float]) -> None:
        """Nothing."""
