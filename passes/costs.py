"""cost(fold) ≤ cost(load), cost(store) ≤ cost(separate), for every number of tokens T ≥ 1

What a permutation of n features costs at each call, by where it is put, in bytes of memory traffic that take as long:

    fold       1 + parameters / 1000                                        the parameters' order, made once
    load       n·(table + T·kernel_gather)                                  while a kernel reads its input
    store      n·(table + T·kernel_gather)                                  while a kernel writes its output
    separate   n·(table + T·(2·element + separate_gather)) + dispatch       an op of its own: reads and writes everything

A fold moves nothing when the model runs, but the reordered copy takes memory: as if it were made anew every thousand
calls, and one byte, so that doing nothing wins a tie. Kernels of N:M and diagonal layers find every row through an index
anyway: for them `kernel_gather` is 0. A layer that runs dense has its columns and rows reordered: a fold. On GPUs, where
no permutation has been timed yet, load and store count as much as ops of their own.

The coefficients are those that benchmarks/permute_costs.py measured (benchmarks/results/cpu-permute-costs.json). Costs are
`sympy` expressions, because a graph of dynamic shape has no number of tokens yet.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, TypeAlias, cast, get_args

import sympy

from padst_compile.kernels.formats import has_registered_kernel
from padst_compile.structures import Structure

Kind: TypeAlias = Literal["block", "nm", "diagonal", "unstructured", "registered", "dense"]

TOKENS = sympy.Symbol("T", integer=True, positive=True)
"""Rows of the activations in one call."""

_FOLD = sympy.Integer(1)
_CALLS_PER_COPY = 1000
_TABLE_BYTES = 4  # an int32 index


@dataclasses.dataclass(frozen=True)
class CostModel:
    """What places for a permutation cost, as expressions in `TOKENS`.

    Args:
        element_bytes: of one activation.
        device: type of the device.
        tokens: rows of the activations, a number or an expression in `TOKENS`.
        kernel_gather: bytes in the time that an element takes a block kernel longer when it comes from anywhere.
        separate_gather: the same for `padst::permute` against a copy.
        dispatch: bytes in the time of a call that moves nothing.
    """

    element_bytes: int = 4
    device: str = "cpu"
    tokens: sympy.Expr | int = TOKENS
    kernel_gather: int = 2
    separate_gather: int = 7
    dispatch: int = 150_000

    def fold(self, n: int, parameter_bytes: int = 0) -> sympy.Expr:
        """Parameters of `n` features stored in another order."""
        return _FOLD + parameter_bytes // _CALLS_PER_COPY

    def load(self, n: int, kind: Kind) -> sympy.Expr:
        """`n` features gathered by the kernel of a layer while it reads them."""
        return self._in_kernel(n, kind)

    def store(self, n: int, kind: Kind) -> sympy.Expr:
        """`n` features reordered by the kernel of a layer while it writes them."""
        return self._in_kernel(n, kind)

    def separate(self, n: int) -> sympy.Expr:
        """`n` features permuted by an op of its own."""
        moved = 2 * self.element_bytes + self.separate_gather
        return sympy.expand(n * (_TABLE_BYTES + self.tokens * moved) + self.dispatch)

    def _in_kernel(self, n: int, kind: Kind) -> sympy.Expr:
        if kind in ("dense", "unstructured"):  # no kernel beats dense on unstructured layers, so that they run dense
            return self.fold(n)
        if self.device != "cpu" or kind == "registered":  # not timed; or the op permutes around a kernel that others registered
            return self.separate(n)
        gathered = self.kernel_gather if kind == "block" else 0
        return sympy.expand(n * (_TABLE_BYTES + self.tokens * gathered))


def kind_of(structure: Structure) -> Kind:
    """What a structure is to the model: others' run dense, unless they registered a kernel."""
    if structure.kind in get_args(Kind):
        return cast("Kind", structure.kind)
    return "registered" if has_registered_kernel(structure.kind) else "dense"


def at(cost: sympy.Expr, tokens: int) -> int:
    """A cost in bytes for a number of tokens, rounded up."""
    return int(sympy.ceiling(sympy.sympify(cost).subs(TOKENS, tokens)))


def per_token(cost: sympy.Expr) -> int:
    """By how much a cost grows with each token."""
    return int(sympy.sympify(cost).diff(TOKENS))


def always_cheaper(a: sympy.Expr, b: sympy.Expr) -> bool | None:
    """Whether `a < b` for all T ≥ 1 (True), for none (False), or depending on T or not provably either (None)."""
    beyond_one = sympy.Dummy(integer=True, nonnegative=True)
    difference = sympy.expand((sympy.sympify(a) - b).subs(TOKENS, 1 + beyond_one))
    if difference.is_negative:
        return True
    return False if difference.is_nonnegative else None


def cheaper(a: sympy.Expr, b: sympy.Expr, hint: int) -> bool:
    """Whether `a < b`: for all T ≥ 1 where the difference has one sign, else for the number of tokens `hint`."""
    decided = always_cheaper(a, b)
    return at(a, hint) < at(b, hint) if decided is None else decided
