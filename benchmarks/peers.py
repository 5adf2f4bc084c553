"""What else multiplies a sparse layer: dense, PyTorch's own sparse formats, and a gather with a batched product."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._inductor.config as inductor_config
from torch import nn
from torch.nn import functional as F
from torch.sparse import to_sparse_semi_structured

from padst_compile import SparsitySpec, sparsify
from padst_compile.backend import padst
from padst_compile.benchmarking.run import own_code
from padst_compile.kernels.block.aten import BlockFormat
from padst_compile.structures import Block, Shape, Structure, Topology

Run = Callable[[], torch.Tensor]

DENSE, DENSE_TUNED, OURS, UNPERMUTED = "dense", "dense, tuned", "padst", "padst, no permutation"


class Layer:
    """One layer and its input, for all candidates alike.

    Args:
        structure: of S.
        sparsity: fraction of zeros.
        in_features: inputs.
        out_features: outputs.
        tokens: rows of the input.
        dtype: of weights and activations.
        device: where it runs.
    """

    def __init__(
        self, structure: Structure, sparsity: float, in_features: int, out_features: int, tokens: int, dtype: torch.dtype,
        device: torch.device,
    ) -> None:  # fmt: skip
        torch.manual_seed(0)
        self.shape, self.structure, self.sparsity = Shape(out_features, in_features), structure, sparsity
        self.device = device
        self.dense = nn.Linear(in_features, out_features).to(device, dtype)
        self.x = torch.randn(tokens, in_features, device=device, dtype=dtype)
        self.bias = self.dense.bias.detach()
        weight = self.dense.weight.detach()
        self.topology: Topology = structure.choose(weight.float().abs(), sparsity)
        self.values = structure.pack(weight, self.topology)
        self.weight = structure.unpack(self.values, self.topology, self.shape)

    @property
    def density(self) -> float:
        """Stored weights as a fraction of all."""
        return self.values.numel() / self.weight.numel()

    def candidates(self) -> Iterator[tuple[str, Callable[[], Run]]]:
        """Names, and what makes each candidate ready; that raises where it does not support the layer."""
        yield DENSE, lambda: self._compiled(self.dense)
        yield DENSE_TUNED, self._dense_tuned
        yield OURS, lambda: self._ours("random")
        yield UNPERMUTED, lambda: self._ours("none")
        yield "torch BSR", self._block_rows
        yield "torch CSR", self._rows
        yield "gather + bmm", self._gathered
        if self.device.type == "cuda":
            yield "torch 2:4", self._two_of_four

    def expected(self) -> torch.Tensor:
        """What those that multiply `weight` should return, in float64."""
        return F.linear(self.x.double(), self.weight.double(), self.bias.double())

    def _compiled(self, model: nn.Module, **options: Any) -> Run:
        compiled = torch.compile(own_code(model), **options)
        return lambda: compiled(self.x)  # type: ignore[no-any-return]  # a tensor

    def _dense_tuned(self) -> Run:
        if self.device.type == "cuda":
            return self._compiled(copy.deepcopy(self.dense), mode="max-autotune-no-cudagraphs")
        run = self._compiled(copy.deepcopy(self.dense))
        with inductor_config.patch(freezing=True):
            run()
        return run

    def _ours(self, permutation: str) -> Run:
        spec = SparsitySpec(self.structure, self.sparsity, permutation=permutation)
        model = nn.Sequential(nn.Linear(self.shape.in_features, self.shape.out_features))
        model[0].load_state_dict({"weight": self.dense.weight.float(), "bias": self.dense.bias.float()})
        sparse = sparsify(model, spec).to(self.device, self.x.dtype)
        return self._compiled(sparse, backend=padst, options={"kernels": "sparse"})

    def _block_rows(self) -> Run:
        blocks = self._blocks()
        weight = self.weight.to_sparse_bsr((blocks.rows, blocks.columns))
        return lambda: F.linear(self.x, weight, self.bias)

    def _rows(self) -> Run:
        weight, bias = self.weight.to_sparse_csr(), self.bias[:, None]
        return lambda: (weight @ self.x.T + bias).T

    def _gathered(self) -> Run:
        blocks, out, product = self._blocks(), self.shape.out_features, BlockFormat()
        return lambda: product.forward(blocks, self.x, self.values, self.topology, out) + self.bias

    def _blocks(self) -> Block:
        if not isinstance(self.structure, Block):
            raise TypeError("no blocks")
        return self.structure

    def _two_of_four(self) -> Run:
        """Half of the weights: what the hardware's own sparsity takes, whatever the structure would be."""
        pattern = torch.tensor([0, 0, 1, 1], device=self.device, dtype=torch.bool)
        kept = self.dense.weight.detach() * pattern.repeat(self.shape.in_features // 4)
        weight = nn.Parameter(to_sparse_semi_structured(kept))
        return lambda: F.linear(self.x, weight, self.bias)
