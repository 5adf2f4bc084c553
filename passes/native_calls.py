"""Questions about calls of the native (C++) and Triton kernels, which `ChooseKernels` makes in inference alone."""

from __future__ import annotations

import torch
from torch import fx

from padst_compile.passes.graph import argument

_NAMESPACES = ("padst_native", "padst_triton")


def is_native_linear(node: object) -> bool:
    """Whether `node` calls such a kernel; false where there are none, because nothing made such a call."""
    if not isinstance(node, fx.Node) or not isinstance(node.target, torch._ops.OpOverload):
        return False
    return node.target.namespace in _NAMESPACES


def epilogue(node: fx.Node) -> tuple[str, ...]:
    """What a native call does after its bias: any of "activation" and "residual", in this order."""
    activation = ("activation",) if argument(node, "activation") != "none" else ()
    return activation + (("residual",) if argument(node, "residual") is not None else ())
