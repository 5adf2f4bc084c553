"""Runs a graph on fake tensors and lets every operator that it executes tie the axes of its arguments and results.

What a function or method of PyTorch does to axes follows from the ATen operators behind it, so the rules speak about those,
whatever level the graph was captured at. A rule that is missing costs nothing but freedom: the axes are pinned.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from padst_compile.errors import UnsupportedGraphError
from padst_compile.passes.axes.axis import Axis, product, unify
from padst_compile.passes.context import Context
from padst_compile.passes.graph import fake


@dataclasses.dataclass(frozen=True)
class StaticUse:
    """A parameter, buffer or constant where a call reads it: its axes can be reordered there for nothing."""

    node: fx.Node
    user: fx.Node
    axes: tuple[Axis, ...]


@dataclasses.dataclass(frozen=True)
class Product:
    """A structured product: it can read and write any order, at the price of an index table."""

    node: fx.Node
    inputs: Axis
    outputs: Axis


@dataclasses.dataclass(frozen=True)
class Permute:
    """`padst.permute`: it can vanish if its input and output are kept in orders that differ by its table."""

    node: fx.Node
    inputs: Axis
    outputs: Axis


@dataclasses.dataclass
class AxisGraph:
    """The axes of a graph and everything that may reorder them.

    Attributes:
        seen: groups of axes that one tensor has.
        mixed: axes along which elements are combined.
        unknown: operators without a rule, with the node that executed them.
    """

    statics: list[StaticUse] = dataclasses.field(default_factory=list)
    products: list[Product] = dataclasses.field(default_factory=list)
    permutes: list[Permute] = dataclasses.field(default_factory=list)
    seen: list[tuple[Axis, ...]] = dataclasses.field(default_factory=list)
    mixed: list[Axis] = dataclasses.field(default_factory=list)
    unknown: dict[str, str] = dataclasses.field(default_factory=dict)


class Call:
    """One executed operator, as its rule sees it.

    Attributes:
        target: the operator.
        graph: what the rule may add to.
        node: the node of the captured graph that executed it.
    """

    def __init__(self, target: Any, args: Any, kwargs: Any, result: Any, tracer: Tracer) -> None:
        self.target, self.graph, self.node = target, tracer.axes, tracer.node
        self._args, self._kwargs, self._result, self._tracer = args, kwargs, result, tracer

    def argument(self, name: str) -> Any:
        """An argument by its name in the schema."""
        for position, parameter in enumerate(self.target._schema.arguments):
            if parameter.name == name:
                given = position < len(self._args)
                return self._args[position] if given else self._kwargs.get(name, parameter.default_value)
        raise KeyError(f"{self.target} has no argument {name!r}")

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All tensor arguments."""
        return [leaf for leaf in pytree.tree_leaves((self._args, self._kwargs)) if isinstance(leaf, torch.Tensor)]

    @property
    def results(self) -> list[torch.Tensor]:
        """All tensors that it returns."""
        return [leaf for leaf in pytree.tree_leaves(self._result) if isinstance(leaf, torch.Tensor)]

    def axes(self, tensor: torch.Tensor) -> list[Axis]:
        """The axes of an argument."""
        return self._tracer.axes_of(tensor)

    def define(self, tensor: torch.Tensor, axes: Sequence[Axis]) -> None:
        """Say what the axes of a result are."""
        self._tracer.define(tensor, axes)

    def fresh(self, tensor: torch.Tensor, pinned: str | None = None) -> list[Axis]:
        """New axes for a result whose order nothing else decides."""
        axes = [axis_of_size(size, pinned) for size in tensor.shape]
        self.define(tensor, axes)
        return self.axes(tensor)

    def pin_all(self, reason: str) -> None:
        """Fix the order of all axes of arguments and results."""
        for result in self.results:
            self.fresh(result, reason)
        for tensor in (*self.tensors, *self.results):
            for axis in self.axes(tensor):
                axis.pin(reason)


Rule: TypeAlias = Callable[[Call], None]


def axis_of_size(size: Any, pinned: str | None = None) -> Axis:
    """A new axis for one dimension of a tensor."""
    if isinstance(size, torch.SymInt):
        expression = size.node.expr
        return Axis(int(expression) if expression.is_Integer else expression, pinned)
    return product(()) if size == 1 else Axis(int(size), pinned)


