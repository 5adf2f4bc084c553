"""One block of a captured graph as boxes: a module, or what a module computes itself, is one box, a permutation another."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Literal, TypeAlias

import networkx as nx
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from padst_compile.layers import PermutedSparseLinear
from padst_compile.passes.context import Context
from padst_compile.passes.graph import PERMUTE, fake, is_call, layer_name

End: TypeAlias = int | str  # the number of a group, or a name for what is outside of the block
Kind: TypeAlias = Literal["outside", "operation", "dense", "sparse", "permutation"]

_IN, _OUT = "in ", "out"
_MOVES = frozenset(
    {"view", "reshape", "transpose", "permute", "contiguous", "dropout", "getitem", "to", "float", "expand", "unsqueeze",
     "flatten", "type_as", "clone", "chunk", "split", "unbind", "squeeze", "swapaxes", "movedim"}
)  # fmt: skip
_SYMBOLS = {"add": "+", "iadd": "+", "mul": "*", "imul": "*", "matmul": "matmul", "scaled_dot_product_attention": "attention"}
_LINEAR = ("Linear", "Conv1D")  # the latter is transformers'
_ATTENTION = frozenset({"scaled_dot_product_attention", "softmax"})


@dataclasses.dataclass(frozen=True)
class Box:
    """One thing that a block computes.

    Attributes:
        title: its name inside of the block.
        detail: what it is.
        nodes: of the captured graph.
    """

    title: str
    detail: str
    kind: Kind
    nodes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Edge:
    """A tensor from one box to another; `node` computes it."""

    source: int
    target: int
    node: str


@dataclasses.dataclass(frozen=True)
class BlockGraph:
    """Boxes, in an order in which they can run, and the tensors between them."""

    name: str
    boxes: tuple[Box, ...]
    edges: tuple[Edge, ...]


def first_block(layers: Iterable[str]) -> str:
    """The innermost numbered module that holds the first sparse layer, such as `blocks.0`; "" if there is none."""
    match = re.match(r"(.*\.\d+)\.", next(iter(layers), ""))
    return match[1] if match else ""


def block_graph(facts: Context, model: nn.Module, block: str) -> BlockGraph:
    """The boxes of one block.

    Args:
        facts: the captured graph.
        model: from which it was captured.
        block: name of a module in it; "" for all of it.
    """
    nodes = [node for node in facts.module.graph.nodes if _carries_tensors(node, facts)]
    inside = [node for node in nodes if node.op != "placeholder" and _within(layer_name(node), block)]
    groups = _contracted(_groups(inside), inside)
    members: dict[int, list[fx.Node]] = collections.defaultdict(list)
    for node in inside:
        if node in groups:
            members[groups[node]].append(node)
    boxes = [_box(part, model, block) for part in members.values()]
    edges = {(source, target): node.name for node in nodes for source, target in _flow(node, groups, set(inside))}
    return _assemble(block, list(members), boxes, _without_side_inputs(edges))


def _flow(node: fx.Node, groups: Mapping[fx.Node, int], inside: Container[fx.Node]) -> Iterator[tuple[End, End]]:
    """From which box to which the value of a node goes, looking through what is no box."""
    if node in inside and node not in groups:
        return
    source: End = groups[node] if node in groups else f"{_IN}{_outer_name(node)}"
    stack = list(node.users)
    while stack:
        reader = stack.pop()
        if reader in groups:
            if groups[reader] != source:
                yield source, groups[reader]
        elif reader in inside:
            stack += reader.users
        elif node in groups:
            yield source, _OUT


def _without_side_inputs(edges: Mapping[tuple[End, End], str]) -> Mapping[tuple[End, End], str]:
    """Without masks and rotary tables: inputs that join in later only."""
    fed = {target for source, target in edges if isinstance(source, int)}
    main = {source for source, target in edges if target not in fed}
    return {ends: node for ends, node in edges.items() if isinstance(ends[0], int) or ends[0] in main}


def _assemble(block: str, keys: Sequence[int], boxes: Sequence[Box], edges: Mapping[tuple[End, End], str]) -> BlockGraph:
    ends = dict.fromkeys(end for edge in edges for end in edge if isinstance(end, str))
    before = [end for end in ends if end != _OUT]
    after = [end for end in ends if end == _OUT]
    everything = [
        *(Box(end.removeprefix(_IN), "", "outside") for end in before),
        *boxes,
        *(Box("output", "", "outside") for _ in after),
    ]
    sequence: list[End] = [*before, *keys, *after]
    place = {end: position for position, end in enumerate(sequence)}
    found = tuple(Edge(place[source], place[target], node) for (source, target), node in edges.items())
    return BlockGraph(block, tuple(everything), found)


def _carries_tensors(node: fx.Node, facts: Context) -> bool:
    if node.op == "output" or facts.is_static(node):
        return False
    value = node.meta.get("example_value", node.meta.get("val"))
    return any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(value))


def _within(name: str, block: str) -> bool:
    return not block or name == block or name.startswith(block + ".")


def _groups(nodes: Sequence[fx.Node]) -> dict[fx.Node, int]:
    """A number per node: nodes of one module that follow each other share it, as long as no other box is in between."""
    together = nx.Graph()
    together.add_nodes_from(nodes)
    chosen = set(nodes)
    for node in nodes:
        for reader in node.users:
            one_module = layer_name(node) == layer_name(reader)
            if reader in chosen and one_module and not (is_call(node, PERMUTE) or is_call(reader, PERMUTE)):
                together.add_edge(node, reader)
    while True:
        groups = {node: number for number, part in enumerate(nx.connected_components(together)) for node in part}
        apart = _to_take_apart(nodes, groups)
        if not apart:
            return groups
        together.remove_edges_from([edge for edge in together.edges if groups[edge[0]] in apart])


def _to_take_apart(nodes: Sequence[fx.Node], groups: dict[fx.Node, int]) -> set[int]:
    """Groups on a cycle; those of modules with submodules before others."""
    flow = nx.DiGraph((groups[a], groups[b]) for a in nodes for b in a.users if b in groups and groups[a] != groups[b])
    on_cycle = {number for part in nx.strongly_connected_components(flow) if len(part) > 1 for number in part}
    sizes = collections.Counter(groups.values())
    names = {number: layer_name(node) for node, number in groups.items()}
    large = {number for number in on_cycle if sizes[number] > 1}
    outer = {n for n in large if any(other.startswith(names[n] + ".") for other in names.values())}
    return outer or large


def _contracted(groups: dict[fx.Node, int], nodes: Sequence[fx.Node]) -> dict[fx.Node, int]:
    """Without the groups that only reshape or pass on."""
    telling = {groups[node] for node in nodes if _operation(node) not in _MOVES or is_call(node, PERMUTE)}
    return {node: number for node, number in groups.items() if number in telling}


def _operation(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.rpartition("::")[2]
    return str(getattr(node.target, "__name__", node.target)).strip("_")


def _outer_name(node: fx.Node) -> str:
    return "input" if node.op == "placeholder" else layer_name(node)


def _box(nodes: Sequence[fx.Node], model: nn.Module, block: str) -> Box:
    names = tuple(node.name for node in nodes)
    path = layer_name(nodes[0])
    short = path.removeprefix(block + ".") if block else path
    if is_call(nodes[0], PERMUTE):
        size = "?" if (value := fake(nodes[0])) is None else value.shape[-1]
        return Box("permutation", f"{short}: {size} features", "permutation", names)
    operations = [_operation(node) for node in nodes]
    module = _module(model, path)
    if isinstance(module, PermutedSparseLinear):
        shape = f"{module.in_features} → {module.out_features}"
        return Box(short, f"sparse {module.config.structure.to_string()}, {shape}", "sparse", names)
    if module is not None and type(module).__name__ in _LINEAR:
        return Box(short, f"dense, {_shape(module)}", "dense", names)
    if module is not None and not any(True for _ in module.children()):
        return Box(short, type(module).__name__, "operation", names)
    if _ATTENTION & set(operations):
        return Box(short if path != block else "attention", "attention", "operation", names)
    telling = [operation for operation in operations if operation not in _MOVES]
    if len(telling) == 1:
        return Box(_SYMBOLS.get(telling[0], telling[0]), "", "operation", names)
    return Box(short, ", ".join(dict.fromkeys(telling[:3])), "operation", names)


def _module(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _shape(module: nn.Module) -> str:
    rows, columns = module.weight.shape  # type: ignore[misc]  # a matrix
    return f"{rows} → {columns}" if type(module).__name__ == "Conv1D" else f"{columns} → {rows}"
