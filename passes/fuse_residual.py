"""native_linear(x, S, b, activation, gate=g) + r  ==  native_linear(x, S, b, activation, gate=g, residual=r)

The kernels finish a tile of sums while it is in cache; adding another tensor there spares reading the outputs again and
writing the sum. Expects `FuseActivation` and `FuseGate` before it, and `ChooseKernels` before those, which calls native kernels
in inference alone. Needs no values.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from padst_compile.passes.fuse_operand import FuseOperand
from padst_compile.passes.graph import argument


class FuseResidual(FuseOperand):
    """Moves the addition of a tensor into the kernel that computes one of its terms."""

    operators = (operator.add, torch.add, torch.ops.aten.add.Tensor)
    argument_name = "residual"

    def blocked(self, linear: fx.Node) -> str | None:
        """One term is all that the kernel takes."""
        return None if argument(linear, "residual") is None else "the kernel adds another tensor already"
