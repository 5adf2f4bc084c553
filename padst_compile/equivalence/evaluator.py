"""Runs a model on residues: intercepts every operator that PyTorch dispatches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from padst_compile.equivalence import arithmetic, attention, functions, norms, sparse  # noqa: F401  # fill the registry
from padst_compile.equivalence.factories import FACTORIES
from padst_compile.equivalence.field import from_floats
from padst_compile.equivalence.location import locate
from padst_compile.equivalence.movement import LOGIC, MOVEMENT, truth
from padst_compile.equivalence.registry import DEFINITIONS, PRIMITIVES, Setting
from padst_compile.equivalence.residues import Residues
from padst_compile.errors import DataDependentError, RandomOperationError, UnsupportedOperationError

_READS_VALUES = frozenset(
    f"aten::{name}"
    for name in ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "topk", "sort", "argsort", "argmax", "argmin",
                 "unique2", "_unique2", "masked_select", "kthvalue", "median", "searchsorted", "bucketize", "allclose")
)  # fmt: skip
_DROPOUTS = frozenset(f"aten::{name}" for name in ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"))


class Evaluator(TorchDispatchMode):
    """While active, operators on `Residues` compute modulo the prime.

    Operators on other tensors run as they are, but for those that draw random numbers.

    Args:
        seed: of the oracles.
        names: of the modules that will run, by id, for messages.

    Attributes:
        degree: sum of the degrees of all primitives that ran.
        written: the memory that operators wrote to, see `memory`.
    """

    supports_higher_order_operators = True

    def __init__(self, seed: int, names: Mapping[int, str] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch
        self.seed = seed
        self.degree = 0
        self.written: set[int] = set()
        self._names = names or {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Evaluate one operator."""
        kwargs = kwargs or {}
        if isinstance(func, torch._ops.HigherOrderOperator):
            return self._higher_order(func, args, kwargs)
        tensors = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        name = func._schema.name
        if func._schema.is_mutable:
            self.written.update(_targets(func, args, kwargs))
        if name in _DROPOUTS:
            return self._dropout(name, *args)
        known = any(isinstance(tensor, Residues) for tensor in tensors)
        if torch.Tag.nondeterministic_seeded in func.tags and not (known and _is_known(func)):
            return self._random(func, args, kwargs)
        if not known:
            return func(*args, **kwargs)
        return self._evaluate(func, args, kwargs, tensors)

    def _evaluate(self, func: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor]) -> Any:
        name = func._schema.name
        try:
            if func._schema.is_mutable:
                return self._in_place(func, args, kwargs, tensors)
            if (found := _find(DEFINITIONS, func)) is not None:
                with self:
                    return found(*args, **kwargs)
            if name in MOVEMENT:
                return _moved(func, args, kwargs, tensors)
            if name in LOGIC:
                return _logic(func, args, kwargs, tensors)
            if name in PRIMITIVES:
                return self._primitive(name, args, kwargs, tensors)
        except (NotImplementedError, TypeError) as error:  # a form of the operator that its function does not take
            raise UnsupportedOperationError(name, self._where(), str(error)) from error
        if name in _READS_VALUES:
            raise DataDependentError(name, self._where())
        if func._can_decompose():
            with self:
                return func.decompose(*args, **kwargs)
        raise UnsupportedOperationError(name, self._where())

    def _primitive(self, name: str, args: Any, kwargs: Any, tensors: list[torch.Tensor]) -> Any:
        dtype = _outward_dtype(args, kwargs, tensors)
        if not (dtype.is_floating_point or dtype == torch.bool or name in FACTORIES):
            raise DataDependentError(f"{name} to {dtype}", self._where())
        setting = Setting(self.seed, dtype, next(t.device for t in tensors if isinstance(t, Residues)))
        primitive = PRIMITIVES[name]
        self.degree += primitive.degree
        result = primitive.run(setting, *args, **kwargs)
        return _wrapped(result, dtype) if dtype.is_floating_point or name not in FACTORIES else result

    def _in_place(self, func: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor]) -> Any:
        """Compute what the operator without the underscore returns, and copy it into the first argument."""
        target, name = args[0], func._schema.name
        if torch.Tag.inplace_view in func.tags or not name.endswith("_") or kwargs.get("out") is not None:
            raise NotImplementedError("it changes a tensor in a way that is not followed")
        if not isinstance(target, Residues):
            raise NotImplementedError("it writes computed values into a constant; make the tensor with x.new_zeros")
        packet = getattr(getattr(torch.ops, func.namespace), name.partition("::")[2][:-1])
        functional = getattr(packet, func._overloadname)
        with self:
            result = functional(*args, **kwargs)
        target.content.copy_(result.content)
        return target

    def _higher_order(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func.name() not in ("wrap_with_set_grad_enabled", "wrap_with_autocast", "tag_activation_checkpoint"):
            raise UnsupportedOperationError(func.name(), self._where())
        body = next(position for position, value in enumerate(args) if callable(value))
        with self:
            return args[body](*args[body + 1 :])

    def _dropout(self, name: str, x: torch.Tensor, probability: float, training: bool) -> torch.Tensor:
        if training and probability > 0.0:
            raise RandomOperationError(name, self._where())
        return x

    def _random(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Look into what may draw random numbers, and refuse what does."""
        if not func._can_decompose():
            raise RandomOperationError(func._schema.name, self._where())
        with self:
            return func.decompose(*args, **kwargs)

    def _where(self) -> str:
        return locate(self._names)


def memory(tensor: torch.Tensor) -> int:
    """Where the numbers of a tensor lie; views have it in common."""
    content = tensor.content if isinstance(tensor, Residues) else tensor
    return content.untyped_storage().data_ptr()


def _targets(func: Any, args: Any, kwargs: Any) -> Iterator[int]:
    """The memory that an operator writes to."""
    for position, parameter in enumerate(func._schema.arguments):
        if parameter.alias_info is not None and parameter.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(parameter.name)
            yield from (memory(leaf) for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor))


def _is_known(func: Any) -> bool:
    return func._schema.name in PRIMITIVES or _find(DEFINITIONS, func) is not None


def _find(table: Mapping[str, Callable[..., Any]], func: Any) -> Callable[..., Any] | None:
    """What is registered for an overload, else for the operator."""
    return table.get(f"{func._schema.name}.{func._overloadname}") or table.get(func._schema.name)


def _moved(func: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor]) -> Any:
    dtype = next(tensor.dtype for tensor in tensors if tensor.is_floating_point() or tensor.dtype == torch.bool)
    args, kwargs = pytree.tree_map_only(torch.Tensor, _movable, (args, kwargs))
    return _wrapped(func(*args, **kwargs), dtype)


def _movable(tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, Residues):
        return tensor.content
    return from_floats(tensor) if tensor.is_floating_point() else tensor


def _logic(func: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor]) -> Any:
    if "bitwise" in func._schema.name and any(tensor.dtype != torch.bool for tensor in tensors):
        raise NotImplementedError("bits of numbers")
    setting = Setting(0, torch.bool, tensors[0].device)
    args, kwargs = pytree.tree_map_only(torch.Tensor, lambda tensor: truth(setting, tensor), (args, kwargs))
    return _wrapped(func(*args, **kwargs), torch.bool)


def _wrapped(result: Any, dtype: torch.dtype) -> Any:
    """Residues around a result or several, outwardly of that dtype; truth values are bool whatever was computed."""
    if result is None:
        return None
    if isinstance(result, torch.Tensor):
        return Residues(result, torch.bool if result.dtype == torch.bool else dtype)
    return type(result)(_wrapped(part, dtype) for part in result)


def _outward_dtype(args: Sequence[Any], kwargs: Mapping[str, Any], tensors: list[torch.Tensor]) -> torch.dtype:
    """The dtype that PyTorch would return: the one asked for, else that of the floating tensors, which scalars do not widen."""
    asked = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.dtype)]
    if asked:
        return asked[0]
    floating = [tensor for tensor in tensors if tensor.is_floating_point()]
    decisive = [tensor.dtype for tensor in floating if tensor.dim()] or [tensor.dtype for tensor in floating]
    if not decisive:
        return torch.bool if all(tensor.dtype == torch.bool for tensor in tensors) else torch.get_default_dtype()
    result = decisive[0]
    for dtype in decisive[1:]:
        result = torch.promote_types(result, dtype)
    return result
