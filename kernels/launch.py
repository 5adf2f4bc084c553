"""What a tuned kernel is launched with, for which problem, and who decides it.

A kernel asks `tile_for(problem)`. The answer comes from the chooser that the autotuner registers, or, without one, from the
kernel's own default. Kernels stand before the autotuner in the order of imports, so they know it by this function alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeAlias


@dataclasses.dataclass(frozen=True)
class Problem:
    """All that the speed of one kernel launch depends on, weights aside.

    Args:
        kernel: the kernel's name, as in `block_forward`.
        structure: short form of the structure.
        in_features: columns of S.
        out_features: rows of S.
        active: stored values of S.
        tokens: rows of the activations, as a power of two.
        dtype: of activations and values, as in `bfloat16`.
        precision: how float32 is multiplied ("ieee", "tf32", "tf32x3"); "ieee" for other dtypes.
        permuted: which index tables are applied ("", "in", "out", "in+out").
        epilogue: what follows the sums ("", or any of "bias", an activation, "gate" and "residual", joined with "+").
        layout: order of the activations in memory, of inputs and of outputs: "token/token", "feature/token", ….
        device: name and capability of the device.
    """

    kernel: str
    structure: str
    in_features: int
    out_features: int
    active: int
    tokens: int
    dtype: str
    precision: str = "ieee"
    permuted: str = ""
    epilogue: str = ""
    layout: str = "token/token"
    device: str = ""


@dataclasses.dataclass(frozen=True)
class Tile:
    """How a kernel cuts its work. A kernel ignores what it has no use for.

    Args:
        tokens: tokens of one program.
        outputs: outputs of one program.
        depth: inputs of one step of its loop.
        group: programs along the tokens that run next to each other, to share what they read (`GROUP_M`).
        warps: of 32 threads, per program.
        stages: steps of the loop that are in flight at once.
        variant: which of the kernel's forms, as in "pointer", "joined" or "descriptor" (TMA).
    """

    tokens: int
    outputs: int
    depth: int
    group: int = 8
    warps: int = 4
    stages: int = 3
    variant: str = "pointer"


Chooser: TypeAlias = Callable[[Problem], "Tile | None"]

_chooser: list[Chooser] = []


def set_chooser(chooser: Chooser | None) -> None:
    """Ask `chooser` from now on; None asks nobody."""
    _chooser[:] = [] if chooser is None else [chooser]


def tile_for(problem: Problem, default: Callable[[Problem], Tile]) -> Tile:
    """The tile to launch `problem` with: the chooser's, or `default(problem)` where it has none."""
    chosen = _chooser[0](problem) if _chooser else None
    return default(problem) if chosen is None else chosen
