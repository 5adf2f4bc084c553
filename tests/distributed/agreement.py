"""Run by torchrun: trains small models on several ranks in every way, and compares ranks, and ranks with one process.

    torchrun ... agreement.py RESULTS    # JSON: for each scenario null, or what went wrong

A process that accumulates the micro-batches of all ranks computes the same as they do together: gradients and scores are added.
With two ranks the sums have two terms, so it is the same bit for bit; halving is exact.
"""

from __future__ import annotations

import copy
import hashlib
import json
import sys
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import padst_compile as padst
from padst_compile.conversion import sparse_layers
from padst_compile.testing.ranks import leave
from padst_compile.training.config import Method, PermutationMethod

STEPS = 13
Wrap = Callable[[nn.Module], nn.Module]


def make_model(structure: str, sparsity: float | None, permuted: str, side: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32), nn.GELU(), nn.Linear(32, 8))
    spec = padst.SparsitySpec(
        structure=structure,
        sparsity=sparsity,
        permutation=permuted,
        permutation_side=side,
        ignore=("4",),  # type: ignore[arg-type]  # literals
    )
    return padst.sparsify(model, spec)


def make_config(method: Method, permutation: PermutationMethod | None) -> padst.DSTConfig:
    return padst.DSTConfig(
        method=method,
        interval=4,
        end=1.0,
        total_steps=STEPS,
        final_sparsity=0.8 if method in ("magnitude", "dynadiag") else None,
        check_invariants=True,
        staggered=False,
        permutation=permutation and padst.LearnedPermutation(method=permutation, deadline=0.6, fraction=0.5, gain=0.0),
    )


