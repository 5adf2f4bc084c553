"""block_linear(block_linear(x, S, activation), T, residual)  ==  block_mlp(x, S, T, activation, residual)

What only the second product reads need not be a tensor: one kernel takes a tile of tokens through both, its hidden features in
cache (C++) or in registers (Triton). It gives up some parallelism for that, or computes hidden features twice, so that it is
measured against the two kernels, and has to be faster. Permutations between the products become one table, in which order the
second reads hidden features, and the first layer's bias moves to the order of its sums:
permute(S x, p) + b = permute(S x + b[p^-1], p). Triton's kernel takes no tables.

Expects `FuseActivation` and `FuseResidual` before it, and `InterleaveBlocks`, whose blocks the kernel reads as well. Needs no
values, but parameters that stay to measure with.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from padst_compile.autotune.effort import Effort
from padst_compile.autotune.mlp_choice import APART, MlpChoice, choose_mlp
from padst_compile.autotune.problem import MlpProblem, token_bucket
from padst_compile.autotune.space import Candidate
from padst_compile.kernels import dispatch, triton_support
from padst_compile.kernels.block.triton_mlp_op import why_not as why_triton_cannot
from padst_compile.kernels.launch import Tile
from padst_compile.passes.base import RewriteRule
from padst_compile.passes.choose_kernels import Policy
from padst_compile.passes.context import Context
from padst_compile.passes.graph import argument, fake, obstacle_between, rows
from padst_compile.passes.index_nodes import invert, select
from padst_compile.passes.native_calls import activations, epilogue, is_block_linear, note_joined
from padst_compile.structures import Block

_LAYER = ("values", "row_pointers", "columns", "bias", "input_permutation", "output_permutation", "out_features")
_TILES = (16, 64, 128)  # tokens that the C++ kernel may take at once, besides its default


class FuseMlp(RewriteRule):
    """Joins two block products into one kernel where that is faster.

    Args:
        policy: "measure" joins what is faster as one kernel, "sparse" all that can be joined, "dense" nothing.
        effort: how much may be measured for that.
    """

    def __init__(self, policy: Policy = "measure", effort: Effort = "quick") -> None:
        self.policy, self.effort = policy, effort
        self._choices: dict[fx.Node, MlpChoice] = {}

    def uuid(self) -> str:
        """The rule's identity, with its options."""
        return f"{super().uuid()}-{self.policy}-{self.effort}"

    def matches(self, node: fx.Node) -> bool:
        """A block product of a block product, by kernels of one kind."""
        return is_block_linear(node) and is_block_linear(argument(node, "x")) and argument(node, "x").target is node.target

    def why_not(self, node: fx.Node, facts: Context) -> str | None:
        """The hidden features must be nobody else's, their kernel must do what one kernel can, and that be faster."""
        first = argument(node, "x")
        if len(first.users) != 1 or any(argument(node, name) is first for name in ("gate", "residual")):
            return f"{first.name} is read by more than the next product"
        extra = set(epilogue(first)) - {"activation"} or set(epilogue(node)) - {"residual"}
        if extra:
            return (
                f"one kernel has no place for the {min(extra)} of {first.name if min(extra) in epilogue(first) else node.name}"
            )
        if activations(first) is None or fake(node) is None:
            return "capture recorded no shapes"
        operands = [argument(layer, name) for layer in (first, node) for name in _LAYER]
        if not all(facts.is_static(operand) for operand in operands if isinstance(operand, fx.Node)):
            return "the weights are computed from the inputs"
        reason = obstacle_between(first, node)
        reason = _why_kernel_cannot(first, node, facts) if reason is None else f"{reason} between the products"
        if reason is not None:
            return reason
        self._choices[node] = choice = self._choose(first, node, facts)
        return None if choice.fused else choice.reason

    def rewrite(self, node: fx.Node, facts: Context) -> None:
        """Give the second product the arguments of both."""
        first, choice = argument(node, "x"), self._choices.pop(node)
        note_joined(first, choice.reason)
        note_joined(node)
        arguments = _arguments(first, node, choice.tile)
        node.target, node.args, node.kwargs = dispatch.mlp_op(_kernel(node)), arguments, {}
        node.graph.erase_node(first)

    def _choose(self, first: fx.Node, second: fx.Node, facts: Context) -> MlpChoice:
        if self.policy == "sparse":
            return MlpChoice(True, "in one kernel with the next layer")
        effort = self.effort if self.policy == "measure" else "off"
        problem = _problem(first, second, facts)
        return choose_mlp(problem, lambda: _runs(first, second, facts, problem.tokens), effort)