class Tracer(TorchDispatchMode):
    """Records axes of all tensors while a graph runs.

    Args:
        rule_for: the rule of an operator, or None where there is none.
    """

    def __init__(self, rule_for: Callable[[Any], Rule | None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.axes = AxisGraph()
        self.node: fx.Node | None = None
        self._rule_for = rule_for
        self._known: dict[int, tuple[torch.Tensor, list[Axis]]] = {}  # tensors are kept: an id must not be given again

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Execute one operator, then apply its rule."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.namespace != "prim":  # questions about a tensor: device, layout
            call = Call(func, args, kwargs, result, self)
            rule = self._rule_for(func)
            if rule is None:
                self.axes.unknown.setdefault(str(func), self.node.name if self.node is not None else "?")
                call.pin_all(f"no rule knows {func}")
            else:
                rule(call)
        return result

    def axes_of(self, tensor: torch.Tensor, origin: str = "its values were made outside of the graph") -> list[Axis]:
        """The axes of a tensor; of one that no operator has returned, pinned by where it comes from."""
        if id(tensor) not in self._known:
            self._remember(tensor, [axis_of_size(size, origin) for size in tensor.shape])
        return self._known[id(tensor)][1]

    def define(self, tensor: torch.Tensor, axes: Sequence[Axis], *, separate: bool = False) -> None:
        """Set the axes of a tensor; those it has already must agree.

        Args:
            tensor: a result.
            axes: one per dimension.
            separate: whether each dimension is reordered by a table of its own, which cannot depend on another's index.
        """
        if id(tensor) in self._known:
            for old, new in zip(self.axes_of(tensor), axes, strict=True):
                unify(old, new)
        else:
            assert len(axes) == tensor.dim(), f"{len(axes)} axes for {tensor.dim()} dimensions"
            self._remember(tensor, list(axes), separate=separate)

    def _remember(self, tensor: torch.Tensor, axes: list[Axis], *, separate: bool = False) -> None:
        self._known[id(tensor)] = (tensor, axes)
        self.axes.seen += [(axis,) for axis in axes] if separate else [tuple(axes)]


def trace(facts: Context, rule_for: Callable[[Any], Rule | None]) -> AxisGraph:
    """The axes of a captured graph.

    Args:
        facts: the graph, from Dynamo: its nodes carry fake tensors.
        rule_for: the rule of an operator, or None where there is none.

    Raises:
        UnsupportedGraphError: a graph without fake tensors.
    """
    mode = _fake_mode(facts.module)
    tracer = Tracer(rule_for)
    run = _Run(facts, tracer, mode)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_unchanged_modes(run.entered))
        stack.enter_context(mode)
        if mode.shape_env is not None:
            stack.enter_context(mode.shape_env.ignore_fresh_unbacked_symbols())
            stack.enter_context(mode.shape_env.suppress_guards())
        for node in facts.module.graph.nodes:
            run.step(node)
    return tracer.axes


def _fake_mode(module: fx.GraphModule) -> FakeTensorMode:
    for node in module.graph.nodes:
        value = fake(node)
        if isinstance(value, FakeTensor):
            return value.fake_mode
    raise UnsupportedGraphError("the graph records no fake tensors; capture it with torch.compile or torch.export")


@contextlib.contextmanager
def _unchanged_modes(entered: list[Any]) -> Iterator[None]:
    """Undo what the graph switched and, because it failed, did not switch back."""
    with torch.set_grad_enabled(torch.is_grad_enabled()):
        try:
            yield
        finally:
            for mode in reversed(entered):
                mode.__exit__(None, None, None)


class _Run:
    """Executes node after node."""

    def __init__(self, facts: Context, tracer: Tracer, mode: FakeTensorMode) -> None:
        self._facts, self._tracer, self._mode = facts, tracer, mode
        self._values: dict[fx.Node, Any] = {}
        self._static_reads: dict[tuple[fx.Node, fx.Node], torch.Tensor] = {}
        self.entered: list[Any] = []

    def step(self, node: fx.Node) -> None:
        """Execute one node."""
        self._tracer.node = node
        if node.op == "output":
            self._pin(fx.map_arg(node.args, self._read), "the graph returns it")
        elif self._facts.is_static(node):
            pass  # read where it is used
        elif node.op == "placeholder":
            self._values[node] = _recorded(node)
            self._pin(self._values[node], "it is an input of the graph")
        else:
            self._values[node] = self._execute(node)

    def _execute(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return getattr_path(self._facts.module, str(node.target))
        if node.op == "call_module":
            return self._give_up(node, "a module call is not looked into")
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._read)
        try:
            with self._tracer:
                return self._call(node, args, kwargs)
        except Exception as error:  # whatever a fake kernel cannot do; capture recorded the value
            return self._give_up(node, f"{node.name} cannot be run on fake tensors ({type(error).__name__})", args, kwargs)

    def _call(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        result = node.target(*args, **kwargs)  # type: ignore[operator]  # call_function
        name = getattr(node.target, "__name__", "")
        if name == "_enter_autocast":
            self.entered.append(result)
        elif name == "_exit_autocast":
            self.entered.remove(args[0])
        return result

    def _give_up(self, node: fx.Node, reason: str, *given: Any) -> Any:
        self._tracer.axes.unknown.setdefault(str(node.target), node.name)
        result = _recorded(node)
        self._pin(fx.map_arg(given or (node.args, node.kwargs), self._read), reason)
        self._pin(result, reason)
        return result

    def _pin(self, values: Any, reason: str) -> None:
        for leaf in pytree.tree_leaves(values):
            if isinstance(leaf, torch.Tensor):
                for axis in self._tracer.axes_of(leaf, reason):
                    axis.pin(reason)

    def _read(self, node: fx.Node) -> Any:
        """The value of a node for the call that is being executed; a static tensor gets axes of its own for every reader."""
        if node in self._values:
            return self._values[node]
        reader = self._tracer.node
        assert reader is not None
        if (node, reader) not in self._static_reads:
            value = fake(node)
            if value is None:
                with _disable_current_modes():  # the value of a node that a rule made is computed from real tensors
                    present = self._facts.value(node)
                value = self._mode.from_tensor(present, static_shapes=True)
            alias = value.detach()
            self._tracer.define(alias, [axis_of_size(size) for size in alias.shape], separate=True)
            self._static_reads[node, reader] = alias
            self._tracer.axes.statics.append(StaticUse(node, reader, tuple(self._tracer.axes_of(alias))))
        return self._static_reads[node, reader]


def _recorded(node: fx.Node) -> Any:
    return node.meta.get("example_value", node.meta.get("val"))


def getattr_path(module: torch.nn.Module, target: str) -> Any:
    """The attribute behind a `get_attr` node."""
    owner, _, name = target.rpartition(".")
    return getattr(module.get_submodule(owner), name)


def order_of(table: torch.Tensor) -> np.ndarray[Any, np.dtype[np.int32]]:
    """An index table as an order."""
    return table.detach().cpu().numpy().astype(np.int32)
