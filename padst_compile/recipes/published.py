"""Published recipes (`padst_compile.presets`) by name, with a structure in short form."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from padst_compile.errors import TrainingConfigError, UnknownFieldError
from padst_compile.structures import NM, Block, Diagonal, Structure, parse
from padst_compile.training import presets
from padst_compile.training.presets import Recipe

_SPARSITY = 0.9


@dataclasses.dataclass(frozen=True)
class _Published:
    """A recipe with the structure that it has where none is named."""

    structure: str
    make: Callable[[str, Structure, float | None, int, int], Recipe]


def _pa_dst(name: str, structure: Structure, sparsity: float | None, steps: int, seed: int) -> Recipe:
    wanted = _SPARSITY if sparsity is None and structure.natural_sparsity() is None else sparsity
    return presets.pa_dst(structure, wanted, total_steps=steps, seed=seed)


def _srigl(name: str, structure: Structure, sparsity: float | None, steps: int, seed: int) -> Recipe:
    if not isinstance(structure, NM) or structure.vector != 1 or sparsity is not None:
        raise TrainingConfigError(
            f"preset {name!r} is for nm:N:M, which has a sparsity of its own, got {_named(structure, sparsity)}"
        )
    return presets.srigl(structure.n, structure.m, total_steps=steps, seed=seed)


def _dsb(name: str, structure: Structure, sparsity: float | None, steps: int, seed: int) -> Recipe:
    return presets.dsb(_size(name, structure), _SPARSITY if sparsity is None else sparsity, total_steps=steps, seed=seed)


def _structured_dynsparse(name: str, structure: Structure, sparsity: float | None, steps: int, seed: int) -> Recipe:
    wanted = _SPARSITY if sparsity is None else sparsity
    return presets.structured_dynsparse(_size(name, structure), wanted, total_steps=steps, seed=seed)


def _dynadiag(name: str, structure: Structure, sparsity: float | None, steps: int, seed: int) -> Recipe:
    if structure != Diagonal():
        raise TrainingConfigError(f"preset {name!r} is for diagonals, got {structure.to_string()}; leave the structure out")
    return presets.dynadiag(_SPARSITY if sparsity is None else sparsity, total_steps=steps, seed=seed)


_PUBLISHED = {
    "pa_dst": _Published("block:16", _pa_dst),
    "srigl": _Published("nm:1:10", _srigl),
    "dsb": _Published("block:16", _dsb),
    "structured_dynsparse": _Published("block:16", _structured_dynsparse),
    "dynadiag": _Published("diagonal", _dynadiag),
}
PRESETS = tuple(_PUBLISHED)


def published(name: str, structure: str | None = None, sparsity: float | None = None, *, steps: int, seed: int) -> Recipe:
    """A recipe of `padst_compile.presets`.

    Args:
        name: one of `PRESETS`.
        structure: as on the command line; None for the one that the recipe is mostly used with.
        sparsity: of the trained model; None for 0.9, or what the structure fixes.
        steps: of the training.
        seed: of every random choice.

    Raises:
        UnknownFieldError: there is no such recipe.
        SpecError: a structure that does not exist, or a sparsity that makes no sense.
        TrainingConfigError: the recipe is for other structures.
    """
    if name not in _PUBLISHED:
        raise UnknownFieldError("preset", name, PRESETS)
    recipe = _PUBLISHED[name]
    return recipe.make(name, parse(recipe.structure if structure is None else structure), sparsity, steps, seed)


def _size(name: str, structure: Structure) -> int:
    if not isinstance(structure, Block) or structure.rows != structure.columns:
        raise TrainingConfigError(f"preset {name!r} is for square blocks, for example block:16, got {structure.to_string()}")
    return structure.rows


def _named(structure: Structure, sparsity: float | None) -> str:
    return structure.to_string() + ("" if sparsity is None else f" at sparsity {sparsity:g}")
