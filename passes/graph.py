"""Small questions about FX nodes that several rules ask."""

from __future__ import annotations

import functools
import inspect
import operator
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

PERMUTE = torch.ops.padst.permute.default
STRUCTURED_LINEAR = torch.ops.padst.structured_linear.default
TO_DENSE = torch.ops.padst.to_dense.default

_IN_PLACE_OPERATORS = frozenset(
    getattr(operator, name) for name in dir(operator) if name.startswith("i") and hasattr(operator, f"__{name}__")
) - {operator.index, operator.inv, operator.invert} | {operator.setitem}  # fmt: skip
_MODE_SWITCHES = frozenset(
    {"_set_grad_enabled", "_enter_autocast", "_exit_autocast", "_enter_inference_mode", "_exit_inference_mode"}
)
_VIEWS = frozenset(
    {"getitem", "getattr", "view", "view_as", "reshape", "t", "transpose", "permute", "squeeze", "unsqueeze", "narrow",
     "select", "flatten", "unflatten", "swapaxes", "movedim", "expand", "detach", "chunk", "split", "unbind", "diagonal"}
)  # fmt: skip


def is_call(node: object, target: Callable[..., Any]) -> bool:
    """Whether `node` calls the function `target`."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is target


def argument(node: fx.Node, name: str) -> Any:
    """An argument of an operator call by its schema name, given by position or by keyword."""
    schema = node.target._schema  # type: ignore[union-attr]  # callers pass calls of torch operators
    for position, parameter in enumerate(schema.arguments):
        if parameter.name == name:
            if position < len(node.args):
                return node.args[position]
            return node.kwargs.get(name, parameter.default_value)
    raise KeyError(f"{node.target} has no argument {name!r}")


def set_arguments(node: fx.Node, **changes: Any) -> None:
    """Replace arguments of an operator call by their schema names; all become positional."""
    schema = node.target._schema  # type: ignore[union-attr]  # callers pass calls of torch operators
    node.args = tuple(changes.get(p.name, argument(node, p.name)) for p in schema.arguments)
    node.kwargs = {}


def make_positional(of: fx.Graph) -> None:
    """Give permutations and structured products all their arguments by position, as the rules read them."""
    for node in of.nodes:
        if node.kwargs and (is_call(node, PERMUTE) or is_call(node, STRUCTURED_LINEAR)):
            set_arguments(node)


def fake(node: object) -> torch.Tensor | None:
    """The fake tensor that capture recorded for a node's result, where it did."""
    if not isinstance(node, fx.Node):
        return None
    for key in ("example_value", "val"):
        if isinstance(node.meta.get(key), torch.Tensor):
            return node.meta[key]  # type: ignore[no-any-return]  # checked in the line above
    return None


_UNKNOWN_ROWS = 128  # stands for a size that depends on data


def rows(x: torch.Tensor | None) -> int:
    """How many rows of features capture saw, symbolic or not; one where it recorded nothing."""
    count = 1
    for size in () if x is None else x.shape[:-1]:
        hint = getattr(size, "node", None)  # of a symbolic size
        hint = size if hint is None else hint.hint
        count *= _UNKNOWN_ROWS if hint is None else int(hint)
    return count


def fake_meta(node: fx.Node) -> dict[str, Any]:
    """The part of a node's meta that holds the fake tensor of its result."""
    return {key: node.meta[key] for key in ("example_value", "val") if key in node.meta}


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph module over a copy of the graph, with what Dynamo attached for AOTAutograd."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(gm.graph, copies))
    for old, new in copies.items():
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source  # read by AOTAutograd
    module = fx.GraphModule(gm, graph)
    module.meta = dict(gm.meta)
    if hasattr(gm, "_param_name_to_source"):
        module._param_name_to_source = gm._param_name_to_source
    return module


