"""The torch.compile backend `padst`: our passes, then Inductor.

Listed under the entry point group `torch_dynamo_backends`, so `torch.compile(model, backend="padst")` needs no import.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._inductor.compile_fx import compile_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatefulSymbolicContext

from padst_compile import registered
from padst_compile.equivalence import PassCheck
from padst_compile.kernels import dispatch
from padst_compile.options import Options, read_options
from padst_compile.passes.context import Context, static_tensors
from padst_compile.passes.graph import copy_graph
from padst_compile.passes.hoist_constants import evaluate, hoist_constants
from padst_compile.passes.pipeline import Check, Pipeline, PipelineReport
from padst_compile.specialization import Program, Specialization

Compiler = Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]


@dataclasses.dataclass(frozen=True)
class Compilation:
    """One graph that the backend was given, and what the passes did to it."""

    graph: fx.GraphModule
    report: PipelineReport
    inference: bool


def padst(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile one captured graph.

    Args:
        gm: the graph from Dynamo.
        example_inputs: its inputs: tensors, parameters and symbolic sizes.
        mode: an Inductor mode ("default", "reduce-overhead", "max-autotune", …).
        options: see `padst_compile.options.Options`, and every option of Inductor.

    Raises:
        UnknownOptionError, InvalidOptionError: options that mean nothing; raised before anything is compiled.
    """
    chosen = read_options(mode, options)
    inductor = cast("Compiler", functools.partial(compile_fx, config_patches=dict(chosen.inductor)))
    if not _has_sparse_ops(gm):
        return inductor(gm, list(example_inputs))

    def compiler(graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        # PyTorch's caches know a custom op by name alone, and would go on with the gradient of the version before this one.
        tag = f"{torch.compiler.config.cache_key_tag}/padst:{ops_version()}{registered.fingerprint()}"
        with torch.compiler.config.patch(cache_key_tag=tag):  # type: ignore[attr-defined]  # a config module
            return inductor(graph, inputs)

    compiled, _ = compile_graph(gm, example_inputs, chosen, compiler)
    return compiled


@functools.cache
def ops_version() -> str:
    """A hash over the sources of the ops: their gradients and fake results are part of what Inductor compiles."""
    sources = sorted(Path(dispatch.__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()


def compile_graph(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, compiler: Compiler
) -> tuple[Callable[..., Any], Compilation]:
    """Run the passes on a captured graph and hand the result to `compiler`.

    Args:
        gm: the graph from Dynamo; left as it is.
        example_inputs: its inputs.
        options: validated options.
        compiler: turns a graph and its inputs into a callable; Inductor, but for `explain`.
    """
    dump = None if options.dump is None else Path(options.dump)
    inputs = list(example_inputs)
    check = PassCheck(inputs, dump) if options.verify else None
    pipeline = Pipeline(kernels=options.kernels, autotune=options.autotune, disabled=options.disable, dump=dump, check=check)
    inference = not _takes_gradients(gm, inputs)
    facts = Context(copy_graph(gm), static_tensors(gm.graph, inputs), inference)
    report = pipeline.run(facts)
    compilation = Compilation(facts.module, report, inference)
    if not inference:
        return compiler(facts.module, inputs), compilation
    program = _specialize(facts, inputs, compiler)
    general = functools.partial(_general_program, gm, options, compiler, check)
    return Specialization(program, inputs, general), compilation


def _takes_gradients(gm: fx.GraphModule, inputs: list[Any]) -> bool:
    """Whether anything computed by the graph may be differentiated: gradients are on, or the graph switches them on."""
    switched_on = any(node.target is torch._C._set_grad_enabled and node.args[0] for node in gm.graph.nodes)
    tensors = [*inputs, *gm.parameters()]
    wanted = any(isinstance(tensor, torch.Tensor) and tensor.requires_grad for tensor in tensors)
    return wanted and (torch.is_grad_enabled() or switched_on)


def _specialize(facts: Context, inputs: list[Any], compiler: Compiler) -> Program:
    split = hoist_constants(facts)

    def prepare(args: Sequence[Any]) -> list[torch.Tensor]:
        return evaluate(split.prepare, [args[i] for i in split.sources])

    def relied_on(args: Sequence[Any]) -> list[torch.Tensor]:
        return evaluate(split.relied_on, [args[i] for i in split.relied_sources])

    constants = prepare(inputs)
    _fix_sizes(constants)
    compiled = compiler(split.main, [*inputs, *constants])
    watched = tuple(sorted({*split.sources, *split.relied_sources}))
    return Program(compiled, watched, prepare, constants, relied_on, split.expected, split.attributes)


def _fix_sizes(constants: list[torch.Tensor]) -> None:
    """Tell the compiler that the sizes of constants are numbers: Dynamo has no name to guard a symbol of theirs by."""
    context = torch._guards.TracingContext.try_get()
    if context is not None:
        for number, constant in enumerate(constants):
            context.tensor_to_context[constant] = StatefulSymbolicContext(
                dynamic_sizes=[DimDynamic.STATIC] * constant.dim(), tensor_source=ConstantSource(f"padst_constant_{number}")
            )


def _general_program(
    gm: fx.GraphModule, options: Options, compiler: Compiler, check: Check | None = None
) -> Callable[..., Any]:
    """The captured graph after those passes that rely on no value, compiled for any values and sizes."""
    module = copy_graph(gm)
    Pipeline(kernels=None, disabled=options.disable, check=check).run(Context(module, {}, inference=False))
    return torch.compile(module, backend=lambda graph, inputs: compiler(graph, list(inputs)))


def _has_sparse_ops(gm: fx.GraphModule) -> bool:
    return any(isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "padst" for node in gm.graph.nodes)
