"""`assert_equivalent`: a compiled sparse model computes what the eager one does, in inference and in training."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import fx, nn
from torch._dynamo.utils import counters
from torch.utils import _pytree as pytree

from padst_compile.backend import compile_graph, padst
from padst_compile.equivalence import verify
from padst_compile.options import read_options
from padst_compile.passes.pipeline import Pipeline
from padst_compile.testing.capture import capture
from padst_compile.tolerance import allowed_error, relative_error

Way: TypeAlias = Literal["exact", "exact-training", "passes", "passes-training", "backend", "backend-training"]
Call: TypeAlias = "tuple[Any, ...]"
Compiler: TypeAlias = Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]

ALL_WAYS: tuple[Way, ...] = get_args(Way)


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What one way of compiling gave.

    Attributes:
        error: the largest difference from eager float64, relative to the largest result; 0 where the proof is exact.
        bound: what it may be.
        compilations: how many graphs the backend compiled.
        graph_breaks: how often Dynamo gave up and started another graph.
    """

    error: float
    bound: float
    compilations: int
    graph_breaks: int


@dataclasses.dataclass(frozen=True)
class Results:
    """All that one call gives, in float64; gradients only in training."""

    outputs: list[torch.Tensor]
    gradients: list[torch.Tensor]

    def error(self, exact: Results) -> float:
        """The larger of the errors of outputs and gradients, each relative to the largest of its kind."""
        return max(relative_error(self.outputs, exact.outputs), relative_error(self.gradients, exact.gradients))


def assert_equivalent(
    model: nn.Module,
    *inputs: Any,
    how: Sequence[Way] = ALL_WAYS,
    again: Sequence[Call] = (),
    options: Mapping[str, Any] | None = None,
) -> dict[Way, Evidence]:
    """Fails unless `model` computes the same compiled as in eager mode, as one graph.

    The reference is the model in eager float64. A compiled result may be off by a few times as much as the eager model's own
    rounding, which is measured. Dynamo forgets what it compiled before.

    Args:
        model: a sparse model in any floating dtype; it is not changed.
        *inputs: of one call.
        how: "exact" compares the captured graph with the rewritten one by `padst.verify`, without tolerance, whatever the
            weights. "passes" runs the rewritten graph as it is; "backend" compiles it with Inductor. By themselves they are
            about inference; with "-training" about the graph for training, and the last two about the gradients of all
            inputs and parameters too.
        again: inputs of more calls, for example with other sequence lengths. However many, two compilations must do.
        options: of the backend.

    Returns:
        What was found, for each way.

    Raises:
        AssertionError: a result is off, a graph breaks, or a length compiles anew.
    """
    calls = [inputs, *again]
    return {way: (_prove if way.startswith("exact") else _compare)(way, model, calls, options) for way in how}


def _prove(way: Way, model: nn.Module, calls: Sequence[Call], options: Mapping[str, Any] | None) -> Evidence:
    """By exact arithmetic, for the shapes of the first call; nothing is measured, so "measure" leaves sparse products alone."""
    training = way.endswith("training")
    torch._dynamo.reset()
    with torch.set_grad_enabled(training):
        captured = capture(copy.deepcopy(model), *calls[0])
    facts = captured.context(inference=not training)
    chosen = read_options(None, options)
    Pipeline(kernels=None if chosen.kernels == "measure" else chosen.kernels, disabled=chosen.disable).run(facts)
    verdict = verify(captured.graph, facts.module, *captured.inputs)
    if not verdict:
        raise AssertionError(f"{way}: {verdict}")
    return Evidence(error=0.0, bound=0.0, compilations=1, graph_breaks=0)


def _compare(way: Way, model: nn.Module, calls: Sequence[Call], options: Mapping[str, Any] | None) -> Evidence:
    kind, _, training = way.partition("-")
    counted = _Counting(_through_passes(options) if kind == "passes" else functools.partial(padst, options=options))
    torch._dynamo.reset()
    counters.pop("graph_break", None)
    compiled = torch.compile(copy.deepcopy(model), backend=counted)
    pairs = [_error_and_bound(model, compiled, call, bool(training)) for call in calls]
    error, bound = max(pairs, key=lambda pair: pair[0] / pair[1])
    evidence = Evidence(error, bound, counted.calls, sum(counters["graph_break"].values()))
    _judge(way, evidence, len(calls), pairs)
    return evidence


def _judge(way: Way, evidence: Evidence, calls: int, pairs: Sequence[tuple[float, float]]) -> None:
    if not all(error <= bound for error, bound in pairs):  # written so that a NaN fails
        raise AssertionError(
            f"{way}: off by {evidence.error:.3g} of the largest result, where {evidence.bound:.3g} is rounding"
        )
    if evidence.graph_breaks:
        raise AssertionError(f"{way}: {evidence.graph_breaks} graph breaks: {dict(counters['graph_break'])}")
    if not 1 <= evidence.compilations <= min(calls, 2):
        raise AssertionError(f"{way}: {evidence.compilations} compilations for {calls} calls")


def _error_and_bound(model: nn.Module, compiled: Any, call: Call, training: bool) -> tuple[float, float]:
    dtype = floating_dtype(model)
    coarse = torch.float32 if dtype == torch.float64 else dtype
    exact = results(copy.deepcopy(model).double(), _cast(call, torch.float64), training)
    rounded = results(copy.deepcopy(model).to(coarse), _cast(call, coarse), training)
    found = results(compiled, call, training)
    return found.error(exact), allowed_error(rounded.error(exact), dtype, coarse)


def results(model: Any, inputs: Call, training: bool) -> Results:
    """Outputs of a call and, in training, gradients of all floating inputs and parameters for fixed random cotangents."""
    inputs = pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone(), inputs)
    if not training:
        with torch.no_grad():
            return Results(_tensors(model(*inputs)), [])
    wanted = [t.requires_grad_() for t in pytree.tree_leaves(inputs) if isinstance(t, torch.Tensor) and t.is_floating_point()]
    wanted += [parameter for parameter in model.parameters() if parameter.requires_grad]
    outputs = _tensors(model(*inputs))
    differentiable = [output for output in outputs if output.requires_grad]
    cotangents = [_cotangent(output, seed) for seed, output in enumerate(differentiable)]
    gradients = torch.autograd.grad(differentiable, wanted, cotangents, materialize_grads=True)
    return Results([output.detach() for output in outputs], list(gradients))


def floating_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of a model's parameters."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _cotangent(output: torch.Tensor, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(output.shape, generator=generator).to(output)


def _tensors(output: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def _cast(inputs: Call, dtype: torch.dtype) -> Call:
    cast: Call = pytree.tree_map_only(torch.Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, inputs)
    return cast


def _through_passes(options: Mapping[str, Any] | None) -> Compiler:
    """The backend's passes, with the rewritten graph run as it is instead of by Inductor."""
    chosen = read_options(None, options)
    return lambda graph, inputs: compile_graph(graph, inputs, chosen, lambda rewritten, _: rewritten)[0]


class _Counting:
    """A backend that counts how often it is asked."""

    def __init__(self, compiler: Compiler) -> None:
        self.calls, self._compiler = 0, compiler

    def __call__(self, graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.calls += 1
        return self._compiler(graph, inputs)
