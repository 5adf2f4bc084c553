"""How each structure multiplies with plain ATen: the path that is always there, on every device and dtype.

The base class goes through the dense weight, which is right for every structure; a structure that ATen can multiply
without its zeros overrides it in its own folder. Native kernels, where they exist, are chosen in `dispatch.py`.
"""

from __future__ import annotations

from typing import Generic, TypeVar

import torch

from padst_compile import registered
from padst_compile.errors import NameTakenError, RegistrationError, UnknownFieldError
from padst_compile.structures import STRUCTURES, Shape, Structure, Topology

S = TypeVar("S", bound=Structure)


class Format(Generic[S]):
    """Products of `S` [out, in] with token-major activations, all in two dimensions.

    A subclass that `register_kernel` is given overrides `forward`, and gradients as far as it has kernels for them.
    """

    def supports(self, structure: S, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether it multiplies this structure there; asked of registered kernels alone, once for each product."""
        return True

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


_REGISTERED: dict[str, Format[Structure]] = {}


def register_kernel(kind: str, kernel: Format[S]) -> None:
    """Let a kernel of your own multiply a structure wherever it says that it can, before this package's own kernels.

    Permutations and bias are applied around it. The compiler measures it against the dense product, as any other.

    Args:
        kind: of the structure, as in `"block"`; registered, or this package's own.
        kernel: an object of a subclass of `padst_compile.kernels.formats.Format`.

    Raises:
        UnknownFieldError: no structure has this name.
        NameTakenError: another kernel is registered for it. The same class defined again replaces itself.
        RegistrationError: no `Format`, or one that does not override `forward`.
    """
    if kind not in STRUCTURES:
        raise UnknownFieldError("structure", str(kind), STRUCTURES)
    if not isinstance(kernel, Format) or type(kernel).forward is Format.forward:
        raise RegistrationError(
            f"the kernel of {kind!r} must be an object of a subclass of padst_compile.kernels.formats.Format that overrides "
            f"forward, got {kernel!r}"
        )
    known = _REGISTERED.get(kind)
    if known is not None and not registered.same_origin(type(known), type(kernel)):
        raise NameTakenError(f"structure {kind!r} has a kernel already, {type(known)!r}; let one call the other")
    _REGISTERED[kind] = kernel  # type: ignore[assignment]  # looked up by the same structure's kind
    registered.record("kernel", kind, type(kernel))


def has_registered_kernel(kind: str) -> bool:
    """Whether somebody registered a kernel for the structures of this name."""
    return kind in _REGISTERED


def registered_kernel(structure: Structure, device: torch.device, dtype: torch.dtype) -> Format[Structure] | None:
    """The kernel that somebody registered for this structure, if it multiplies it here."""
    kernel = _REGISTERED.get(structure.kind)
    return kernel if kernel is not None and kernel.supports(structure, device, dtype) else None


_FORMATS: dict[str, Format[Structure]] = {}
_DENSE: Format[Structure] = Format()


def register_format(kind: str, chosen: Format[S]) -> None:
    """Use `chosen` for the structure named `kind`."""
    _FORMATS[kind] = chosen  # type: ignore[assignment]  # looked up by the same structure's kind


def format_of(structure: Structure) -> Format[Structure]:
    """The ATen path of a structure."""
    return _FORMATS.get(structure.kind, _DENSE)
