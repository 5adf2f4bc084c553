"""Which operators the evaluator knows, by name, and how: filled by the modules beside this one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias, TypeVar

import torch

from padst_compile.equivalence import oracles
from padst_compile.equivalence.field import from_floats, from_number
from padst_compile.equivalence.residues import Residues

Function: TypeAlias = Callable[..., Any]
F = TypeVar("F", bound=Function)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a primitive may know about the call besides its arguments.

    Args:
        seed: of the oracles.
        dtype: outward dtype of the result.
        device: where the result lives.
    """

    seed: int
    dtype: torch.dtype
    device: torch.device

    def residues(self, value: Any) -> torch.Tensor:
        """The residues of an operand: residues, any real tensor, or a number."""
        if isinstance(value, Residues):
            return value.content.long()
        if isinstance(value, torch.Tensor) and not (value.dim() == 0 and value.is_floating_point()):
            return from_floats(value)
        number = value.item() if isinstance(value, torch.Tensor) else value
        return torch.tensor(from_number(number, self.dtype), device=self.device)

    def secret(self, name: str, *attributes: object) -> int:
        """The key of an oracle."""
        return oracles.key(self.seed, name, *attributes)


@dataclasses.dataclass(frozen=True)
class Primitive:
    """An operator on residues.

    Args:
        run: `(setting, *arguments of the operator)` -> int64 residues or bool truth values, or several.
        degree: of the result as a polynomial (or quotient of two) in the operands; see `Verification`.
    """

    run: Function
    degree: int = 1


PRIMITIVES: dict[str, Primitive] = {}
DEFINITIONS: dict[str, Function] = {}


def primitive(*names: str, degree: int = 1) -> Callable[[F], F]:
    """Register a function on int64 residues under names of operators."""

    def register(run: F) -> F:
        PRIMITIVES.update(dict.fromkeys(_full(names), Primitive(run, degree)))
        return run

    return register


def definition(*names: str) -> Callable[[F], F]:
    """Register how operators are defined through others, written with torch functions."""

    def register(run: F) -> F:
        DEFINITIONS.update(dict.fromkeys(_full(names), run))
        return run

    return register


def _full(names: tuple[str, ...]) -> Iterator[str]:
    return (name if "::" in name else f"aten::{name}" for name in names)
