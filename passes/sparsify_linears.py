"""linear(x, W, b)  ->  structured_linear(permute(x, p), S, b)

The one rule that changes the function: it makes the dense linear layers of a traced model sparse, as `padst.sparsify` does
for modules. The new parameters live in a `PermutedSparseLinear` under the graph module; the nodes are that layer's own
forward, traced, so module and graph cannot differ.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx, nn

from padst_compile.errors import MetaDeviceError, NothingToSparsifyError
from padst_compile.layers import PermutedSparseLinear, build_layer
from padst_compile.passes.base import RewriteRule
from padst_compile.passes.context import Context
from padst_compile.passes.find_linears import LinearMatch, find_linears, match_linear
from padst_compile.passes.graph import base
from padst_compile.planning import Candidate, LayerPlan, make_plan
from padst_compile.spec import SpecLike


class SparsifyLinears(RewriteRule):
    """Makes linear layers sparse as a specification says.

    Args:
        spec: the specification; its patterns match the module names that capture recorded.
    """

    def __init__(self, spec: SpecLike, facts: Context) -> None:
        matches = find_linears(facts)
        self._names = {m.node: name for name, m in zip(_unique_names(matches, facts), matches, strict=True)}
        by_name = {self._names[m.node]: m for m in reversed(matches)}
        candidates = [Candidate(name, m.shape(facts), _refusal(m, matches, facts)) for name, m in reversed(by_name.items())]
        plan = make_plan(candidates, spec)
        layers = {layer.name: layer for layer in plan.layers}
        self._reasons = {refusal.name: refusal.reason for refusal in plan.refusals}
        self._plans: dict[fx.Node, LayerPlan] = {}
        for match in matches:
            twins = [self._names[m.node] for m in matches if m.parameter(facts) is match.parameter(facts)]
            dense = next((name for name in twins if name not in layers), None)
            if dense is None:
                self._plans[match.node] = layers[twins[0]]  # tied weights share values, topology and permutation
            elif self._names[match.node] in layers:
                self._reasons[self._names[match.node]] = f"its weight is shared with {dense!r}, which stays dense"
        if not self._plans:
            raise NothingToSparsifyError("no layer would become sparse: " + "; ".join(map(": ".join, self._reasons.items())))
        self._built: dict[tuple[int, int], tuple[str, PermutedSparseLinear]] = {}

    def matches(self, node: fx.Node) -> bool:
        """A linear layer."""
        return node in self._names

    def why_not(self, node: fx.Node, facts: Context) -> str | None:
        """The plan's refusals."""
        return None if node in self._plans else self._reasons[self._names[node]]

    def rewrite(self, node: fx.Node, facts: Context) -> None:
        """Add the sparse layer to the module, unless an earlier call of it did, and inline its forward."""
        match, plan = match_linear(node, facts), self._plans[node]
        assert match is not None
        weight, bias = match.parameter(facts), match.bias_parameter(facts)
        key = (id(weight), id(bias))
        if key not in self._built:
            twin = next((layer for (other, _), (_, layer) in self._built.items() if other == id(weight)), None)
            layer = _build(match, plan, twin, facts)
            self._built[key] = _add_module(facts.module, layer, self._names[node]), layer
        target, layer = self._built[key]
        _inline(node, match.x, layer, target)
        for source in (match.weight, match.bias):
            if source is not None:
                _erase_unread(source, facts.module)


def _refusal(match: LinearMatch, matches: list[LinearMatch], facts: Context) -> str | None:
    weight = match.parameter(facts)
    if weight.is_meta:
        raise MetaDeviceError(f"layer {match.name!r} is on the meta device; materialise it first (model.to_empty, load)")
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}"
    module = match.module
    if module is not None and (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks):
        return "it has hooks, which would be lost; remove them first"
    others = _readers(weight, facts) - {m.node for m in matches if m.transposed == match.transposed}
    if others:
        return f"its weight is also read by {', '.join(sorted(n.name for n in others))}, and making it sparse would untie them"
    return None


