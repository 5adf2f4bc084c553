"""What rules may know about a graph besides its nodes: which tensors are constant between calls, and their values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensor

from padst_compile.passes.graph import written_inputs

HOISTED = "padst_hoisted"


@dataclasses.dataclass
class Context:
    """Facts about one graph.

    Args:
        module: the graph module that holds the attributes of `get_attr` nodes.
        inputs: the tensors behind those placeholders that are parameters or buffers, by node name.
        inference: whether values may be used at compile time (no gradient is needed, and a change is noticed).
    """

    module: fx.GraphModule
    inputs: Mapping[str, torch.Tensor]
    inference: bool
    assumed: dict[fx.Node, torch.Tensor] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self._written = written_inputs(self.module.graph)

    def is_static(self, node: object) -> bool:
        """Whether a node's value depends on parameters and buffers alone, none of which the graph itself writes."""
        if not isinstance(node, fx.Node):
            return False
        if node.op == "placeholder":
            return node.name in self.inputs and node not in self._written
        if node.op == "get_attr":  # of a tensor: higher-order operators take submodules
            return node not in self._written and isinstance(_attribute(self.module, str(node.target)), torch.Tensor)
        return bool(node.meta.get(HOISTED)) or (_is_view(node) and self.is_static(node.args[0]))

    def value(self, node: fx.Node) -> torch.Tensor:
        """The present value of a static node."""
        if node.op in ("placeholder", "get_attr"):
            return self.tensor(node).detach()
        args = fx.map_arg(node.args, self.value)
        kwargs = fx.map_arg(node.kwargs, self.value)
        with torch.no_grad(), torch._C._DisableAutocast():
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)  # type: ignore[no-any-return]
            return node.target(*args, **kwargs)  # type: ignore[operator, no-any-return]  # call_function

    def tensor(self, node: fx.Node) -> torch.Tensor:
        """The very tensor behind an input or attribute."""
        value = self.inputs[node.name] if node.op == "placeholder" else _attribute(self.module, str(node.target))
        assert isinstance(value, torch.Tensor)
        return value

    def assume(self, node: fx.Node) -> torch.Tensor:
        """The present value of a static node, which the rewritten graph will only be right for: it is watched from now on."""
        value = self.value(node)
        self.assumed[node] = value.clone()
        return value

    def hoist(self, node: fx.Node) -> fx.Node:
        """Mark a node that a rule made, if all it reads is static: in inference it is then computed once, not per call."""
        if all(map(self.is_static, node.all_input_nodes)):
            node.meta[HOISTED] = True
        return node


def static_tensors(graph: fx.Graph, example_inputs: list[object]) -> dict[str, torch.Tensor]:
    """The parameters and buffers among the inputs of a graph from Dynamo, by placeholder name.

    Tensors made in inference mode count as inputs: they have no version counter that would tell of a change. So do fake ones,
    which have no values: Dynamo gives nothing else where it divides a graph at DistributedDataParallel's buckets.
    """
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    return {
        node.name: value
        for node, value in zip(placeholders, example_inputs, strict=True)
        if isinstance(value, torch.Tensor)
        and not value.is_inference()
        and _is_parameter_or_buffer(node, value)
        and not isinstance(value, FakeTensor)
    }


def _is_parameter_or_buffer(node: fx.Node, value: torch.Tensor) -> bool:
    return isinstance(value, torch.nn.Parameter) or "_dynamo_static_input_type" in node.meta.get("tensor_dict", {})


def _is_view(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in ("t", "transpose", "permute")
    return node.target in (
        torch.t,
        torch.transpose,
        torch.permute,
        torch.ops.aten.t.default,
        torch.ops.aten.transpose.int,
        torch.ops.aten.permute.default,
    )


def _attribute(module: torch.nn.Module, target: str) -> Any:
    owner, _, name = target.rpartition(".")
    return getattr(module.get_submodule(owner), name)
