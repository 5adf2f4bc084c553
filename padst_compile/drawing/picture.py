"""What the passes did to a block: the same boxes twice, with what became of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch._C._dynamo.eval_frame import reset_code

from padst_compile.conversion import sparse_layers
from padst_compile.drawing.block_graph import BlockGraph, block_graph, first_block
from padst_compile.drawing.dot import to_dot
from padst_compile.drawing.png import to_png
from padst_compile.drawing.svg import to_svg
from padst_compile.errors import DrawingError
from padst_compile.files import replace_file
from padst_compile.passes.context import HOISTED, Context, static_tensors
from padst_compile.passes.graph import PERMUTE, STRUCTURED_LINEAR, argument, copy_graph, is_call
from padst_compile.passes.pipeline import Pipeline, rules

_TOLERANCE = 1e-3  # a reordered tensor differs by far more, a rounded one by far less


@dataclasses.dataclass(frozen=True)
class Picture:
    """A block and what the passes did to it.

    Attributes:
        block: as captured.
        fates: for each box that changed, in words.
        reordered: edges whose tensor is kept in another channel order now.
        gone: boxes that are no operations any more.
    """

    block: BlockGraph
    fates: Mapping[int, str]
    reordered: frozenset[int]
    gone: frozenset[int]


_WRITERS: dict[str, Callable[[Picture], str | bytes]] = {".svg": to_svg, ".png": to_png, ".dot": to_dot}


def draw(model: nn.Module, path: Path, *inputs: Any, block: str | None = None, **keyword_inputs: Any) -> Path:
    """Draw one block of a sparsified model, before and after the inference passes.

    Args:
        model: a sparsified model.
        path: ends in `.svg`, `.png` or `.dot`.
        inputs: positional inputs, as for calling the model.
        block: name of a module; by default the first numbered one that holds several sparse layers.
        keyword_inputs: keyword inputs.

    Raises:
        DrawingError: a file type that is not known, a module that is not there, or a block that the inputs do not reach.
        MissingPackageError: a PNG without resvg_py and matplotlib.
    """
    if path.suffix not in _WRITERS:
        raise DrawingError(f"cannot draw {path.suffix or 'a file without a suffix'}; write {', '.join(_WRITERS)}")
    drawn = _WRITERS[path.suffix](picture(model, block, inputs, keyword_inputs))
    path.parent.mkdir(parents=True, exist_ok=True)
    content = drawn.encode() if isinstance(drawn, str) else drawn
    replace_file(path, lambda draft: draft.write_bytes(content))
    return path


def picture(model: nn.Module, block: str | None, inputs: Sequence[Any], keyword_inputs: Mapping[str, Any]) -> Picture:
    """What there is to draw of a block, of the one that is drawn by default if it is None."""
    block = first_block(name for name, _ in sparse_layers(model)) if block is None else block
    if block not in dict(model.named_modules()):
        raise DrawingError(f"the model has no module {block!r}")
    with torch.no_grad():
        for graph, graph_inputs in _capture(model, inputs, keyword_inputs):
            facts = Context(copy_graph(graph), static_tensors(graph.graph, graph_inputs), inference=True)
            boxes = block_graph(facts, model, block)
            if boxes.edges:
                return _compare(boxes, graph, facts, graph_inputs)
    raise DrawingError(f"these inputs do not reach {block!r}")


def _compare(boxes: BlockGraph, graph: fx.GraphModule, facts: Context, inputs: Sequence[Any]) -> Picture:
    wanted = {edge.node for edge in boxes.edges}
    before = _values(graph, inputs, wanted)
    others = tuple(rule.__name__ for rule in rules() if rule.effect == "other")  # not about permutations
    Pipeline(kernels=None, disabled=others).run(facts)
    after = _values(facts.module, inputs, wanted)
    nodes = {node.name: node for node in facts.module.graph.nodes}
    left = {i: [nodes[name] for name in box.nodes if name in nodes] for i, box in enumerate(boxes.boxes)}
    gone = frozenset(i for i, box in enumerate(boxes.boxes) if box.kind == "permutation" and not left[i])
    fates = {i: fate for i, own in left.items() if (fate := _fate(own))}
    for i in gone:
        fates[i] = _where_it_went(i, boxes, left)
    moved = {name for name in before.keys() & after.keys() if not _close(before[name], after[name])}
    reordered = {number for number, edge in enumerate(boxes.edges) if edge.node in moved}
    through = {boxes.edges[number].target for number in reordered} & gone
    reordered |= {number for number, edge in enumerate(boxes.edges) if edge.source in through}
    return Picture(boxes, fates, frozenset(reordered), gone)


def _where_it_went(permutation: int, boxes: BlockGraph, left: Mapping[int, Sequence[fx.Node]]) -> str:
    readers = [edge.target for edge in boxes.edges if edge.source == permutation]
    writers = [edge.source for edge in boxes.edges if edge.target == permutation]
    if any(_has_table(node, "input") for box in readers for node in left[box]):
        return "read by the kernel"
    if any(_has_table(node, "output") for box in writers for node in left[box]):
        return "written by the kernel"
    return "folded: nothing is left"


def _fate(nodes: Sequence[fx.Node]) -> str:
    """What changed about a box that is still there."""
    parts = ["reads through a table"] * any(_has_table(node, "input") for node in nodes)
    parts += ["writes through a table"] * any(_has_table(node, "output") for node in nodes)
    parts += ["parameters reordered"] * any(_has_reordered_parameters(node) for node in nodes)
    parts += ["separate gather"] * any(is_call(node, PERMUTE) for node in nodes)
    return ", ".join(parts)


def _has_table(node: fx.Node, side: str) -> bool:
    return is_call(node, STRUCTURED_LINEAR) and argument(node, f"{side}_permutation") is not None


def _has_reordered_parameters(node: fx.Node) -> bool:
    tables = [argument(node, f"{side}_permutation") for side in ("input", "output")] if is_call(node, STRUCTURED_LINEAR) else []
    return any(made.meta.get(HOISTED) and made not in tables for made in node.all_input_nodes)


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() <= _TOLERANCE * a.abs().max())


def _values(graph: fx.GraphModule, inputs: Sequence[Any], wanted: set[str]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if n.name in wanted and isinstance(result, torch.Tensor) and result.is_floating_point():
                found[n.name] = result.clone()
            return result

    Recorder(graph).run(*inputs)
    return found


def _capture(
    model: nn.Module, inputs: Sequence[Any], keyword_inputs: Mapping[str, Any]
) -> list[tuple[fx.GraphModule, list[Any]]]:
    found: list[tuple[fx.GraphModule, list[Any]]] = []

    def remember(graph: fx.GraphModule, graph_inputs: list[Any]) -> Callable[..., Any]:
        found.append((graph, list(graph_inputs)))
        return graph.forward

    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    try:
        torch.compile(call, backend=remember, dynamic=False)(*inputs, **keyword_inputs)
    finally:
        reset_code(call.__code__)
    return found
