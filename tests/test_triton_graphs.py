"""Triton kernels inside CUDA graphs: what is recorded once is right for other inputs and other weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import padst_compile as padst
from padst_compile.structures import NM, Block, Diagonal, Structure
from padst_compile.tolerance import allowed_error, relative_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU to record graphs on")

STRUCTURES = (Block(16), NM(1, 4, vector=16), NM(1, 4), Diagonal())
WAYS: tuple[dict[str, Any], ...] = (
    {"mode": "reduce-overhead"},
    {"options": {"triton.cudagraphs": True, "kernels": "sparse"}},
)


@pytest.mark.parametrize("way", WAYS, ids=["measured", "sparse"])
@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda s: s.to_string())
def test_recorded_graphs_take_other_inputs_and_weights(structure: Structure, way: dict[str, Any]) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    counters.clear()
    spec = padst.SparsitySpec(structure, structure.natural_sparsity() or 0.75, permutation="random")
    model = padst.sparsify(nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)), spec).cuda()
    compiled = torch.compile(model, backend="padst", **way)

    def check() -> None:
        x = torch.randn(48, 64, device="cuda")
        exact = padst.densify(copy.deepcopy(model)).double()(x.double())
        bound = allowed_error(relative_error([model(x)], [exact]), torch.float32)
        assert relative_error([compiled(x).clone()], [exact]) <= bound

    with torch.no_grad():
        for _ in range(4):  # warmed up, recorded, replayed
            check()
        model[0].values.mul_(-2.0)
        for _ in range(2):
            check()
    assert counters["inductor"]["cudagraph_skips"] == 0


def test_an_operator_is_recorded_and_replayed() -> None:
    layer = padst.sparsify(nn.Sequential(nn.Linear(64, 64)), padst.SparsitySpec(Block(16), 0.5, permutation="random")).cuda()
    x = torch.randn(16, 64, device="cuda")
    with torch.no_grad():
        layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        x.copy_(torch.randn(16, 64, device="cuda"))
        graph.replay()
        assert torch.equal(y, layer(x))
