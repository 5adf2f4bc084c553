"""`options={"verify": True}`: verifies every pass by the graphs before and after it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensor

from padst_compile.equivalence.reproduction import write_reproduction
from padst_compile.equivalence.verification import verify
from padst_compile.errors import WrongPassError


class PassCheck:
    """What a `Pipeline` calls after each pass that changed a graph.

    Args:
        inputs: example inputs of the graph, parameters among them. Floating ones get random residues, so that a pass is right
            for all weights or wrong; integers are used as they are.
        folder: where scripts that reproduce a failure go; a temporary one by default.
    """

    def __init__(self, inputs: Sequence[Any], folder: Path | None = None) -> None:
        self._inputs = [_concrete(value) for value in inputs]
        self._folder = folder

    def __call__(self, name: str, before: fx.GraphModule, after: fx.GraphModule) -> None:
        """Compare two graphs.

        Raises:
            WrongPassError: they differ; the message names the pass and a script that reproduces it.
            UnsupportedOperationError: the graph holds something that cannot be verified.
        """
        found = verify(before, after, *self._inputs)
        if not found:
            script = write_reproduction(name, before, after, self._inputs, self._folder)
            raise WrongPassError(name, str(found.first_difference), str(script))


def _concrete(value: Any) -> Any:
    """A value to run with: what capture saw of a symbolic size, and zeros for integers that it did not see."""
    if isinstance(value, torch.SymInt):
        hint: Any = value.node.hint
        return int(hint)
    if isinstance(value, FakeTensor):
        return torch.zeros([_concrete(size) for size in value.shape], dtype=value.dtype, device=value.device)
    return value
