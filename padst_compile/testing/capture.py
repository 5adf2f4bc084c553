"""The graph that Dynamo captures from a model, before any pass has seen it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from padst_compile.passes.context import Context, static_tensors


@dataclasses.dataclass(frozen=True)
class Captured:
    """A whole model as one graph.

    Attributes:
        graph: as captured; take `context` to rewrite a copy.
        inputs: the graph's inputs, parameters among them.
    """

    graph: fx.GraphModule
    inputs: list[Any]

    def context(self, *, inference: bool) -> Context:
        """A copy of the graph with what the passes may know about it."""
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.graph.graph, {}))
        return Context(fx.GraphModule(self.graph, graph), static_tensors(self.graph.graph, self.inputs), inference)


def capture(model: nn.Module, *inputs: Any) -> Captured:
    """Capture a model; in `torch.no_grad()` the graph is one for inference.

    Raises:
        Unsupported: the model is not one graph.
    """
    found: list[Captured] = []

    def remember(graph: fx.GraphModule, graph_inputs: list[Any]) -> Callable[..., Any]:
        found.append(Captured(graph, list(graph_inputs)))
        return graph.forward

    torch.compile(model, backend=remember, fullgraph=True)(*inputs)
    (captured,) = found
    return captured
