"""A compiled graph with constants made from parameters, and the check that keeps them true.

Inference may use parameters at compile time: reordered weights, composed index tables, the knowledge that two
permutations cancel. Every call checks the few tensors that were used: by identity and version counter, small ones on a CPU
by content too. A changed value makes the constants anew, in place; a changed permutation that a rewrite relied on gives the
program up for one that relies on nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from padst_compile.kernels.tensor_state import TensorState

Constants = Callable[[Sequence[Any]], list[torch.Tensor]]


@dataclasses.dataclass
class Program:
    """One compiled graph, its constants, and what they were made from.

    Args:
        compiled: takes the arguments, then the constants.
        watched: positions of the arguments whose values the program depends on.
        prepare: makes the constants from the arguments.
        constants: the present constants.
        relied_on: computes from the arguments the tensors that rewrites relied on.
        expected: those tensors when the program was made.
        attributes: tensors that the graph holds itself and that the program depends on.
    """

    compiled: Callable[..., Any]
    watched: tuple[int, ...]
    prepare: Constants
    constants: list[torch.Tensor]
    relied_on: Constants
    expected: list[torch.Tensor]
    attributes: tuple[torch.Tensor, ...] = ()

    def refresh(self, args: Sequence[Any]) -> bool:
        """Bring the constants up to date; False if the program does not hold for these arguments any more."""
        if not all(torch.equal(now, then) for now, then in zip(self.relied_on(args), self.expected, strict=True)):
            return False
        renewed = self.prepare(args)
        if any(new.shape != old.shape or new.dtype != old.dtype for new, old in zip(renewed, self.constants, strict=True)):
            return False
        for old, new in zip(self.constants, renewed, strict=True):
            old.copy_(new)
        return True


class Specialization:
    """Runs a program as long as it holds, and a general one afterwards.

    Args:
        program: made for `args`.
        args: the present arguments, in the order of the captured graph's inputs.
        general: makes a callable for the same arguments that relies on no value.
    """

    def __init__(self, program: Program, args: Sequence[Any], general: Callable[[], Callable[..., Any]]) -> None:
        self._program: Program | None = program
        self._make_general = general
        self._general: Callable[..., Any] | None = None
        self._remember(program, args)

    def __call__(self, *args: Any) -> Any:
        """Run on arguments in the order of the captured graph's inputs."""
        program = self._program
        if program is not None and self._changed(program, args):
            program = self._refresh(program, args)
        if program is not None:
            return program.compiled(*args, *program.constants)
        assert self._general is not None  # made when the program was given up
        return self._general(*args)

    def _remember(self, program: Program, args: Sequence[Any]) -> None:
        self._seen = [_Seen(tensor) for tensor in _watched(program, args)]

    def _changed(self, program: Program, args: Sequence[Any]) -> bool:
        return not all(seen.holds(tensor) for seen, tensor in zip(self._seen, _watched(program, args), strict=True))

    def _refresh(self, program: Program, args: Sequence[Any]) -> Program | None:
        if program.refresh(args):
            self._remember(program, args)
            return program
        self._general = self._make_general()
        self._program = None  # last: another thread that finds none runs the general one
        return None


# Tensors up to this size are compared by content as well: index tables, biases and norm weights, in about a microsecond. Not
# on other devices: each comparison would be a kernel that the host waits for, and that no CUDA graph can capture.
_COMPARED_BYTES = 1 << 16


class _Seen:
    """A tensor as it was when constants were made from it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor, self._state = tensor, TensorState(tensor)
        compared = tensor.device.type == "cpu" and tensor.numel() * tensor.element_size() <= _COMPARED_BYTES
        self._content = tensor.detach().clone() if compared else None

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` is the same, with the same content: for a large tensor or a device, as far as autograd can tell."""
        if tensor is not self._tensor or not self._state.holds(tensor):
            return False
        return self._content is None or torch.equal(tensor, self._content)


def _watched(program: Program, args: Sequence[Any]) -> list[torch.Tensor]:
    return [*(args[i] for i in program.watched), *program.attributes]
