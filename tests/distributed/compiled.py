"""Run by torchrun: `compiled.py RESULTS` trains compiled models on several ranks beside eager ones, and compares.

Eager and compiled programs add in another order, so weights agree to rounding in float64; topology and permutations exactly.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
from torch import distributed, fx, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import padst_compile as padst
from padst_compile import backend as compiler
from padst_compile.passes.graph import STRUCTURED_LINEAR
from padst_compile.testing.ranks import leave

STEPS = 10
SPARSE_LAYERS = 2
Wrap = Callable[[nn.Module], nn.Module]
COMPILED: list[int] = []  # sparse products in each graph that was compiled


def backend(graph: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
    COMPILED.append(sum(node.target is STRUCTURED_LINEAR for part in _modules(graph) for node in part.graph.nodes))
    return compiler.padst(graph, example_inputs)


def _modules(graph: fx.GraphModule) -> list[fx.GraphModule]:
    return [module for module in graph.modules() if isinstance(module, fx.GraphModule)]


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def ddp_then_compile(model: nn.Module) -> nn.Module:
    """Dynamo divides the graph at buckets of gradients, here before the last layer, which fills the first one."""
    return cast("nn.Module", torch.compile(DistributedDataParallel(model, bucket_cap_mb=1), backend=backend))


def compile_then_ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(cast("nn.Module", torch.compile(model, backend=backend)))


def compiled_in_place_then_ddp(model: nn.Module) -> nn.Module:
    model.compile(backend=backend)
    return DistributedDataParallel(model)


def fsdp(model: nn.Module) -> nn.Module:
    for child in model:  # type: ignore[attr-defined]  # a Sequential
        if any(True for _ in child.parameters()):
            fully_shard(child)
    return cast("nn.Module", fully_shard(model))


def fsdp_then_compile(model: nn.Module) -> nn.Module:
    return cast("nn.Module", torch.compile(fsdp(model), backend=backend))


def compiled_layers_then_fsdp(model: nn.Module) -> nn.Module:
    for child in model:  # type: ignore[attr-defined]  # a Sequential
        child.compile(backend=backend)
    return fsdp(model)


def make_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 8200)).double()
    return padst.sparsify(model, padst.SparsitySpec(padst.Block(4), 0.5, permutation="learned", ignore=("4",)))


def inputs(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * step + distributed.get_rank())
    return torch.randn(8, 16, dtype=torch.float64, generator=generator)


def config() -> padst.DSTConfig:
    learned = padst.LearnedPermutation("sinkhorn_ste", deadline=1.0, learning_rate=10.0)
    return padst.DSTConfig("rigl", interval=3, end=1.0, total_steps=STEPS, permutation=learned, check_invariants=True)


def train(wrap: Wrap) -> tuple[dict[str, torch.Tensor], list[float], list[list[int]]]:
    """Whole weights at the end with what the model then answers, losses, and what was `COMPILED` after each step."""
    torch.compiler.reset()
    COMPILED.clear()
    model = wrap(make_model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    runtime = padst.attach(model, optimizer, config())
    losses, graphs = [], []
    for step in range(STEPS):
        loss = model(inputs(step)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        graphs.append(list(COMPILED))
    assert runtime.updates == 3, f"{runtime.updates} updates, {runtime.skipped} skipped"
    padst.finalize(model)
    with torch.no_grad():
        answer = model(inputs(STEPS))
    return {**whole(model), "answer": answer}, losses, graphs


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name.replace("module.", "").replace("_orig_mod.", ""): value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in model.state_dict().items()
    }


def compare(eager: Wrap, compiled: Wrap, fewest: int) -> None:
    expected, losses, none = train(eager)
    found, its_losses, graphs = train(compiled)
    assert not none[-1] and graphs[0] == graphs[-1], f"compiled in each step: {graphs}"
    assert len(graphs[0]) >= fewest and sum(graphs[0]) == SPARSE_LAYERS, f"compiled in the first step: {graphs[0]}"
    assert expected.keys() == found.keys()
    torch.testing.assert_close(torch.tensor(its_losses), torch.tensor(losses), rtol=1e-6, atol=1e-6)
    for name, tensor in expected.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-9, msg=name)
        else:
            assert torch.equal(found[name], tensor), name
    before = make_model().state_dict()
    for name in ("0.permutation", "2.permutation"):
        assert not torch.equal(found[name], before[name]), f"{name} was not learned"


SCENARIOS: dict[str, tuple[Wrap, Wrap, int]] = {  # eager, compiled, least number of graphs
    "ddp, then compile": (ddp, ddp_then_compile, 2),
    "compile, then ddp": (ddp, compile_then_ddp, 1),
    "compile in place, then ddp": (ddp, compiled_in_place_then_ddp, 1),
    "fsdp, then compile": (fsdp, fsdp_then_compile, 2),
    "compile layers, then fsdp": (fsdp, compiled_layers_then_fsdp, 2),
}


def problem_of(scenario: str) -> str | None:
    try:
        compare(*SCENARIOS[scenario])
    except Exception:
        return traceback.format_exc()
    return None


def main() -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", timeout=timedelta(seconds=120))
    results: dict[str, Any] = {name: problem_of(name) for name in SCENARIOS}
    if distributed.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(results))
    leave()


if __name__ == "__main__":
    main()