def batch(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(8, 32, generator=generator), torch.randint(0, 8, (8,), generator=generator)


def data_parallel(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def sharded(model: nn.Module) -> nn.Module:
    for child in model:  # type: ignore[attr-defined]  # a Sequential
        if any(True for _ in child.parameters()):
            fully_shard(child)
    return sharded_as_one(model)


def sharded_as_one(model: nn.Module) -> nn.Module:
    """All parameters belong to the outermost module, which leaves them gathered between forward and backward."""
    fully_shard(model)
    return model


def sharded_narrow(model: nn.Module) -> nn.Module:
    fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    return model


def digest(value: Any) -> str:
    """Of all tensors and numbers in a nested state, whole tensors where they are sharded; a collective."""
    sha = hashlib.sha256()
    _feed(sha, value)
    return sha.hexdigest()


def _feed(sha: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        full = value.detach().full_tensor() if isinstance(value, DTensor) else value.detach()
        sha.update(full.reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        for name in value:
            sha.update(str(name).encode())
            _feed(sha, value[name])
    elif isinstance(value, (list, tuple)):
        for item in value:
            _feed(sha, item)
    else:
        sha.update(repr(value).encode())


def everything(model: nn.Module, optimizer: torch.optim.Optimizer, runtime: padst.Runtime) -> dict[str, Any]:
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    moments = [optimizer.state[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    return {"model": dict(inner.state_dict()), "moments": moments, "runtime": runtime.state_dict()["layers"]}


def same_on_all_ranks(own: str) -> bool:
    found: list[str | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, own)
    return len(set(found)) == 1


def solo() -> distributed.ProcessGroup:
    """A group of this rank alone; made once, by all ranks."""
    if not _SOLO:
        groups = [distributed.new_group([rank]) for rank in range(distributed.get_world_size())]
        _SOLO.append(groups[distributed.get_rank()])
    return _SOLO[0]


_SOLO: list[Any] = []


def train(
    wrap: Wrap,
    structure: str,
    sparsity: float | None,
    method: Method,
    permutation: PermutationMethod | None = None,
    side: str = "input",
    exact: bool = True,
) -> None:
    """Train on all ranks; after every step all have the same, and with two the same as one process (`exact`)."""
    world, rank = distributed.get_world_size(), distributed.get_rank()
    alone = make_model(structure, sparsity, "none" if permutation is None else "learned", side)
    model = wrap(copy.deepcopy(alone))
    config = make_config(method, permutation)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    runtime = padst.attach(model, optimizer, config)
    before = digest(topology(model))
    reference = torch.optim.AdamW(alone.parameters(), lr=3e-3)
    reference_runtime = padst.attach(alone, reference, config, process_group=solo())
    for step in range(STEPS):
        inputs, targets = batch(step, rank)
        cross_entropy(model(inputs).float(), targets).backward()
        if step % 2:
            with torch.no_grad():
                model(inputs)  # leaves FSDP2's parameters gathered when the hook runs
        optimizer.step()
        optimizer.zero_grad()
        for other in range(world):
            inputs, targets = batch(step, other)
            (cross_entropy(alone(inputs), targets) / world).backward()
        reference.step()
        reference.zero_grad()
        own = digest(everything(model, optimizer, runtime))
        assert same_on_all_ranks(own), f"step {step + 1}: the ranks differ"
        if exact and world == 2:
            theirs = digest(everything(alone, reference, reference_runtime))
            assert own == theirs, f"step {step + 1}: not what one process computes; {differences(model, alone)}"
    assert method == "dynadiag" or runtime.updates == 3, f"{runtime.updates} updates, {runtime.skipped} skipped"
    if method not in ("magnitude", "dynadiag"):
        assert digest(topology(model)) != before, "no update changed anything"
    if permutation is not None:
        assert all(learner.hard for learner in runtime.learners.values()), "a permutation is soft after the deadline"
    finish(model, alone, exact and world == 2)


def topology(model: nn.Module) -> dict[str, Any]:
    return {name: [*layer.topology, layer.permutation] for name, layer in sparse_layers(model)}


def differences(model: nn.Module, alone: nn.Module) -> str:
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    other = alone.state_dict()
    found = []
    for name, tensor in inner.state_dict().items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if not torch.equal(full, other[name]):
            found.append(f"{name} by {(full.double() - other[name].double()).abs().max():.1e}")
    return ", ".join(found) or "the weights agree"


def finish(model: nn.Module, alone: nn.Module, exact: bool) -> None:
    inputs, _ = batch(99, 0)
    was_sharded = [isinstance(parameter, DTensor) for parameter in model.parameters()]
    with torch.no_grad():
        model(inputs)
    padst.finalize(model)
    padst.finalize(alone)
    assert [isinstance(parameter, DTensor) for parameter in model.parameters()] == was_sharded, "finalize changed the sharding"
    with torch.no_grad():
        y, theirs = model(inputs), alone(inputs)
    assert same_on_all_ranks(digest(y)), "the finished models differ among ranks"
    if exact:
        torch.testing.assert_close(y, theirs)


def different_models() -> None:
    """Ranks whose topologies differ from the start are refused, on every rank."""
    model = make_model("block:8", 0.6, "none", "input", seed=distributed.get_rank())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    message = ""
    try:
        padst.attach(model, optimizer, make_config("set", None))
    except padst.errors.AttachError as error:
        message = str(error)
    assert "ranks' models differ" in message, message or "not refused"


def one_rank_sees_nan() -> None:
    """An update is left out on all ranks if one rank's gradients are not finite, and no rank waits for another."""
    model = data_parallel(make_model("block:8", 0.6, "learned", "input"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    runtime = padst.attach(model, optimizer, make_config("rigl", "autoshuffle"))
    for step in range(4):
        inputs, targets = batch(step, distributed.get_rank())
        if step == 3 and distributed.get_rank() == 1:
            inputs[0, 0] = torch.nan
        cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (runtime.updates, runtime.skipped) == (0, 1), f"{runtime.updates} updates, {runtime.skipped} skipped"
    penalties = [learner.penalty for learner in runtime.learners.values()]
    assert same_on_all_ranks(repr(penalties)), "the soft permutations differ"
    assert all(0 <= penalty < 1 for penalty in penalties), f"penalties {penalties}"
    padst.finalize(model)


def tensor_parallel() -> None:
    """A layer split by columns is refused with the reason, and torch's own plan refuses to split it."""
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (distributed.get_world_size(),), mesh_dim_names=("tp",))
    model = make_model("block:8", 0.6, "none", "input")
    refusal = ""
    try:
        parallelize_module(model, mesh, {"0": ColwiseParallel()})
    except NotImplementedError as error:
        refusal = str(error)
    assert "nn.Linear" in refusal, refusal or "torch took the plan"
    for dimension, mesh_name in ((1, "dp"), (0, "tp"), (0, "dp"), (0, None)):
        model = make_model("block:8", 0.6, "none", "input")
        split_by_hand(model, dimension, mesh_name)
        refused(model)


def split_by_hand(model: nn.Module, dimension: int, mesh_name: str | None) -> nn.Parameter:
    """Make the values of the first sparse layer a DTensor."""
    names = None if mesh_name is None else (mesh_name,)
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),), mesh_dim_names=names)
    layer = dict(sparse_layers(model))["0"]
    layer.values = nn.Parameter(distribute_tensor(layer.values.detach(), mesh, [Shard(dimension)]))
    return layer.values


def refused(model: nn.Module) -> None:
    refusal = ""
    try:
        padst.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), make_config("set", None))
    except padst.errors.AttachError as error:
        refusal = str(error)
    assert "tensor parallelism" in refusal, refusal or "attach took it"
    assert "'0'" in refusal, refusal


def fsdp_and_others() -> None:
    """In a model under FSDP2, what FSDP2 was told to ignore, and what it sharded on top of another sharding, is refused."""
    ignoring = make_model("block:8", 0.6, "none", "input")
    fully_shard(ignoring, ignored_params={split_by_hand(ignoring, 0, None)})
    refused(ignoring)
    world = distributed.get_world_size()
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "model"))
    both = make_model("block:8", 0.5, "none", "input")
    layer = dict(sparse_layers(both))["0"]
    layer.values = nn.Parameter(distribute_tensor(layer.values.detach(), mesh["model"], [Shard(0)]))
    fully_shard(both[0], mesh=mesh["dp"])  # type: ignore[index]  # a Sequential
    refused(both)