def mutates(node: fx.Node) -> bool:
    """Whether a call may write to one of its inputs."""
    if node.op == "call_method":
        name = str(node.target)
        return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
    if node.op == "call_module":
        return bool(getattr(_module(node), "inplace", False))
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return bool(node.target._schema.is_mutable)
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return True  # what its graph does is not looked into
    if node.target in _IN_PLACE_OPERATORS or node.kwargs.get("out") is not None or _asked_in_place(node):
        return True
    name = getattr(node.target, "__name__", "")
    return name.endswith("_") and not name.endswith("__")


def switches_mode(node: fx.Node) -> bool:
    """Whether a call switches autograd or autocast for the calls after it."""
    return node.op == "call_function" and getattr(node.target, "__name__", "") in _MODE_SWITCHES


def obstacle_between(first: fx.Node, last: fx.Node | None) -> str | None:
    """What, strictly between two nodes of a graph (or up to its end), means something else to a call before it than after."""
    for node in _walk(first, last):
        if mutates(node):
            return f"{node.name} writes in place"
        if switches_mode(node):
            return f"{node.name} switches autograd or autocast"
    return None


def written_inputs(of: fx.Graph) -> frozenset[fx.Node]:
    """The inputs and attributes that a graph may write to, directly or through a view."""
    bases = (base(target) for node in of.nodes if mutates(node) for target in _written_arguments(node))
    return frozenset(node for node in bases if node.op in ("placeholder", "get_attr"))


def layer_name(node: fx.Node) -> str:
    """The name of the module that a node was traced from, else the node's own name."""
    stack = node.meta.get("nn_module_stack")
    if stack:
        path, _ = list(stack.values())[-1]
        if path:
            return clean_name(str(path))
    return node.name


def clean_name(path: str) -> str:
    """A Dynamo source like `L['self']._modules['blocks']._modules['0']` as the module name `blocks.0`."""
    path = re.sub(r"^(?:L|G)\['[^']*'\]\.?", "", path)
    path = re.sub(r"\._?(?:modules|parameters|buffers)\[['\"]?([^'\"\]]+)['\"]?\]", r".\1", "." + path)
    path = re.sub(r"\[['\"]?([^'\"\]]+)['\"]?\]", r".\1", path)
    return re.sub(r"\.+", ".", path).strip(".").removeprefix("_orig_mod.")


def _asked_in_place(node: fx.Node) -> bool:
    """Whether a function like `F.relu(x, inplace=True)` was called so, by position or by keyword."""
    signature = _signature(node.target)
    if signature is None:
        return bool(node.kwargs.get("inplace"))
    try:
        return bool(signature.bind(*node.args, **node.kwargs).arguments.get("inplace"))
    except TypeError:
        return bool(node.kwargs.get("inplace"))


@functools.cache
def _signature(function: Any) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):  # most builtins have none
        return None


def _written_arguments(node: fx.Node) -> list[fx.Node]:
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return node.all_input_nodes
    if isinstance(node.target, torch._ops.OpOverload):
        parameters = node.target._schema.arguments
        written = [argument(node, p.name) for p in parameters if p.alias_info is not None and p.alias_info.is_write]
    else:
        written = [*node.args[:1], node.kwargs.get("input"), node.kwargs.get("out")]
    found: list[fx.Node] = []
    fx.map_arg(written, found.append)  # a list of tensors counts too
    return found


def base(node: fx.Node) -> fx.Node:
    """The node that a chain of views looks at."""
    while node.op == "call_method" or (node.op == "call_function" and is_view(node.target)):
        if not node.all_input_nodes:
            break
        node = node.all_input_nodes[0]
    return node


def is_view(target: Any) -> bool:
    """Whether what a function returns may share memory with its argument."""
    if isinstance(target, torch._ops.OpOverload):
        return any(result.alias_info is not None for result in target._schema.returns)
    return getattr(target, "__name__", "") in _VIEWS


def _walk(first: fx.Node, last: fx.Node | None) -> Iterator[fx.Node]:
    node = first.next
    while node is not last and node.op != "root":
        yield node
        node = node.next


def _module(node: fx.Node) -> torch.nn.Module | None:
    owner = node.graph.owning_module
    return owner.get_submodule(str(node.target)) if owner is not None else None
