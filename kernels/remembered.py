"""What follows from index tensors alone, made when they change and not at every call.

The inverse of a permutation or the lists of S.T take several small kernels, each of which costs a GPU about as much as a small
product. They are kept beside the tensors that they were made of, as long as those live, and made anew after any change that
PyTorch counts. Nothing is kept

- where no Triton kernels run: C++ kernels read permutations and index tensors themselves;
- of tensors made in inference mode, which count no changes, and of wrappers, such as those that a compiler traces with;
- while something records the operations, which would take what was kept for a constant;
- on other CUDA streams than the default one. What is kept would have to wait for the stream that made it, and CUDA graphs are
  captured there, warm-up included: a graph must read index tensors each time it is replayed.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Hashable, MutableMapping, Sequence
from typing import Any, TypeVar

import torch
from torch.utils.weak import WeakIdKeyDictionary

from padst_compile import permutation
from padst_compile.kernels import triton_support
from padst_compile.kernels.tensor_state import TensorState

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class _Kept:
    """A result, and the tensors that it was made of as they were; the first of them is the key that it is kept under."""

    states: tuple[TensorState, ...]
    others: tuple[weakref.ref[torch.Tensor], ...]
    result: Any

    def holds(self, tensors: Sequence[torch.Tensor]) -> bool:
        same = all(other() is tensor for other, tensor in zip(self.others, tensors[1:], strict=True))
        return same and all(state.holds(tensor) for state, tensor in zip(self.states, tensors, strict=True))


_kept: MutableMapping[torch.Tensor, dict[Hashable, _Kept]] = WeakIdKeyDictionary()


def remembered(what: Hashable, tensors: Sequence[torch.Tensor], make: Callable[[], T]) -> T:
    """`make()`, or what it returned when it was last called for the same, unchanged `tensors`.

    Args:
        what: tells results of the same tensors apart: a function and its other arguments.
        tensors: all that the result depends on besides.
        make: makes the result, which nobody may write to and which must not hold one of `tensors`.
    """
    if not all(map(_may_be_remembered, tensors)) or torch._C._len_torch_dispatch_stack():
        return make()
    results = _kept.get(tensors[0])
    known = None if results is None else results.get(what)
    if known is None or not known.holds(tensors):
        states, others = tuple(map(TensorState, tensors)), tuple(map(weakref.ref, tensors[1:]))
        known = _Kept(states, others, make())
        _kept.setdefault(tensors[0], {})[what] = known
    result: T = known.result
    return result


def inverse(indices: torch.Tensor) -> torch.Tensor:
    """`permutation.inverse`, remembered."""
    return remembered(permutation.inverse, (indices,), lambda: permutation.inverse(indices))


def compose(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """`permutation.compose`, remembered."""
    return remembered(permutation.compose, (first, second), lambda: permutation.compose(first, second))


def _may_be_remembered(tensor: torch.Tensor) -> bool:
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and not tensor.is_inference()
    return plain and triton_support.usable(tensor.device, torch.float32) and _on_default_stream(tensor.device)


def _on_default_stream(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.current_stream(device) == torch.cuda.default_stream(device)
