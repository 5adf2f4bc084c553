"""row_gather(x, V, …)  ==  row_gather(x, float(V), …)

The C++ kernels for N:M and diagonals multiply in float32, so weights of 16 bits are converted first: by each call, or once for
all of them. A handful of tokens takes about the time in which its weights are read, and converting them writes and reads twice
as many bytes as they have. Every 16-bit number is one of float32, so results stay the same to the last bit; weights take twice
their memory besides. Expects `ChooseKernels` before it, which calls native kernels in inference alone. Needs no values, but
parameters that stay.
"""

from __future__ import annotations

import torch
from torch import fx

from padst_compile.passes.base import RewriteRule
from padst_compile.passes.context import Context
from padst_compile.passes.graph import argument, fake, set_arguments
from padst_compile.passes.native_calls import is_row_gather
from padst_compile.structures import NM, Diagonal, Structure


class WidenValues(RewriteRule):
    """Hoists the conversion of 16-bit weights out of native products of short rows."""

    def matches(self, node: fx.Node) -> bool:
        """A native product of N:M or diagonals in 16 bits."""
        result = fake(node)
        return is_row_gather(node) and result is not None and result.dtype != torch.float32

    def why_not(self, node: fx.Node, facts: Context) -> str | None:
        """The weights must be parameters, and of 16 bits still."""
        values = argument(node, "values")
        if not facts.inference or not facts.is_static(values):
            return "the weights are computed from the inputs"
        return "the weights are float32 already" if facts.value(values).dtype == torch.float32 else None

    def rewrite(self, node: fx.Node, facts: Context) -> None:
        """Hoist the conversion."""
        with node.graph.inserting_before(node):
            wide = node.graph.call_function(torch.ops.aten.to.dtype, (argument(node, "values"), torch.float32))
        set_arguments(node, values=facts.hoist(wide))


def widened(structure: Structure, values: torch.Tensor) -> torch.Tensor:
    """The weights of a native product as the rule would have them: what a measurement should run on."""
    return values.float() if isinstance(structure, (NM, Diagonal)) else values
