"""One launch that must compile well for a GPU that is not there, and what is expected of its machine code."""

from __future__ import annotations

import dataclasses
from typing import Literal, TypeAlias

from padst_compile.kernels.launch import Problem, Tile
from padst_compile.kernels.triton_limits import ELEMENT_BYTES
from padst_compile.kernels.triton_support import Launch

Target: TypeAlias = Literal["sm_80", "sm_90", "sm_100", "gfx942"]

# A device of each architecture, as `Problem.device` names it.
DEVICES: dict[Target, str] = {
    "sm_80": "sm_80 (8.0)",
    "sm_90": "sm_90 (9.0)",
    "sm_100": "sm_100 (10.0)",
    "gfx942": "gfx942",
}
_WIDE = 16  # bytes that one instruction loads at most
TENSOR_CORES: dict[Target, str] = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}


@dataclasses.dataclass(frozen=True)
class Case:
    """What `offline.py` compiles.

    Args:
        problem: of the launch; its device is one of `DEVICES`.
        tile: one that a tuner may choose for it.
        launch: of meta tensors.
        step_bytes: of shared memory that one stage of the pipeline takes; 0 where there is no pipeline.
        product: the tensor-core instruction that must occur ("mma", "wgmma", "tcgen05", "mfma"), or None.
        wide_loads: whether the operands must be copied 16 bytes at a time, or as whole tiles, without waiting.
        vector_loads: whether inputs must come 16 bytes at a time into registers.
        depth: steps of the loop that shared memory must hold at once; 0 where nothing is claimed.
        carried: whether the loop must carry a tile of 16-bit operands in registers, those of its next step.
        known: what the compiler is told beside the problem, or "".
    """

    problem: Problem
    tile: Tile
    launch: Launch
    step_bytes: int = 0
    product: str | None = None
    wide_loads: bool = False
    vector_loads: bool = False
    depth: int = 0
    carried: bool = False
    known: str = ""

    @property
    def subject(self) -> str:
        """What is computed, device aside."""
        p = self.problem
        parts = [p.kernel, p.structure, f"{p.in_features}->{p.out_features}", f"{p.tokens}t", p.dtype]
        parts += [] if p.precision == "ieee" else [p.precision]
        parts += [f"permuted={p.permuted}"] if p.permuted else []
        parts += [p.epilogue] if p.epilogue else []
        parts += [] if p.layout == "token/token" else [p.layout]
        parts += [self.known] if self.known else []
        return " ".join(parts)

    @property
    def form(self) -> str:
        """How it is cut."""
        t = self.tile
        return f"{t.tokens}x{t.outputs}x{t.depth} warps={t.warps} stages={t.stages} {t.variant}"


def reads_runs_of_tokens(problem: Problem, tile: Tile) -> bool:
    """Whether a program that gathers reads tokens that are adjacent, 16 bytes of them at least."""
    return problem.layout.startswith("feature/") and tile.tokens * ELEMENT_BYTES[problem.dtype] >= _WIDE


def pipeline_depth(problem: Problem, tile: Tile, product: str | None) -> int:
    """Steps of the loop that shared memory holds at once where copies do not wait: `Case.depth`.

    All stages where tensor cores read the operands there, one less where these are in registers before they are multiplied.
    """
    in_place = product in ("wgmma", "tcgen05") and problem.precision != "tf32x3"
    return tile.stages if in_place else tile.stages - 1
