"""native_linear(x, S, b, activation) * g  ==  native_linear(x, S, b, activation, gate=g)

Gated layers, SwiGLU `silu(gate(x)) * up(x)` and GEGLU `gelu(gate(x)) * up(x)`, multiply two products of one input. The kernel
of the second reads the result of the first where it writes its own, while its sums are in cache: that spares writing one of the
two wide tensors, reading it again, and a pass over both. Either factor may have the activation, because the other one is
finished by then. The kernels multiply in float32, before they round. Expects `FuseActivation` before it, whose function comes
before the factor, and `ChooseKernels` before that, which calls native kernels in inference alone. Needs no values.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from padst_compile.passes.fuse_operand import FuseOperand
from padst_compile.passes.graph import argument


class FuseGate(FuseOperand):
    """Moves the multiplication by a tensor into the kernel that computes one of its factors."""

    operators = (operator.mul, torch.mul, torch.ops.aten.mul.Tensor)
    argument_name = "gate"

    def blocked(self, linear: fx.Node) -> str | None:
        """The kernel takes one factor, and applies it before it adds."""
        if argument(linear, "gate") is not None:
            return "the kernel multiplies by another tensor already"
        return None if argument(linear, "residual") is None else "the kernel adds another tensor first"
