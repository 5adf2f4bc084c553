"""How each structure multiplies with plain ATen: the path that is always there, on every device and dtype.

The base class goes through the dense weight, which is right for every structure; a structure that ATen can multiply
without its zeros overrides it in its own folder. Native kernels, where they exist, are chosen in `dispatch.py`.
"""

from __future__ import annotations

from typing import Generic, TypeVar

import torch

from padst_compile.structures import Shape, Structure, Topology

S = TypeVar("S", bound=Structure)


class Format(Generic[S]):
    """Products of `S` [out, in] with token-major activations, all in two dimensions."""

    def forward(
        self, structure: S, x: torch.Tensor, values: torch.Tensor, topology: Topology, out_features: int
    ) -> torch.Tensor:
        """`x` [tokens, in] -> `x @ S.T` [tokens, out]."""
        return x @ structure.unpack(values, topology, Shape(out_features, x.shape[1])).T

    def input_gradient(
        self, structure: S, grad: torch.Tensor, values: torch.Tensor, topology: Topology, in_features: int
    ) -> torch.Tensor:
        """`grad` [tokens, out] -> `grad @ S` [tokens, in]."""
        return grad @ structure.unpack(values, topology, Shape(grad.shape[1], in_features))

    def value_gradient(
        self, structure: S, grad: torch.Tensor, x: torch.Tensor, values: torch.Tensor, topology: Topology
    ) -> torch.Tensor:
        """The entries of `grad.T @ x` at the active positions, in the shape and dtype of `values`."""
        return structure.pack(grad.T @ x, topology).to(values.dtype)


_FORMATS: dict[str, Format[Structure]] = {}
_DENSE: Format[Structure] = Format()


def register_format(kind: str, chosen: Format[S]) -> None:
    """Use `chosen` for the structure named `kind`."""
    _FORMATS[kind] = chosen  # type: ignore[assignment]  # looked up by the same structure's kind


def format_of(structure: Structure) -> Format[Structure]:
    """The ATen path of a structure."""
    return _FORMATS.get(structure.kind, _DENSE)
