"""Questions about calls of the native (C++) and Triton kernels, which `ChooseKernels` makes in inference alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import fx

from padst_compile.passes.graph import argument, fake

_NAMESPACES = ("padst_native", "padst_triton")
_BLOCKS = ("padst_native.block_linear.default", "padst_triton.block_linear.default")
_NM = ("padst_native.nm_linear.default", "padst_triton.nm_linear.default")
_JOINED = "padst_joined"
_SECOND_HALF = "padst_second_half"
READS_FEATURES, WRITES_FEATURES = "feature-major input", "feature-major output"
_ROW_GATHER = ("padst_native.nm_linear.default", "padst_native.diagonal_linear.default")


def is_native_linear(node: object) -> bool:
    """Whether `node` calls such a kernel; false where there are none, because nothing made such a call."""
    if not isinstance(node, fx.Node) or not isinstance(node.target, torch._ops.OpOverload):
        return False
    return node.target.namespace in _NAMESPACES and node.target._schema.name.endswith("_linear")


def is_row_gather(node: object) -> bool:
    """Whether `node` calls the C++ kernel for short rows, which works on panels of tokens: N:M and diagonal products."""
    return isinstance(node, fx.Node) and is_native_linear(node) and str(node.target) in _ROW_GATHER


def is_triton_linear(node: object) -> bool:
    """Whether `node` calls a Triton kernel."""
    return isinstance(node, fx.Node) and is_native_linear(node) and str(node.target).startswith("padst_triton.")


def is_block_linear(node: object) -> bool:
    """Whether `node` calls a kernel for blocks."""
    return isinstance(node, fx.Node) and is_native_linear(node) and str(node.target) in _BLOCKS


def is_nm_linear(node: object) -> bool:
    """Whether `node` calls a kernel for N:M."""
    return isinstance(node, fx.Node) and is_native_linear(node) and str(node.target) in _NM


def activations(node: fx.Node) -> torch.Tensor | None:
    """What capture recorded of the activations that a native call reads, maybe in another dtype: a pass may have cast them."""
    x = argument(node, "x")
    known = fake(x)
    return fake(x.args[0]) if known is None and x.args else known


def layouts(node: fx.Node) -> tuple[str, ...]:
    """The sides on which a native call keeps its activations feature-major."""
    if is_triton_linear(node):
        x = argument(node, "x")
        reads, writes = is_triton_linear(x) and argument(x, "feature_major"), argument(node, "feature_major")
    elif is_row_gather(node):
        reads, writes = argument(node, "panels_of") is not None, argument(node, "to_panels")
    else:
        return ()
    return ((READS_FEATURES,) if reads else ()) + ((WRITES_FEATURES,) if writes else ())


def reads_as_input(user: fx.Node, node: fx.Node) -> bool:
    """Whether a native call takes `node` as activations, and as nothing else."""
    others = ("residual", "gate")
    return argument(user, "x") is node and all(argument(user, name) is not node for name in others)


def gate_follows(node: fx.Node, is_product: Callable[[fx.Node], bool]) -> bool:
    """Whether what gates a native call, if anything does, is a product that can be laid out anew for that call alone.

    Args:
        node: the call.
        is_product: which calls can be laid out so.
    """
    gate = argument(node, "gate")
    if gate is None:
        return True
    alone = is_product(gate) and len(gate.users) == 1 and argument(node, "x") is not gate and fake(gate) is not None
    return alone and argument(gate, "gate") is None and argument(gate, "residual") is None


def epilogue(node: fx.Node) -> tuple[str, ...]:
    """What a native call does after its bias: any of "activation", "gate" and "residual", in this order."""
    activation = ("activation",) if argument(node, "activation") != "none" else ()
    return activation + tuple(name for name in ("gate", "residual") if argument(node, name) is not None)


@dataclasses.dataclass(frozen=True)
class Joined:
    """What became of a native call that does not stand alone any more, or not as one.

    Args:
        fused: what the call did besides multiplying, and "mlp"; of both calls where it became two.
        reason: why two calls became one, or one two; empty for the second of them.
    """

    fused: tuple[str, ...]
    reason: str = ""


def note_joined(node: fx.Node, reason: str = "") -> None:
    """Remember what a native call did, before it becomes part of another."""
    node.meta[_JOINED] = Joined((*epilogue(node), "mlp"), reason)


def note_second_half(first: fx.Node, second: fx.Node) -> None:
    """Remember of a native call which other one computes the second half of its outputs."""
    first.meta[_SECOND_HALF] = second.name


def fate(node: fx.Node) -> Joined:
    """What a call that was native when it was made does besides multiplying, whatever became of it."""
    joined = node.meta.get(_JOINED)
    own = joined if isinstance(joined, Joined) else Joined(epilogue(node) + layouts(node))
    second = next((other for other in node.graph.nodes if other.name == node.meta.get(_SECOND_HALF)), None)
    if second is None:
        return own
    both = tuple(dict.fromkeys(own.fused + fate(second).fused))
    return Joined(both, "; ".join(filter(None, (own.reason, "one product for each half of its outputs"))))
