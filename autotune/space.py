"""The search space: what can run a layer, with which tiles, and which of them are worth a measurement.

A layer is a choice between kernels, dense among them always. Each launch of a kernel is a choice between tiles. The same
types serve CPU and GPU; what a kernel can be launched with, it says itself.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from typing import TypeAlias

from padst_compile.autotune.machine import Machine
from padst_compile.kernels.launch import Problem, Tile

_THREADS_PER_WARP = 32


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to run a problem.

    Args:
        kernel: what runs it: of a layer, one of `problem.Kernel`; of a launch, the launched kernel's name.
        tile: what its first launch is cut into; None for the kernel's default, or where there is none.
    """

    kernel: str
    tile: Tile | None = None

    def __str__(self) -> str:
        return self.kernel if self.tile is None else f"{self.kernel} {describe_tile(self.tile)}"


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a compiler says about a kernel with one tile.

    Args:
        shared_bytes: shared memory of one program.
        registers: of one thread.
        spilled_bytes: registers that had to go to memory, of one thread.
    """

    shared_bytes: int
    registers: int
    spilled_bytes: int


FactsOf: TypeAlias = Callable[[Problem, Tile], "Facts | None"]
"""Compiles a launch and looks at the result, or None where nothing is known: on the CPU always."""


def no_facts(problem: Problem, tile: Tile) -> Facts | None:
    """Where no compiler can be asked."""
    return None


def tiles_of(problem: Problem) -> tuple[Tile, ...]:
    """All tiles that a launch can be cut into, each once, the default first: what the kernel's module `tiles` says."""
    folder = problem.kernel.partition("_")[0]
    module = importlib.import_module(f"padst_compile.kernels.{folder}.tiles")
    return tuple(dict.fromkeys([module.default_tile(problem), *module.tiles(problem)]))


def why_not(facts: Facts, machine: Machine, tile: Tile) -> str | None:
    """Why a tile is not worth a measurement, by what was compiled; None where nothing speaks against it."""
    if facts.spilled_bytes:
        return f"{facts.spilled_bytes} bytes of registers spill"
    if facts.shared_bytes > machine.shared_bytes:
        return f"{facts.shared_bytes} bytes of shared memory, {machine.shared_bytes} are there"
    registers = facts.registers * tile.warps * _THREADS_PER_WARP
    if registers > machine.registers:
        return f"{registers} registers, {machine.registers} are there"
    return None


def without_waste(problem: Problem, tiles: Sequence[Tile]) -> list[Tile]:
    """The tiles that hold fewer tokens than there are, and the smallest of those that hold them all."""
    enough = min((tile.tokens for tile in tiles if tile.tokens >= problem.tokens), default=problem.tokens)
    return [tile for tile in tiles if tile.tokens <= enough]


def is_algorithm(tile: Tile) -> bool:
    """Whether a tile names an algorithm of a library, which has no size to rank it by."""
    return not (tile.tokens or tile.outputs or tile.depth) and tile.variant != Tile.variant


def describe_tile(tile: Tile) -> str:
    """A tile in a few characters, as tables show it: what it leaves to the kernel is left out."""
    size = "x".join(str(n) for n in (tile.tokens, tile.outputs, tile.depth) if n)
    if is_algorithm(tile):
        return tile.variant
    if not tile.outputs:
        return f"{size} tokens" if size else "default"
    return f"{size} warps={tile.warps} stages={tile.stages} group={tile.group} {tile.variant}"
