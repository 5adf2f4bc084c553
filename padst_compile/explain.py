"""`explain`: what the compiler does with a model, layer by layer and permutation by permutation, and why."""

from __future__ import annotations

import dataclasses
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch._C._dynamo.eval_frame import reset_code
from torch._dynamo import OptimizedModule
from torch._dynamo.utils import counters

from padst_compile.backend import Compilation, compile_graph
from padst_compile.conversion import sparse_layers, sparsify_report
from padst_compile.layers import PermutedSparseLinear
from padst_compile.options import read_options
from padst_compile.passes.choose_kernels import LayerDecision
from padst_compile.passes.pipeline import PermutationAccount
from padst_compile.permutation_fates import PermutationFate, permutation_fates

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


@dataclasses.dataclass(frozen=True)
class LayerExplanation:
    """One layer: what it is, what runs it, and why.

    Args:
        name: module name.
        shape: "in -> out" features.
        structure: short form, or "dense"; "diagonal:16 as block:64x16" where the layer runs as another structure.
        density: active weights as a fraction.
        kernel: "native" (C++), "triton", "registered", "aten", "cusparselt" (sparse tensor cores), "dense", or "eager" if no
            graph reaches it.
        fused: what the kernel does besides multiplying ("bias", "input_permutation", "output_permutation", "activation",
            "gate", "residual", "feature-major input", "feature-major output"; "mlp" where two layers are one kernel).
        reason: why this kernel, or why the layer is dense.
        speedup: dense time over sparse time where both were measured.
        sparse_seconds: median time of the best sparse kernel where it was measured, with gradients while training.
        dense_seconds: the same of the dense product.
    """

    name: str
    shape: str
    structure: str
    density: float
    kernel: str
    fused: tuple[str, ...]
    reason: str
    speedup: float | None = None
    sparse_seconds: float | None = None
    dense_seconds: float | None = None


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `explain` found; `print` it, or take `to_dict()`.

    Args:
        layers: every linear layer that `sparsify` looked at.
        permutations: what became of them, over all graphs.
        fates: the same, permutation by permutation, with reasons and costs.
        refusals: rule, layer and reason wherever a permutation rule matched and did not fire.
        graph_breaks: reasons that Dynamo gave.
        compilations: graphs that were compiled.
        dense_bytes: weights of the sparsified layers if they were dense.
        sparse_bytes: their values and index tensors.
        pass_seconds: time of all passes, measurements of kernels included.
    """

    layers: tuple[LayerExplanation, ...]
    permutations: PermutationAccount
    fates: tuple[PermutationFate, ...]
    refusals: tuple[tuple[str, str, str], ...]
    graph_breaks: tuple[str, ...]
    compilations: int
    dense_bytes: int
    sparse_bytes: int
    pass_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return dataclasses.asdict(self)

    def render(self, console: Console) -> None:
        """Print as tables."""
        console.print(_layer_table(self.layers))
        if self.fates:
            console.print(_permutation_table(self.fates))
        p = self.permutations
        console.print(
            f"permutations: {p.total} total, {p.cancelled} cancelled, {p.composed} composed, {p.folded} folded, "
            f"{p.fused} fused into kernels, {p.remaining} remaining as separate ops"
        )
        ratio = f" ({self.sparse_bytes / self.dense_bytes:.3f}x)" if self.dense_bytes else ""
        console.print(f"weights and indices: {self.sparse_bytes:,} bytes for {self.dense_bytes:,} dense{ratio}")
        console.print(
            f"graph breaks: {len(self.graph_breaks)}; compilations: {self.compilations}; passes: {self.pass_seconds:.2f} s"
        )
        for reason in self.graph_breaks:
            console.print(f"  {reason}", style="yellow")

    def __str__(self) -> str:
        from rich.console import Console  # at first use: importing the package stays fast

        out = io.StringIO()
        self.render(Console(file=out, width=140))
        return out.getvalue()


def explain(model: nn.Module, *inputs: Any, options: Mapping[str, Any] | None = None, **keyword_inputs: Any) -> Explanation:
    """Capture `model` on the given inputs, run the passes and say what they did; nothing is compiled to machine code.

    Grad mode, training mode and autocast are those of the caller: under `torch.no_grad()` the inference passes run.

    Args:
        model: a sparsified model, compiled or not.
        inputs: positional inputs, as for calling it.
        options: as for `torch.compile(backend="padst")`.
        keyword_inputs: keyword inputs.

    Raises:
        UnknownOptionError, InvalidOptionError: options that mean nothing.
    """
    plain = model._orig_mod if isinstance(model, OptimizedModule) else model
    compilations, breaks = _capture(plain, inputs, keyword_inputs, options)
    layers = dict(sparse_layers(plain))
    return Explanation(
        layers=tuple(_explain_layers(compilations, plain)),
        permutations=sum((c.report.permutations for c in compilations), PermutationAccount()),
        fates=tuple(_fates(compilations, layers)),
        refusals=tuple(_refusals(compilations)),
        graph_breaks=breaks,
        compilations=len(compilations),
        dense_bytes=dense_bytes(layers.values()),
        sparse_bytes=sparse_bytes(layers.values()),
        pass_seconds=sum(c.report.seconds for c in compilations),
    )


def sparse_bytes(layers: Iterable[PermutedSparseLinear]) -> int:
    """Bytes of values, index tensors, permutations and biases; a tensor shared by several layers counts once."""
    tensors = {id(t): t for layer in layers for t in (*layer.parameters(), *layer.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def dense_bytes(layers: Iterable[PermutedSparseLinear]) -> int:
    """Bytes of the weights and biases that the same layers would have if they were dense."""
    sizes = {
        id(layer.values): layer.config.shape.numel * layer.values.element_size()
        + (0 if layer.bias is None else layer.bias.numel() * layer.bias.element_size())
        for layer in layers
    }
    return sum(sizes.values())


def _capture(
    model: nn.Module, inputs: Sequence[Any], keyword_inputs: Mapping[str, Any], options: Mapping[str, Any] | None
) -> tuple[list[Compilation], tuple[str, ...]]:
    chosen = read_options(None, options)
    compilations: list[Compilation] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        run, compilation = compile_graph(gm, example_inputs, chosen, lambda graph, _: graph)
        compilations.append(compilation)
        return run

    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    before = Counter(counters["graph_break"])
    try:
        torch.compile(call, backend=backend, dynamic=False)(*inputs, **keyword_inputs)
    finally:
        reset_code(call.__code__)  # the next explain starts afresh, other compiled code stays
    new = Counter(counters["graph_break"]) - before
    return compilations, tuple(new)


def _explain_layers(compilations: Sequence[Compilation], model: nn.Module) -> Iterable[LayerExplanation]:
    decided: dict[str, LayerExplanation] = {}
    for compilation in compilations:
        for decision in compilation.report.decisions:
            decided.setdefault(decision.layer, _explain_decision(decision))
    yield from decided.values()
    for name, layer in sparse_layers(model):
        if name not in decided:
            yield _unseen(name, layer)
    for refusal in sparsify_report(model).refusals:
        yield LayerExplanation(refusal.name, _dense_shape(model, refusal.name), "dense", 1.0, "dense", (), refusal.reason)


def _explain_decision(decision: LayerDecision) -> LayerExplanation:
    choice, shape = decision.choice, decision.shape
    measured = choice.sparse_seconds is not None and choice.dense_seconds is not None
    return LayerExplanation(
        name=decision.layer,
        shape=f"{shape.in_features} -> {shape.out_features}",
        structure=f"{decision.folded_from} as {decision.structure}" if decision.folded_from else decision.structure,
        density=decision.active / shape.numel,
        kernel=choice.kernel,
        fused=decision.fused,
        reason=choice.reason,
        speedup=choice.dense_seconds / choice.sparse_seconds if measured else None,  # type: ignore[operator]  # measured
        sparse_seconds=choice.sparse_seconds,
        dense_seconds=choice.dense_seconds,
    )


def _unseen(name: str, layer: PermutedSparseLinear) -> LayerExplanation:
    shape = f"{layer.in_features} -> {layer.out_features}"
    reason = "no compiled graph calls it with these inputs; a model may still read its weight, which is dense"
    return LayerExplanation(name, shape, layer.config.structure.to_string(), layer.density, "eager", (), reason)


def _dense_shape(model: nn.Module, name: str) -> str:
    weight = getattr(model.get_submodule(name), "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2:
        return "?"
    out_features, in_features = weight.shape
    if type(model.get_submodule(name)).__name__ == "Conv1D":
        out_features, in_features = in_features, out_features
    return f"{in_features} -> {out_features}"


def _refusals(compilations: Sequence[Compilation]) -> Iterable[tuple[str, str, str]]:
    for compilation in compilations:
        for rule in compilation.report.rules:
            for refusal in rule.refusals:
                yield refusal.rule, refusal.layer, refusal.reason


def _fates(compilations: Sequence[Compilation], layers: Mapping[str, PermutedSparseLinear]) -> Iterable[PermutationFate]:
    sides = {name: layer.config.permuted for name, layer in layers.items() if layer.config.permuted is not None}
    device = next((layer.values.device.type for layer in layers.values()), "cpu")
    for compilation in compilations:
        yield from permutation_fates(compilation, sides, device)


def _permutation_table(fates: Sequence[PermutationFate]) -> Table:
    from rich.table import Table

    table = Table(title="permutations", title_justify="left")
    for column in ("layer", "side", "what became of it", "bytes per token", "why"):
        table.add_column(column, justify="right" if column == "bytes per token" else "left", overflow="fold")
    for fate in fates:
        table.add_row(fate.layer, fate.side, fate.outcome, f"{fate.bytes_per_token:,}", fate.reason)
    return table


def _layer_table(layers: Sequence[LayerExplanation]) -> Table:
    from rich.table import Table

    table = Table(title="linear layers", title_justify="left")
    for column in ("layer", "in -> out", "structure", "density", "kernel", "fused", "speed-up", "reason"):
        table.add_column(column, justify="right" if column in ("density", "speed-up") else "left", overflow="fold")
    for layer in layers:
        speedup = "" if layer.speedup is None else f"{layer.speedup:.1f}x"
        fused = ", ".join(part.replace("_", " ") for part in layer.fused)
        table.add_row(
            layer.name, layer.shape, layer.structure, f"{layer.density:.3f}", layer.kernel, fused, speedup, layer.reason
        )
    return table