def replicated_shards(model: nn.Module) -> nn.Module:
    """HSDP: sharded along one dimension of the mesh, replicated along the other."""
    world = distributed.get_world_size()
    fully_shard(model, mesh=init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicas", "shards")))
    return model


def sharded_wide(model: nn.Module) -> nn.Module:
    fully_shard(model, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float64))
    return model


def accumulate(wrap: Wrap, communicate: str) -> None:
    """Growth counts micro-batches whose gradients FSDP2 keeps to itself until the last one, and none that were dropped.

    Weights stay as they are but for the topology, so that rounding in other orders decides nothing.
    """
    world, rank = distributed.get_world_size(), distributed.get_rank()
    alone = make_model("block:8", 0.6, "none", "input")
    model: Any = wrap(copy.deepcopy(alone))
    config = padst.DSTConfig(interval=1, total_steps=9, end=1.0, check_invariants=True)
    optimizer, reference = (torch.optim.SGD(each.parameters(), lr=0.0) for each in (model, alone))
    runtime = padst.attach(model, optimizer, config)
    reference_runtime = padst.attach(alone, reference, config, process_group=solo())
    before = digest(topology(model))
    for step in range(3):
        for part in range(3):
            getattr(model, communicate)(part == 2)
            inputs, targets = batch(10 * step + part, rank)
            cross_entropy(model(inputs), targets).backward()
            for other in range(world):
                inputs, targets = batch(10 * step + part, other)
                (cross_entropy(alone(inputs), targets) / world).backward()
        if step != 1:  # that one's gradients are dropped
            optimizer.step()
            reference.step()
        optimizer.zero_grad()
        reference.zero_grad()
        assert digest(topology(model)) == digest(topology(alone)), f"step {step + 1}: not what one process computes"
    assert (runtime.updates, reference_runtime.updates) == (2, 2), f"{runtime.updates} updates, {runtime.skipped} skipped"
    assert digest(topology(model)) != before, "no update changed anything"
    padst.finalize(model)
    padst.finalize(alone)


