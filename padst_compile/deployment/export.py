"""Exported programs that run where this package is not installed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx

from padst_compile.kernels.permute import gather_features
from padst_compile.structures import Shape, parse


def decompose(program: ExportedProgram) -> ExportedProgram:
    """An inference program of `torch.export` with this package's ops written out in PyTorch's own.

    Parameters stay packed, and the dense weight of a sparse layer is made at each call: the file stays small, the program is
    slow. It needs nothing of this package, neither to load nor to run. `padst.densify` before the export makes a program of
    dense layers instead, which suits ONNX. Other ops are left as they are.

    Args:
        program: of a sparse, finalized model; it is not changed.

    Returns:
        The new program.
    """
    unpackers = _Unpackers(program)
    table: dict[Any, Callable[..., Any]] = {
        torch.ops.padst.permute.default: gather_features,
        torch.ops.padst.structured_linear.default: functools.partial(_structured_linear, unpackers),
    }
    decomposed: ExportedProgram = program.run_decompositions(table)
    return decomposed


class _Unpackers:
    """How each layer's dense weight is made, as graphs that write nothing in place, which exported programs may not.

    They are traced before the decomposition: within it, tracing would record what it does.
    """

    def __init__(self, program: ExportedProgram) -> None:
        self._graphs: dict[Any, fx.GraphModule] = {}
        for node in program.graph.nodes:
            if node.target is torch.ops.padst.structured_linear.default:
                x, values, topology, *_, out_features, structure = (_example(argument) for argument in node.args)
                shape = Shape(out_features, x.shape[-1])
                key = _key(values, topology, shape, structure)
                self._graphs[key] = self._graphs.get(key) or _traced(values, topology, shape, structure)

    def __call__(self, values: torch.Tensor, topology: Sequence[torch.Tensor], shape: Shape, structure: str) -> torch.Tensor:
        dense: torch.Tensor = self._graphs[_key(values, topology, shape, structure)](values, *topology)
        return dense


def _example(argument: Any) -> Any:
    """The fake tensor, or list of such, that an argument of a node stands for."""
    return fx.map_arg(argument, lambda node: node.meta["val"])


def _key(values: torch.Tensor, topology: Sequence[torch.Tensor], shape: Shape, structure: str) -> Any:
    return structure, shape, *((tuple(t.shape), t.dtype, str(t.device)) for t in (values, *topology))


def _traced(values: torch.Tensor, topology: Sequence[torch.Tensor], shape: Shape, structure: str) -> fx.GraphModule:
    def unpack(values: torch.Tensor, *topology: torch.Tensor) -> torch.Tensor:
        return parse(structure).unpack(values, topology, shape)

    examples = [torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (values, *topology)]
    return make_fx(torch.func.functionalize(unpack), tracing_mode="fake")(*examples)


def _structured_linear(
    unpackers: _Unpackers,
    x: torch.Tensor,
    values: torch.Tensor,
    topology: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    input_permutation: torch.Tensor | None,
    output_permutation: torch.Tensor | None,
    out_features: int,
    structure: str,
) -> torch.Tensor:
    """See `padst::structured_linear`."""
    inputs = x if input_permutation is None else gather_features(x, input_permutation)
    weight = unpackers(values, topology, Shape(out_features, x.shape[-1]), structure)
    y = torch.matmul(inputs, weight.T)
    if output_permutation is not None:
        y = gather_features(y, output_permutation)
    return y if bias is None else y + bias
