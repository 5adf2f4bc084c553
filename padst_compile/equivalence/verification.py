"""`verify`: whether two modules compute the same function, by running both on random numbers modulo a prime."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch._dynamo import OptimizedModule
from torch.utils import _pytree as pytree

from padst_compile.equivalence.assignment import Assignment
from padst_compile.equivalence.comparison import Difference, first_difference, leaves
from padst_compile.equivalence.evaluator import Evaluator, memory
from padst_compile.equivalence.field import PRIME
from padst_compile.equivalence.substitution import named_tensors, substituted
from padst_compile.errors import NotEquivalentError, VerificationInputError


@dataclasses.dataclass(frozen=True)
class Verification:
    """What `verify` found; true if the modules are equal.

    Attributes:
        equal: whether all outputs agreed under every seed. A difference that was found is certain.
        seeds: the seeds that ran.
        first_difference: where the outputs differ, or None.
        false_accept_bound: how likely modules that differ pass all the same: per seed, the degrees of all operations that
            ran, added up, over the prime. See `verify` for what it assumes.
        seconds: how long it took.
    """

    equal: bool
    seeds: tuple[int, ...]
    first_difference: Difference | None
    false_accept_bound: float
    seconds: float

    def __bool__(self) -> bool:
        return self.equal

    def __str__(self) -> str:
        seeds = f"{len(self.seeds)} seed{'s' if len(self.seeds) != 1 else ''}"
        if self.equal:
            chance = f"a false 'equal' has a chance of about {self.false_accept_bound:.1g}"
            return f"equal under {seeds} in {self.seconds:.1f} s; {chance}"
        return f"different: {self.first_difference}; found under {seeds} in {self.seconds:.1f} s"

    def raise_if_different(self) -> None:
        """Raise unless equal.

        Raises:
            NotEquivalentError: the modules differ.
        """
        if self.first_difference is not None:
            raise NotEquivalentError(str(self.first_difference))


def verify(
    before: nn.Module,
    after: nn.Module,
    *inputs: Any,
    kwargs: Mapping[str, Any] | None = None,
    seeds: Sequence[int] = (0, 1),
    weights: Literal["any", "present"] = "any",
) -> Verification:
    """Check that two modules compute the same function, exactly and without tolerances.

        dense = padst.densify(copy.deepcopy(sparse))
        assert padst.verify(sparse, dense, torch.empty(1, 3, 224, 224))

    Both run once per seed on integers modulo 2**31 - 1. Arithmetic is exact there, so that no rounding tells apart what the
    order of a sum does not, and every other function (exp, erf, sqrt, …) answers each argument with a number of its own, the
    same in both modules. Functions that are defined through others (softmax, GELU, norms, attention) follow their definition.

    Two different polynomials of degree d agree at a random point with a chance of at most d / p (Schwartz, Zippel), and two
    arguments of a pseudo-random function collide with 1 / p. A difference that arises somewhere must vanish at one of the
    operations behind it to stay unseen: `false_accept_bound` adds up the degrees of all of them. It neglects that an argument
    could also collide with one of the many at other entries, such that several differences cancel, and it takes no credit for
    the other output entries that would all have to agree. It holds for differences that depend on a random number: of an
    input or of shared weights. A comparison (`x > 0`) has two answers only, so a difference that only comparisons see is missed
    with a chance of 1/2 for every entry.

    Args:
        before: a module or graph module; left as it is, buffers included.
        after: the other one.
        inputs: what both are called with. Floating tensors lend their shapes and dtypes alone; integers are used as they are.
        kwargs: keyword arguments of the call.
        seeds: each one runs both modules with other random numbers.
        weights: "any" gives random residues to the floating parameters and buffers that both share (the same memory, or the
            same name and content), and so asks about all weights; "present" maps all of them by value.

    Returns:
        The verdict; true if equal.

    Raises:
        RandomOperationError: a module draws random numbers; call `.eval()` on it.
        DataDependentError: a module branches on computed values, or sorts by them.
        UnsupportedOperationError: an operator on computed values that is not known.
        VerificationInputError: no modules, compiled ones, or no seeds.
    """
    _check(before, after, seeds, weights)
    start = time.perf_counter()
    call = _Call(tuple(inputs), dict(kwargs or {}))
    assignment = Assignment(named_tensors(before), named_tensors(after), call.tensors(), by_value=weights == "present")
    degree, difference, used = 0, None, list[int]()
    for seed in seeds:
        used.append(seed)
        (left, left_degree), (right, right_degree) = (_run(module, call, assignment, seed) for module in (before, after))
        degree = max(degree, left_degree, right_degree)
        difference = first_difference(left, right)
        if difference is not None:
            break
    bound = min(1.0, degree / PRIME) ** len(used) if difference is None else 0.0
    return Verification(difference is None, tuple(used), difference, bound, time.perf_counter() - start)


@dataclasses.dataclass(frozen=True)
class _Call:
    """The arguments of a module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def tensors(self) -> list[torch.Tensor]:
        return [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, torch.Tensor)]

    def map(self, replacement: Callable[[torch.Tensor], torch.Tensor]) -> _Call:
        return _Call(*pytree.tree_map_only(torch.Tensor, replacement, (self.args, self.kwargs)))


def _run(module: nn.Module, call: _Call, assignment: Assignment, seed: int) -> tuple[dict[str, Any], int]:
    """The outputs of a module by path, what it wrote to its inputs and buffers among them, and the degrees of what ran."""
    evaluator = Evaluator(seed, {id(part): name for name, part in module.named_modules() if name})

    def residues(tensor: torch.Tensor) -> torch.Tensor:
        return assignment.residues(tensor, seed)

    given = call.map(residues)
    with substituted(module, residues), _below_autograd(), evaluator:
        results = module(*given.args, **given.kwargs)
        tensors = {f" written to input {number}": tensor for number, tensor in enumerate(given.tensors())}
        tensors |= {f" written to {name}": tensor for name, tensor in named_tensors(module).items()}
    written = {name: tensor for name, tensor in tensors.items() if memory(tensor) in evaluator.written}
    return leaves(results) | written, evaluator.degree


@contextlib.contextmanager
def _below_autograd() -> Any:
    """Operators arrive whole instead of in the parts that autograd knows, and no fused kernel is called behind our back."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def _check(before: object, after: object, seeds: Sequence[int], weights: str) -> None:
    for module in (before, after):
        if not isinstance(module, nn.Module):
            raise VerificationInputError(f"verify compares two nn.Modules, got {type(module).__name__}; wrap it in a module")
        if isinstance(module, OptimizedModule):
            raise VerificationInputError(
                "verify would run a compiled module uncompiled; compile with options={'verify': True} to verify the passes"
            )
    if len(seeds) == 0:
        raise VerificationInputError("verify needs at least one seed, as in seeds=(0, 1)")
    if weights not in ("any", "present"):
        raise VerificationInputError(f"weights is 'any' or 'present', got {weights!r}")