SCENARIOS: dict[str, Callable[[], None]] = {
    "ddp block rigl": lambda: train(data_parallel, "block:8", 0.6, "rigl"),
    "ddp nm rigl regroup": lambda: train(data_parallel, "nm:1:4", None, "rigl", "regroup"),
    "ddp block rigl regroup output": lambda: train(data_parallel, "block:8", 0.6, "rigl", "regroup", "output"),
    "ddp block set autoshuffle": lambda: train(data_parallel, "block:8", 0.6, "set", "autoshuffle"),
    "ddp diagonal mest sinkhorn": lambda: train(data_parallel, "diagonal", 0.6, "mest", "sinkhorn_ste"),
    "ddp block rigl sinkhorn output": lambda: train(data_parallel, "block:8", 0.6, "rigl", "sinkhorn_ste", "output"),
    "ddp block magnitude": lambda: train(data_parallel, "block:8", 0.3, "magnitude"),
    "ddp diagonal dynadiag": lambda: train(data_parallel, "diagonal", 0.0, "dynadiag"),
    "fsdp block rigl": lambda: train(sharded, "block:8", 0.6, "rigl"),
    "fsdp even block rigl": lambda: train(sharded, "block:8", 0.5, "rigl"),
    "fsdp root nm rigl regroup": lambda: train(sharded_as_one, "nm:1:4", None, "rigl", "regroup"),
    "fsdp unstructured set": lambda: train(sharded, "unstructured", 0.6, "set"),
    "fsdp block set autoshuffle output": lambda: train(sharded_as_one, "block:8", 0.6, "set", "autoshuffle", "output"),
    "fsdp diagonal mest sinkhorn": lambda: train(sharded, "diagonal", 0.6, "mest", "sinkhorn_ste"),
    "fsdp block magnitude": lambda: train(sharded, "block:8", 0.3, "magnitude"),
    "fsdp diagonal dynadiag": lambda: train(sharded, "diagonal", 0.0, "dynadiag"),
    "fsdp bfloat16 block rigl sinkhorn": lambda: train(sharded_narrow, "block:8", 0.6, "rigl", "sinkhorn_ste", exact=False),
    "fsdp bfloat16 diagonal dynadiag": lambda: train(sharded_narrow, "diagonal", 0.0, "dynadiag", exact=False),
    "different models": different_models,
    "one rank sees nan": one_rank_sees_nan,
    "tensor parallel": tensor_parallel,
    "fsdp and others": fsdp_and_others,
    "hsdp block rigl": lambda: train(replicated_shards, "block:8", 0.6, "rigl"),
    "fsdp accumulates": lambda: accumulate(sharded, "set_requires_gradient_sync"),
    "fsdp accumulates in another dtype": lambda: accumulate(sharded_wide, "set_requires_gradient_sync"),
    "hsdp accumulates without all-reduce": lambda: accumulate(replicated_shards, "set_requires_all_reduce"),
}


def problem_of(scenario: Callable[[], None]) -> str | None:
    """An assertion fails on all ranks alike; anything else ends the job."""
    try:
        scenario()
    except AssertionError:
        return traceback.format_exc()
    return None


@record
def main() -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    results = {name: problem_of(scenario) for name, scenario in SCENARIOS.items()}
    if distributed.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(results))
    leave()


if __name__ == "__main__":
    main()
