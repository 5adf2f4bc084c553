"""Questions about calls of the native (C++) and Triton kernels, which `ChooseKernels` makes in inference alone."""

from __future__ import annotations

import torch
from torch import fx

from padst_compile.passes.graph import argument

_NAMESPACES = ("padst_native", "padst_triton")
_ROW_GATHER = ("padst_native.nm_linear.default", "padst_native.diagonal_linear.default")


def is_native_linear(node: object) -> bool:
    """Whether `node` calls such a kernel; false where there are none, because nothing made such a call."""
    if not isinstance(node, fx.Node) or not isinstance(node.target, torch._ops.OpOverload):
        return False
    return node.target.namespace in _NAMESPACES and node.target._schema.name.endswith("_linear")


def is_row_gather(node: object) -> bool:
    """Whether `node` calls the C++ kernel for short rows, which works on panels of tokens: N:M and diagonal products."""
    return isinstance(node, fx.Node) and is_native_linear(node) and str(node.target) in _ROW_GATHER


def layouts(node: fx.Node) -> tuple[str, ...]:
    """The sides on which a native call keeps its activations feature-major."""
    if not is_row_gather(node):
        return ()
    reads = ("feature-major input",) if argument(node, "panels_of") is not None else ()
    return reads + (("feature-major output",) if argument(node, "to_panels") else ())


def epilogue(node: fx.Node) -> tuple[str, ...]:
    """What a native call does after its bias: any of "activation", "gate" and "residual", in this order."""
    activation = ("activation",) if argument(node, "activation") != "none" else ()
    return activation + tuple(name for name in ("gate", "residual") if argument(node, name) is not None)
