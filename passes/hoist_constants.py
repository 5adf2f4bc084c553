"""Splits a graph in two: what depends on parameters alone, computed once, and the rest, computed per call.

The rules mark the nodes they make from static nodes (`context.hoist`). Those move into a graph of their own; the main
graph receives their results as further inputs. Whoever runs the pair must run the first again when a tensor it read has
changed.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import fx

from padst_compile.passes.context import HOISTED, Context


@dataclasses.dataclass(frozen=True)
class Split:
    """A main graph and what prepares its constants.

    Args:
        main: takes the original inputs, then the constants.
        prepare: takes the original inputs at `sources`, returns the constants.
        sources: positions of the inputs that the constants depend on.
        relied_on: takes the original inputs at `relied_sources`, returns the tensors that rewrites assumed values of.
        relied_sources: positions of the inputs that those depend on.
        expected: the values that were assumed.
        attributes: tensors that the module holds itself and that either graph reads.
    """

    main: fx.GraphModule
    prepare: fx.GraphModule
    sources: tuple[int, ...]
    relied_on: fx.GraphModule
    relied_sources: tuple[int, ...]
    expected: list[torch.Tensor]
    attributes: tuple[torch.Tensor, ...]


def hoist_constants(facts: Context) -> Split:
    """Split `facts.module`; its graph becomes the main one."""
    module, graph = facts.module, facts.module.graph
    hoisted = [node for node in graph.nodes if node.meta.get(HOISTED)]
    results = [node for node in hoisted if any(not user.meta.get(HOISTED) for user in node.users)]
    prepare, sources = _extract(module, results)
    relied_on, relied_sources = _extract(module, list(facts.assumed))
    read = [n for n in _in_order(_ancestors([*results, *facts.assumed])) if n.op == "get_attr"]
    attributes = tuple(facts.tensor(node) for node in read)
    _replace_by_inputs(graph, results)
    for node in reversed(hoisted):
        if not node.users:
            graph.erase_node(node)
    module.recompile()
    return Split(module, prepare, sources, relied_on, relied_sources, list(facts.assumed.values()), attributes)


def _ancestors(nodes: list[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def _extract(module: fx.GraphModule, results: list[fx.Node]) -> tuple[fx.GraphModule, tuple[int, ...]]:
    """A graph that computes `results` alone, and the positions of the inputs that it takes."""
    needed = _ancestors(results)
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    # Not the graph's own order: a result that was assumed and then erased is in `needed` alone.
    for node in _in_order(needed):
        copies[node] = graph.node_copy(node, lambda n: copies[n])
    graph.output(tuple(copies[node] for node in results))
    ordered = [node for node in _in_order(needed) if node.op == "placeholder"]
    return fx.GraphModule(module, graph), tuple(placeholders.index(node) for node in ordered)


def _in_order(nodes: set[fx.Node]) -> list[fx.Node]:
    """Inputs before the nodes that read them; otherwise by name, so that the order is the same in every process."""
    ordered: list[fx.Node] = []
    done: set[fx.Node] = set()

    def visit(node: fx.Node) -> None:
        if node not in done:
            done.add(node)
            for source in node.all_input_nodes:
                visit(source)
            ordered.append(node)

    for node in sorted(nodes, key=lambda n: (n.op != "placeholder", n.name)):
        visit(node)
    return ordered


def _replace_by_inputs(graph: fx.Graph, results: list[fx.Node]) -> None:
    """Let the graph take the results as further inputs, after its own."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    last = placeholders[-1] if placeholders else graph._root
    for number, node in enumerate(results):
        with graph.inserting_after(last):
            constant = graph.placeholder(f"padst_constant_{number}")
        # As Dynamo does for parameters: the compiler may rely on the address.
        constant.meta = {"tensor_dict": {"_dynamo_static_input_type": "unguarded"}}
        constant._dynamo_source = None  # read by AOTAutograd
        node.replace_all_uses_with(constant, delete_user_cb=lambda user: not user.meta.get(HOISTED))
        last = constant


def evaluate(prepare: fx.GraphModule, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Run the preparing graph on present values; results are new tensors without gradients."""
    with torch.inference_mode(False), torch.no_grad(), torch._C._DisableAutocast():
        return [tensor.detach().clone(memory_format=torch.contiguous_format) for tensor in prepare(*inputs)]
