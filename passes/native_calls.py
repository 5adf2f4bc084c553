"""Questions about calls of the native kernels, which `ChooseKernels` makes in inference alone."""

from __future__ import annotations

import torch
from torch import fx

from padst_compile.passes.graph import argument


def is_native_linear(node: object) -> bool:
    """Whether `node` calls a native kernel; false where there are none, because nothing made such a call."""
    return (
        isinstance(node, fx.Node) and isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "padst_native"
    )


def epilogue(node: fx.Node) -> tuple[str, ...]:
    """What a native call does after its bias: any of "activation" and "residual", in this order."""
    activation = ("activation",) if argument(node, "activation") != "none" else ()
    return activation + (("residual",) if argument(node, "residual") is not None else ())
