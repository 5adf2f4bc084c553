"""A tensor that looks floating to a model and holds residues."""

from __future__ import annotations

from typing import Any, NoReturn

import torch


class Residues(torch.Tensor):
    """Outwardly a tensor of `dtype`; inwardly int64 residues, or truth values where `dtype` is bool.

    It knows no operations: they are the `Evaluator`'s. Views of it are wrappers around views, so writes in place reach
    what they should.
    """

    content: torch.Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as torch's own subclasses do

    @staticmethod
    def __new__(cls: type[Residues], content: torch.Tensor, dtype: torch.dtype) -> Residues:  # noqa: PYI034  # no Self in 3.10
        """Wrap `content`; a view of it becomes a view of the same memory."""
        wrapper: Residues = torch.Tensor._make_wrapper_subclass(
            cls,
            content.shape,
            strides=content.stride(),
            storage_offset=content.storage_offset(),
            dtype=dtype,
            device=content.device,
        )
        wrapper.content = content
        return wrapper

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]  # torch prints with options
        """Dtype and residues."""
        return f"Residues({self.content}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # declared as a function in torch's stubs
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        """Refuse: nobody evaluates."""
        raise RuntimeError(f"{func} met residues outside an Evaluator")
