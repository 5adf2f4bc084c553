"""What else multiplies a sparse layer: dense, PyTorch's own sparse formats, and a gather with a batched product."""

from __future__ import annotations

import copy
import dataclasses
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._inductor.config as inductor_config
from torch import nn
from torch.nn import functional as F
from torch.sparse import to_sparse_semi_structured

from padst_compile import SparsitySpec, densify, sparsify
from padst_compile.backend import padst
from padst_compile.benchmarking.run import own_code
from padst_compile.kernels.block.aten import BlockFormat
from padst_compile.structures import Block, Shape, Structure, Topology

Run = Callable[[], torch.Tensor]
PEERS = ("torch BSR", "torch CSR", "gather + bmm")
GPU_PEERS = ("torch 2:4", "blksprs", "torch BSR, tuned")

DENSE, DENSE_TUNED, OURS, UNPERMUTED = "dense", "dense, tuned", "padst", "padst, no permutation"


def _as_it_is(result: torch.Tensor) -> torch.Tensor:
    return result


@dataclasses.dataclass(frozen=True)
class Ready:
    """A candidate that can be timed.

    Args:
        run: what is timed.
        weight: what it multiplies by; None for the layer's.
        read: its result as [tokens, out_features] with the bias added.
    """

    run: Run
    weight: torch.Tensor | None = None
    read: Callable[[torch.Tensor], torch.Tensor] = _as_it_is


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

    def candidates(self, *, tuned_peers: bool) -> Iterator[tuple[str, Callable[[], Ready]]]:
        """Names, and what makes each candidate ready; that raises where it does not support the layer.

        Args:
            tuned_peers: whether minutes may be spent on tuning peers.
        """
        yield DENSE, lambda: Ready(self._compiled(self.dense), self.dense.weight)
        yield DENSE_TUNED, lambda: Ready(self._dense_tuned(), self.dense.weight)
        yield OURS, lambda: self._ours("random")
        yield UNPERMUTED, lambda: self._ours("none")
        yield "torch BSR", self._block_rows
        yield "torch CSR", self._rows
        yield "gather + bmm", self._gathered
        if self.device.type == "cuda":
            yield "torch 2:4", self._two_of_four
            yield "blksprs", self._blksprs
            if tuned_peers:
                yield "torch BSR, tuned", self._block_rows_tuned

    def products(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The dense product with `weight`, in float64 and in the dtype of the layer."""
        weight = weight.detach()
        exact = F.linear(self.x.double(), weight.double(), self.bias.double())
        return exact, F.linear(self.x, weight.to(self.x.dtype), self.bias)

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

    def _ours(self, permutation: str) -> Ready:
        spec = SparsitySpec(self.structure, self.sparsity, permutation=permutation)
        model = nn.Sequential(nn.Linear(self.shape.in_features, self.shape.out_features))
        model[0].load_state_dict({"weight": self.dense.weight.float(), "bias": self.dense.bias.float()})
        sparse = sparsify(model, spec).to(self.device, self.x.dtype)
        run = self._compiled(sparse, backend=padst, options={"kernels": "sparse"})
        return Ready(run, densify(copy.deepcopy(sparse))[0].weight)

    def _block_rows(self) -> Ready:
        weight = self._bsr()
        return Ready(lambda: F.linear(self.x, weight, self.bias))

    def _block_rows_tuned(self) -> Ready:
        """PyTorch's Triton kernel, whose own search is kept for this process; without it, it knows one GPU."""
        from torch.sparse._triton_ops import bsr_dense_addmm
        from torch.sparse._triton_ops_meta import tune_bsr_dense_addmm

        weight, bias, columns = self._bsr(), self.bias[:, None].expand(-1, self.x.shape[0]), self.x.T
        tune_bsr_dense_addmm(bias, weight, columns, store=True)
        return Ready(lambda: bsr_dense_addmm(bias, weight, columns), read=lambda y: y.T)

    def _bsr(self) -> torch.Tensor:
        blocks = self._blocks()
        return self.weight.to_sparse_bsr((blocks.rows, blocks.columns))

    def _rows(self) -> Ready:
        weight, bias = self.weight.to_sparse_csr(), self.bias[:, None]
        return Ready(lambda: (weight @ self.x.T + bias).T)

    def _gathered(self) -> Ready:
        blocks, out, product = self._blocks(), self.shape.out_features, BlockFormat()
        return Ready(lambda: product.forward(blocks, self.x, self.values, self.topology, out) + self.bias)

    def _blocks(self) -> Block:
        if not isinstance(self.structure, Block):
            raise TypeError("no blocks")
        return self.structure

    def _two_of_four(self) -> Ready:
        """Half of the weights: what the hardware's own sparsity takes, whatever the structure would be."""
        pattern = torch.tensor([0, 0, 1, 1], device=self.device, dtype=torch.bool)
        kept = self.dense.weight.detach() * pattern.repeat(self.shape.in_features // 4)
        weight = nn.Parameter(to_sparse_semi_structured(kept))
        return Ready(lambda: F.linear(self.x, weight, self.bias), kept)

    def _blksprs(self) -> Ready:
        """Its product alone: activations are in its form before and after, and nothing is added."""
        ops = importlib.import_module("blksprs").ops
        side = self._blocks().rows
        tokens = self.x.shape[0]
        if self._blocks().columns != side or tokens % side:
            raise TypeError("blocks must be square, and divide the tokens")
        matrix = self.weight.T.contiguous()[None]
        tiles = matrix.unflatten(2, (-1, side)).unflatten(1, (-1, side))
        kept = (tiles != 0).any(4).any(2)
        full = torch.ones(1, tokens // side, kept.shape[1], dtype=torch.bool, device=self.device)
        result = torch.ones(1, tokens // side, kept.shape[2], dtype=torch.bool, device=self.device)
        x, w = ops.to_blksprs(self.x[None].contiguous(), full, side), ops.to_blksprs(matrix, kept, side)
        cache: dict[str, Any] = {}
        return Ready(
            lambda: ops.matmul(x, full, w, kept, result, side, layout_cache=cache),
            read=lambda y: ops.from_blksprs(y, result, side)[0] + self.bias,
        )