def _readers(parameter: torch.Tensor, facts: Context) -> set[fx.Node]:
    """The calls that read a parameter, directly or through a view."""
    readers: set[fx.Node] = set()
    for node in facts.module.graph.nodes:
        if node.op == "call_module":
            held: Iterable[torch.Tensor] = facts.module.get_submodule(str(node.target)).parameters()
        elif facts.is_static(node):
            continue  # a view: those who read it count
        else:
            held = [facts.tensor(base(source)) for source in node.all_input_nodes if facts.is_static(source)]
        if any(tensor is parameter for tensor in held):
            readers.add(node)
    return readers


def _build(match: LinearMatch, plan: LayerPlan, twin: PermutedSparseLinear | None, facts: Context) -> PermutedSparseLinear:
    bias = match.bias_parameter(facts)
    if twin is not None:
        return PermutedSparseLinear(twin.config, twin.values, twin.topology, twin.permutation, bias)
    weight = match.parameter(facts)
    trained = weight.requires_grad if isinstance(weight, nn.Parameter) else True
    return build_layer(plan, match.dense_weight(facts), bias, requires_grad=trained)


def _add_module(root: fx.GraphModule, layer: nn.Module, name: str) -> str:
    target = f"padst_{name.replace('.', '_') or 'linear'}"
    while hasattr(root, target):
        target += "_"
    root.add_submodule(target, layer)
    return target


def _inline(node: fx.Node, x: fx.Node, layer: PermutedSparseLinear, target: str) -> None:
    """Copy the traced forward of `layer` to the place of `node`, with fake results where `node` had one."""
    inner = _trace(layer)
    copies: dict[fx.Node, fx.Node] = {}
    graph = node.graph
    with graph.inserting_before(node):
        for source in inner.nodes:
            if source.op == "placeholder":
                copies[source] = x
            elif source.op == "output":
                result = copies[source.args[0]]
            else:
                copy = graph.node_copy(source, lambda n: copies[n])
                if copy.op == "get_attr":
                    copy.target = f"{target}.{copy.target}"
                stack = {key: node.meta[key] for key in ("nn_module_stack",) if key in node.meta}
                copy.meta = {**stack, **_fake_meta(copy, node, x, layer)}
                copies[source] = copy
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def _trace(layer: PermutedSparseLinear) -> fx.Graph:
    """The layer's forward as a graph of ops on its attributes."""

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return False

    return Tracer().trace(layer)


def _erase_unread(node: fx.Node, module: fx.GraphModule) -> None:
    """Erase a dense parameter's node, and the parameter with it, where nothing reads it any more."""
    if node.users or node.op == "placeholder":
        return
    sources, target = node.all_input_nodes, str(node.target)
    node.graph.erase_node(node)
    if node.op == "get_attr" and not any(n.op == "get_attr" and n.target == target for n in module.graph.nodes):
        owner, _, name = target.rpartition(".")
        delattr(module.get_submodule(owner), name)
    for source in sources:
        _erase_unread(source, module)


def _fake_meta(copy: fx.Node, node: fx.Node, x: fx.Node, layer: PermutedSparseLinear) -> dict[str, object]:
    """The fake result of a copied call: the shape of `x` for a permuted input, of `node` for everything after."""
    if copy.op != "call_function":
        return {}
    first = copy.target is torch.ops.padst.permute.default and copy.args[0] is x
    like = x if first and layer.config.permuted == "input" else node
    return {key: like.meta[key] for key in ("example_value", "val") if key in like.meta}


def _unique_names(matches: list[LinearMatch], facts: Context) -> list[str]:
    """Names for planning: calls of one layer share its name; a second weight of the same owner gets a number."""
    owners: dict[str, list[torch.Tensor]] = {}
    names = []
    for match in matches:
        weights = owners.setdefault(match.name, [])
        weight = match.parameter(facts)
        number = next((i for i, known in enumerate(weights) if known is weight), len(weights))
        if number == len(weights):
            weights.append(weight)
        names.append(match.name if number == 0 else f"{match.name}#{number + 1}")
    return names
