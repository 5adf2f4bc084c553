"""What a measurement runs to compare the kernels of a structured product."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from padst_compile.autotune.problem import Kernel
from padst_compile.autotune.search import Checked, Run
from padst_compile.kernels.cusparselt.op import two_of_four_linear, two_of_four_pack
from padst_compile.kernels.cusparselt.trial import assert_exact
from padst_compile.passes.graph import STRUCTURED_LINEAR
from padst_compile.passes.interleave_blocks import interleaved
from padst_compile.passes.widen_values import widened
from padst_compile.structures import Shape, Structure, Topology


@dataclasses.dataclass(frozen=True)
class Trial:
    """A structured product with the weights that it has, to be run on random activations.

    Args:
        structure: of the weight.
        shape: of the layer.
        values: the active weights, in the dtype of the product.
        topology: the structure's index tensors.
        bias: `[out_features]`, or None.
        tables: the permutations of inputs and of outputs, int32, or None.
    """

    structure: Structure
    shape: Shape
    values: torch.Tensor
    topology: Topology
    bias: torch.Tensor | None
    tables: tuple[torch.Tensor | None, torch.Tensor | None]

    def runs(self, tokens: int, kernels: tuple[Kernel, ...], *, training: bool) -> dict[Kernel, Run]:
        """The product on its kernels, the structure's first, with the backward pass while training."""
        sparse, *_ = kernels
        values, device, dtype = self.values, self.values.device, self.values.dtype
        # Its own generator: compiling must not change the random numbers that a model draws.
        generator = torch.Generator(device).manual_seed(0)
        x = torch.randn(tokens, self.shape.in_features, device=device, generator=generator).to(dtype).requires_grad_(training)
        weight = self.structure.unpack(values, self.topology, self.shape).requires_grad_(training)
        values = values.clone().requires_grad_(training)
        if not training and sparse == "native":
            values = widened(self.structure, interleaved(self.structure, values, self.topology, self.shape))
        size, name = self.shape.out_features, self.structure.to_string()

        def run(product: Callable[[], torch.Tensor]) -> Callable[[], Any]:
            def once() -> None:
                with torch.set_grad_enabled(training):
                    y = product()
                if training:
                    y.backward(torch.ones_like(y))

            return once

        found: dict[Kernel, Run] = {
            sparse: run(lambda: STRUCTURED_LINEAR(x, values, list(self.topology), self.bias, *self.tables, size, name)),
            "dense": run(lambda: F.linear(x, weight, self.bias)),
        }
        if "cusparselt" in kernels:
            packed = functools.cache(lambda: two_of_four_pack(weight))  # which may fail: then it is left out
            product = run(lambda: two_of_four_linear(x, packed(), self.bias, self.tables[0], size))
            found["cusparselt"] = Checked(product, lambda: assert_exact(weight, x, self.bias))
        return found
