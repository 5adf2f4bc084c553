"""Operators that move entries and compute nothing: they run on the residues as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from padst_compile.equivalence.field import PRIME
from padst_compile.equivalence.registry import Setting, definition, primitive
from padst_compile.equivalence.residues import Residues

MOVEMENT = frozenset(
    f"aten::{name}"
    for name in (
        "_reshape_alias", "_unsafe_view", "alias", "as_strided", "clone", "detach", "diag_embed", "diagonal", "embedding",
        "expand", "flip", "gather", "index_copy", "index_select", "lift_fresh", "permute", "pixel_shuffle",
        "pixel_unshuffle", "repeat", "repeat_interleave", "roll", "rot90", "select", "select_scatter", "slice",
        "slice_scatter", "split", "split_with_sizes", "squeeze", "t", "take", "transpose", "tril", "triu", "unbind", "unfold",
        "unsqueeze", "view",
    )
)  # fmt: skip
# On truth values: the operator itself.
LOGIC = frozenset(
    f"aten::{name}"
    for name in ("all", "any", "bitwise_and", "bitwise_not", "bitwise_or", "bitwise_xor", "logical_and", "logical_not",
                 "logical_or", "logical_xor")
)  # fmt: skip


@primitive("cat")
def _cat(of: Setting, tensors: Sequence[Any], dim: int = 0) -> torch.Tensor:
    return torch.cat([of.residues(tensor) for tensor in tensors], dim)


@primitive("stack")
def _stack(of: Setting, tensors: Sequence[Any], dim: int = 0) -> torch.Tensor:
    return torch.stack([of.residues(tensor) for tensor in tensors], dim)


@primitive("where")
def _where(of: Setting, condition: Any, x: Any, y: Any) -> torch.Tensor:
    return torch.where(truth(of, condition), of.residues(x), of.residues(y))


@primitive("masked_fill")
def _masked_fill(of: Setting, x: Any, mask: Any, value: Any) -> torch.Tensor:
    return torch.where(truth(of, mask), of.residues(value), of.residues(x))


@primitive("constant_pad_nd")
def _constant_pad(of: Setting, x: Any, pad: list[int], value: Any = 0) -> torch.Tensor:
    return torch.constant_pad_nd(of.residues(x), pad, int(of.residues(value)))


@primitive("fill")
def _fill(of: Setting, x: Any, value: Any) -> torch.Tensor:
    return torch.zeros_like(of.residues(x)) + of.residues(value)


@primitive("zero")
def _zero(of: Setting, x: Any) -> torch.Tensor:
    return torch.zeros_like(of.residues(x))


@primitive("copy")
def _copy(of: Setting, x: Any, source: Any, non_blocking: bool = False) -> torch.Tensor:
    return of.residues(source).expand(x.shape).clone()


@primitive("index", "_unsafe_index")
def _index(of: Setting, x: Any, indices: Sequence[Any]) -> torch.Tensor:
    picked: torch.Tensor = torch.ops.aten.index(of.residues(x), _known(indices))
    return picked


@primitive("index_put", "_index_put_impl", "_unsafe_index_put")
def _index_put(of: Setting, x: Any, indices: Sequence[Any], values: Any, accumulate: bool = False, *_: Any) -> torch.Tensor:
    changed: torch.Tensor = torch.ops.aten.index_put(of.residues(x), _known(indices), of.residues(values), accumulate)
    return changed.remainder_(PRIME) if accumulate else changed


@primitive("scatter")
def _scatter(of: Setting, x: Any, dim: int, index: Any, source: Any) -> torch.Tensor:
    target = of.residues(x)
    return target.scatter(dim, index, of.residues(source).expand(index.shape) if _is_number(source) else of.residues(source))


@definition("_assert_tensor_metadata")
def _assert_metadata(x: Any, *_: Any, **__: Any) -> None:
    """What export writes down about dtypes and strides says nothing about values."""


@primitive("index_fill")
def _index_fill(of: Setting, x: Any, dim: int, index: Any, value: Any) -> torch.Tensor:
    return of.residues(x).index_fill(dim, index, of.residues(value))


@primitive("_to_copy")
def _to_copy(of: Setting, x: Any, *, device: Any = None, **_: Any) -> torch.Tensor:
    values = truth(of, x) if of.dtype == torch.bool else of.residues(x)
    return values.clone().to(device or of.device)


def truth(of: Setting, x: Any) -> torch.Tensor:
    """A truth value for every entry: itself, or whether it is not zero."""
    if isinstance(x, torch.Tensor) and x.dtype == torch.bool:
        return getattr(x, "content", x)
    return of.residues(x) != 0


def _known(indices: Sequence[Any]) -> Sequence[Any]:
    if any(isinstance(index, Residues) for index in indices):
        raise NotImplementedError("indexing by a mask that depends on the inputs")
    return indices


def _is_number(value: Any) -> bool:
    return not isinstance(value, torch.Tensor) or value.dim() == 0