def _kernel(node: fx.Node) -> dispatch.SparseKernel:
    assert isinstance(node.target, torch._ops.OpOverload)
    return "triton" if node.target.namespace == "padst_triton" else "native"


def _arguments(first: fx.Node, second: fx.Node, tile: Tile | None) -> tuple[Any, ...]:
    graph = second.graph
    with graph.inserting_before(second):
        operands = _operands(_layer(first), _layer(second), functools.partial(select, graph), functools.partial(invert, graph))
    arguments = (argument(first, "x"), *operands, argument(first, "activation"), argument(second, "residual"))
    return arguments if tile is None else (*arguments, tile.tokens)


def _layer(node: fx.Node) -> list[Any]:
    return [argument(node, name) for name in _LAYER]


def _operands(
    first: Sequence[Any], second: Sequence[Any], select: Callable[[Any, Any], Any], invert: Callable[[Any], Any]
) -> tuple[Any, ...]:
    """What one kernel takes of two layers, both as nodes or as tensors; see `index_nodes` for `select` and `invert`."""
    *weight, bias, into, behind, features = first
    *other, other_bias, reads, out, other_features = second
    if behind is not None:  # the kernel adds the bias to the sums, before it permutes them
        bias = None if bias is None else select(bias, invert(behind))
        reads = behind if reads is None else select(behind, reads)
    return *weight, bias, into, features, *other, other_bias, reads, out, other_features


def _why_kernel_cannot(first: fx.Node, second: fx.Node, facts: Context) -> str | None:
    if _kernel(second) == "native":
        return None
    if any(argument(layer, name) is not None for layer in (first, second) for name in _LAYER[4:6]):
        return "Triton's kernel for two layers takes no permutations"
    return why_triton_cannot(*(_structure(layer, facts) for layer in (first, second)))


def _structure(layer: fx.Node, facts: Context) -> Block:
    shape = facts.value(argument(layer, "values")).shape  # [blocks, columns, rows], or interleaved [blocks, pairs, rows, 2]
    return Block((shape[2], shape[1] * (shape[3] if len(shape) == 4 else 1)))


def _problem(first: fx.Node, second: fx.Node, facts: Context) -> MlpProblem:
    x, y = activations(first), fake(second)
    assert x is not None
    assert y is not None
    between = argument(first, "output_permutation"), argument(second, "input_permutation")
    tables = {
        "in": argument(first, "input_permutation") is not None,
        "between": any(table is not None for table in between),
        "out": argument(second, "output_permutation") is not None,
    }
    residual = "residual" if argument(second, "residual") is not None else ""
    return MlpProblem(
        structure=" ".join(_structure(layer, facts).to_string() for layer in (first, second)),
        in_features=int(x.shape[-1]),
        hidden_features=argument(first, "out_features"),
        out_features=argument(second, "out_features"),
        active=sum(facts.value(argument(layer, "values")).numel() for layer in (first, second)),
        tokens=token_bucket(rows(x), x.device.type),
        dtype=str(y.dtype).removeprefix("torch."),
        permuted="+".join(name for name, there in tables.items() if there),
        device=y.device.type,
        epilogue="+".join(filter(None, (argument(first, "activation"), residual))),
        precision=triton_support.precision_on(y.device, y.dtype),
    )


def _runs(first: fx.Node, second: fx.Node, facts: Context, tokens: int) -> dict[Candidate, Callable[[], Any]]:
    """Two kernels and one on random activations, with the weights that they have."""
    x, y = activations(first), fake(second)
    assert x is not None
    assert y is not None
    # Its own generator: compiling must not change the random numbers that a model draws.
    generator = torch.Generator(y.device).manual_seed(0)

    def random(features: int) -> torch.Tensor:
        return torch.randn(tokens, features, device=y.device, generator=generator).to(y.dtype)

    drawn = random(int(x.shape[-1]))
    residual = random(y.shape[-1]) if argument(second, "residual") is not None else None
    layers = fx.map_arg((_layer(first), _layer(second)), facts.value)
    activation, op, product = argument(first, "activation"), dispatch.mlp_op(_kernel(second)), second.target
    assert callable(product)
    operands = _operands(layers[0], layers[1], lambda tensor, indices: tensor[indices], torch.argsort)

    def apart() -> Any:
        return product(product(drawn, *layers[0], activation), *layers[1], "none", residual)

    def fused(*tile: int) -> Callable[[], Any]:
        return lambda: op(drawn, *operands, activation, residual, *tile)

    tiles: Sequence[int] = _TILES if _kernel(second) == "native" else ()
    return {
        APART: apart,
        Candidate("fused"): fused(),
        **{Candidate("fused", Tile(tokens, outputs=0, depth=0)): fused(tokens) for tokens in tiles},
    }
