"""block_linear(x, B, …)  ==  block_linear(x, interleave(B), …)

The micro-kernel for 16-bit numbers multiplies pairs of inputs: it reads a block [inputs, outputs] as [inputs / 2, outputs, 2].
Arranged once for all calls, blocks need not be arranged in each: of a product with few tokens that is half of the time.
Expects `ChooseKernels` before it, which calls native kernels in inference alone. Needs no values, but parameters that stay.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from padst_compile.kernels import native
from padst_compile.passes.base import RewriteRule
from padst_compile.passes.context import Context
from padst_compile.passes.graph import argument, fake, set_arguments
from padst_compile.passes.native_calls import is_native_linear
from padst_compile.structures import Block, Shape, Structure


class InterleaveBlocks(RewriteRule):
    """Hoists the arrangement of 16-bit blocks out of native block products."""

    def matches(self, node: fx.Node) -> bool:
        """A native block product whose micro-kernel reads pairs of inputs."""
        if not is_native_linear(node) or "block_linear" not in str(node.target):
            return False
        result = fake(node)
        return result is not None and result.device.type == "cpu" and native.interleaves(result.dtype)

    def why_not(self, node: fx.Node, facts: Context) -> str | None:
        """The blocks must be parameters, and hold whole pairs."""
        values = argument(node, "values")
        if not facts.inference or not facts.is_static(values):
            return "the weights are computed from the inputs"
        value = facts.value(values)
        if value.dim() != 3:  # [blocks, columns, rows]
            return "the blocks are interleaved already"
        return "a block has an odd number of inputs" if value.shape[1] % 2 else None

    def rewrite(self, node: fx.Node, facts: Context) -> None:
        """Hoist the arrangement of the blocks."""
        names = ("values", "row_pointers", "columns")
        with node.graph.inserting_before(node):
            arranged = node.graph.call_function(
                torch.ops.padst_native.interleave_blocks.default,
                (*(argument(node, name) for name in names), _in_features(node), argument(node, "out_features")),
            )
        set_arguments(node, values=facts.hoist(arranged))


def interleaved(structure: Structure, values: torch.Tensor, topology: Sequence[torch.Tensor], shape: Shape) -> torch.Tensor:
    """The blocks of a native product as the rule would have them arranged, or as they are: what a measurement should run on."""
    if not isinstance(structure, Block) or structure.columns % 2 or not native.interleaves(values.dtype):
        return values
    arranged: torch.Tensor = torch.ops.padst_native.interleave_blocks(values, *topology, shape.in_features, shape.out_features)
    return arranged


def _in_features(node: fx.Node) -> int:
    """Under autocast the activations are a cast, made by a pass, of what capture recorded."""
    x = argument(node, "x")
    known = fake(x) if fake(x) is not None else fake(x.args[0])
    assert known is not None
    return int(known.shape[-1])
