"""Finds the dense linear layers of a traced graph, in every form in which capture leaves them.

Dynamo and `symbolic_trace` give `F.linear` and `torch.addmm` (transformers' Conv1D, weight stored [in, out]); export gives
`aten.linear` and `aten.addmm`; `symbolic_trace` keeps `nn.Linear` as a `call_module`.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import fx, nn
from torch.nn import functional as F

from padst_compile.passes.context import Context
from padst_compile.passes.graph import base, clean_name
from padst_compile.structures import Shape

_aten = torch.ops.aten
_LINEAR = (F.linear, _aten.linear.default)
_ADDMM = (torch.addmm, _aten.addmm.default)
_MM = _aten.mm.default  # what a linear layer without bias decomposes to


@dataclasses.dataclass(frozen=True)
class LinearMatch:
    """A linear layer in a graph.

    Args:
        node: the call.
        name: the module name of the weight's owner.
        x: the activations; `[..., in]`, two-dimensional for an addmm.
        weight: the node of the weight, or None for a module call.
        bias: the node of the bias, or None.
        transposed: whether the weight is stored [in, out].
    """

    node: fx.Node
    name: str
    x: fx.Node
    weight: fx.Node | None
    bias: fx.Node | None
    transposed: bool
    module: nn.Linear | None = None

    def dense_weight(self, facts: Context) -> torch.Tensor:
        """The present weight as `[out, in]`."""
        if self.module is not None:
            return self.module.weight.detach()
        assert self.weight is not None
        value = facts.value(self.weight)
        return value.T if self.transposed else value

    def parameter(self, facts: Context) -> torch.Tensor:
        """The very tensor that holds the weight, transposed or not."""
        if self.module is not None:
            return self.module.weight
        assert self.weight is not None
        return facts.tensor(base(self.weight))

    def bias_parameter(self, facts: Context) -> nn.Parameter | None:
        """The very parameter that holds the bias; a new one where the bias is a plain tensor."""
        held = self.module.bias if self.module is not None else None if self.bias is None else facts.tensor(base(self.bias))
        return held if held is None or isinstance(held, nn.Parameter) else nn.Parameter(held.detach().clone())

    def shape(self, facts: Context) -> Shape:
        """Size of the layer."""
        return Shape(*self.dense_weight(facts).shape)


def match_linear(node: fx.Node, facts: Context) -> LinearMatch | None:
    """`node` as a linear layer whose weight and bias are parameters, or None."""
    if node.op == "call_module":
        return _match_module(node, facts)
    if node.op != "call_function":
        return None
    if node.target in _LINEAR:
        parts = [*node.args, *([None] * (3 - len(node.args)))]
        x, weight, bias = (node.kwargs.get(key, part) for key, part in zip(("input", "weight", "bias"), parts, strict=False))
        transposed = False
    elif node.target in _ADDMM and not node.kwargs and len(node.args) == 3:
        bias, x, weight = node.args
        transposed = True
    elif node.target is _MM and len(node.args) == 2:
        bias, (x, weight) = None, node.args
        transposed = True
    else:
        return None
    if not isinstance(x, fx.Node) or not facts.is_static(weight) or not (bias is None or facts.is_static(bias)):
        return None
    assert isinstance(weight, fx.Node)
    if facts.value(weight).dim() != 2 or (isinstance(bias, fx.Node) and facts.value(bias).dim() != 1):
        return None
    return LinearMatch(node, _owner_name(weight), x, weight, bias if isinstance(bias, fx.Node) else None, transposed)


def find_linears(facts: Context) -> list[LinearMatch]:
    """Every linear layer of a graph, in order."""
    matches = (match_linear(node, facts) for node in facts.module.graph.nodes)
    return [match for match in matches if match is not None]


def _match_module(node: fx.Node, facts: Context) -> LinearMatch | None:
    module = facts.module.get_submodule(str(node.target))
    x = node.args[0] if node.args else node.kwargs.get("input")
    if type(module) is not nn.Linear or not isinstance(x, fx.Node):
        return None
    return LinearMatch(node, str(node.target), x, None, None, transposed=False, module=module)


def _owner_name(weight: fx.Node) -> str:
    """`blocks.0.fc1` for a weight that came from `blocks.0.fc1.weight`."""
    weight = base(weight)
    if weight.op == "get_attr":
        path = str(weight.target)
    else:
        source = getattr(weight.meta.get("grapharg"), "source", None)
        path = _source_name(source) if source is not None else str(weight.target)
    owner, _, attribute = clean_name(path).rpartition(".")
    return owner if owner or attribute == "weight" else weight.name  # a model that is itself one linear layer has no name


def _source_name(source: object) -> str:
    name = source.name  # type: ignore[attr-defined]  # Dynamo sources; a method until torch 2.11, a property since
    return str(name() if callable(name) else name)
