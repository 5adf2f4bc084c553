"""Whole training steps at 90 % block sparsity beside dense ones, one thread: time, memory, and what the runtime costs.

Writes cpu-training.json. A step is forward, backward and AdamW. Dense runs under torch.compile's defaults, sparse under
backend padst with a runtime that does RigL at interval 100. Updates are timed as whole steps, for their dense gradients are
computed in the backward pass before them. All layers are updated in the same step here, so that the other steps have no
update. N:M layers take turns unless told otherwise (`DSTConfig.staggered`), in the same time with a lower peak of memory, which
is measured so. Learned permutations, of the smaller side, are as they are while they learn: those of autoshuffle are soft
matrices, which take part in every step; sinkhorn_ste acts with the updates, and regroup at steps of its own.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import suite
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import padst_compile as padst
from padst_compile.backend import padst as backend
from padst_compile.benchmarking.machine import describe_machine
from padst_compile.benchmarking.memory import peak_bytes
from padst_compile.benchmarking.models import build_model
from padst_compile.benchmarking.report import write_json
from padst_compile.layers import PermutedSparseLinear
from padst_compile.recipes.shorthand import LEARNED
from padst_compile.training.config import PermutationMethod
from padst_compile.training.rearrange import companions

INTERVAL = 100
CYCLE = 4  # steps between updates here, that there be some to measure
CASES = [
    ("timm:vit_small_patch16_224", 8, 0, "block:64", "none"),
    ("timm:vit_small_patch16_224", 8, 0, "block:64", "random"),
    ("timm:vit_small_patch16_224", 8, 0, "nm:1:10", "random"),
    ("timm:vit_small_patch16_224", 8, 0, "diagonal", "random"),
    ("hf:gpt2", 2, 256, "block:64", "none"),
    ("hf:gpt2", 2, 256, "block:64", "random"),
    ("timm:vit_small_patch16_224", 8, 0, "block:64", "autoshuffle"),
    ("timm:vit_small_patch16_224", 8, 0, "block:64", "sinkhorn_ste"),
    ("timm:vit_small_patch16_224", 8, 0, "block:64", "regroup"),
]


@dataclasses.dataclass(frozen=True)
class Training:
    """One model, dense and sparse.

    Args:
        model: name.
        batch: images or sequences.
        tokens: of a sequence; 0 for images.
        structure: short form.
        permutation: "none" or "random", on every layer's input, or how that of the smaller side is learned.
        dense: milliseconds of a step.
        sparse: milliseconds of a step without update.
        update: milliseconds of a step with one.
        learning: milliseconds of a step without update at which regroup acts, once an interval; otherwise `sparse`.
        hooks: milliseconds in the runtime's hooks at a step without either.
        memory: bytes of weights, gradients, AdamW state, index tensors and runtime state of the sparse layers, soft matrices
            and what learns them among it, over those of weights, gradients and AdamW state of the same layers when dense.
        update_extra_bytes: by how much an update step's peak of allocated memory exceeds another step's.
        largest_dense_gradient: bytes of the largest layer's dense gradient.
    """

    model: str
    batch: int
    tokens: int
    structure: str
    permutation: str
    dense: float
    sparse: float
    update: float
    learning: float
    hooks: float
    memory: float
    update_extra_bytes: int
    largest_dense_gradient: int

    @property
    def speedup(self) -> float:
        """Dense time over sparse time, updates and learning included."""
        return self.dense / (self.sparse + (self.update + self.learning - 2 * self.sparse) / INTERVAL)

    @property
    def update_share(self) -> float:
        """Fraction of the training time that updates take."""
        return (self.update - self.sparse) / INTERVAL / self.sparse

    @property
    def hook_share(self) -> float:
        """Fraction of the other steps that the hooks take."""
        return self.hooks / self.sparse


def measure(model: str, batch: int, tokens: int, structure: str, permutation: str, rounds: int) -> Training:
    """One model, in turns with its dense self."""
    torch._dynamo.reset()
    case = build_model(model, batch=batch, tokens=tokens or 1)
    learned = permutation if permutation in LEARNED else None
    order = {"permutation": permutation} if learned is None else {"permutation": "learned", "permutation_side": "smaller"}
    chosen = dataclasses.replace(suite.spec(structure), **order)
    dense, sparse = case.model.train(), padst.sparsify(copy.deepcopy(case.model), chosen).train()
    loss = _loss(model, batch, tokens, case.args)
    dense_step = _stepper(torch.compile(dense), torch.optim.AdamW(dense.parameters()), loss)
    optimizer = torch.optim.AdamW(sparse.parameters())
    runtime = _attach(sparse, optimizer, CYCLE, learned, staggered=False)
    sparse_step = _stepper(torch.compile(sparse, backend=backend), optimizer, loss)
    for _ in range(2 * CYCLE):  # compile, fill caches, end with an update
        sparse_step()
    dense_step(), dense_step()
    dense_times: list[float] = []
    places: list[list[float]] = [[] for _ in range(CYCLE)]  # by step of the cycle, of which the last updates
    for _ in range(rounds):
        for place in places:
            dense_times.append(_timed(dense_step))
            place.append(_timed(sparse_step))
    others = [seconds for place in places[:-1] for seconds in place]
    ordinary = statistics.median(others) * 1e3
    slowest = max(statistics.median(place) for place in places[:-1]) * 1e3
    hooks = _hooks(runtime, sparse_step)
    fine = any(layer.has_fine_units for layer in runtime.layers)
    extra = (
        _staggered_extra(case.model, chosen, loss, learned)
        if fine
        else _extra([peak_bytes(sparse_step) for _ in range(CYCLE)], updates=1)
    )
    return Training(
        model, batch, tokens, structure, permutation, statistics.median(dense_times) * 1e3, ordinary,
        statistics.median(places[-1]) * 1e3, slowest if learned == "regroup" else ordinary, hooks * 1e3,
        _state_bytes(runtime, optimizer) / _dense_state_bytes(runtime), extra,
        max(layer.shape.numel for layer in runtime.layers) * 4,
    )  # fmt: skip


def _attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    interval: int,
    learned: PermutationMethod | None,
    *,
    staggered: bool | None,
) -> padst.Runtime:
    permutation = None if learned is None else padst.LearnedPermutation(learned)
    config = padst.DSTConfig(interval=interval, total_steps=10**6, permutation=permutation, staggered=staggered)
    return padst.attach(model, optimizer, config)


def _loss(model: str, batch: int, tokens: int, args: tuple[Any, ...]) -> Callable[[Callable[..., Any]], torch.Tensor]:
    if model.startswith("hf:"):
        ids = torch.randint(0, 50257, (batch, tokens))
        return lambda run: run(input_ids=ids, labels=ids, use_cache=False).loss
    labels = torch.randint(0, 1000, (batch,))
    return lambda run: nn.functional.cross_entropy(run(*args), labels)


def _stepper(
    run: Callable[..., Any], optimizer: torch.optim.Optimizer, loss: Callable[[Callable[..., Any]], torch.Tensor]
) -> Callable[[], None]:
    def step() -> None:
        loss(run).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _timed(step: Callable[[], None]) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def _hooks(runtime: padst.Runtime, step: Callable[[], None]) -> float:
    """Seconds in the hooks of a step without update; the counter stands behind an update, and the next three are none."""
    samples = []
    for number in range(2 * CYCLE):
        before = runtime.hook_seconds
        step()
        if (number + 1) % CYCLE:
            samples.append(runtime.hook_seconds - before)
    return statistics.median(samples)


def _extra(peaks: list[int], updates: int) -> int:
    """By how much the last so many steps, which updated layers, exceed the others."""
    return max(peaks[-updates:]) - int(statistics.median(peaks[:-updates]))


def _staggered_extra(
    dense: nn.Module,
    spec: padst.SparsitySpec,
    loss: Callable[[Callable[..., Any]], torch.Tensor],
    learned: PermutationMethod | None,
) -> int:
    """The same where layers take turns, one at each step, in eager mode: the first updates are of one layer of each size."""
    model = padst.sparsify(copy.deepcopy(dense), spec).train()
    optimizer = torch.optim.AdamW(model.parameters())
    layers = sum(isinstance(module, PermutedSparseLinear) for module in model.modules())
    runtime = _attach(model, optimizer, layers, learned, staggered=None)
    step = _stepper(model, optimizer, loss)
    step()
    peaks = [peak_bytes(step) for _ in range(3)]
    while runtime.step < layers - 1:
        step()
    return _extra([*peaks, *(peak_bytes(step) for _ in range(4))], updates=4)


def _state_bytes(runtime: padst.Runtime, optimizer: torch.optim.Optimizer) -> int:
    total = 0
    for trained in runtime.layers:
        layer = trained.layer
        values = layer.values
        layer_tensors: Iterator[torch.Tensor] = iter((values, *companions(values, optimizer), *layer.topology))
        total += sum(tensor.numel() * tensor.element_size() for tensor in layer_tensors)
        total += values.numel() * values.element_size()  # the gradient, which zero_grad has dropped
        total += 0 if layer.permutation is None else layer.permutation.numel() * layer.permutation.element_size()
        total += trained.state_dict()["visited"].numel()
        soft = layer.soft.matrix if layer.soft is not None and layer.soft.is_soft else None
        total += 0 if soft is None else soft.numel() * soft.element_size()  # its gradient
        learner = runtime.learners.get(trained.name)
        total += 0 if learner is None else _tensor_bytes(learner.state_dict())  # the matrix or logits, and their moments
    return total


def _tensor_bytes(state: Any) -> int:
    """Of all tensors in nested dictionaries and lists."""
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return sum(map(_tensor_bytes, parts))


def _dense_state_bytes(runtime: padst.Runtime) -> int:
    """Weight, gradient and two moments, float32."""
    return sum(4 * 4 * trained.shape.numel for trained in runtime.layers)


def main() -> None:
    """Measure, print, record."""
    given = suite.arguments(__doc__, "training.json", quick="the first case, one round, nothing written")
    quick = given.quick
    torch.set_num_threads(1)
    console = Console(width=170)
    title = f"training steps at 90 % sparsity, one thread, medians of interleaved steps; updates every {INTERVAL} steps"
    table = Table(title=title, title_justify="left")
    for column in (
        "model",
        "sparse as",
        "permutation",
        "dense",
        "padst",
        "speed-up",
        "updates",
        "hooks",
        "memory",
        "update extra",
    ):
        table.add_column(column, justify="right")
    cases = []
    for case in CASES[:1] if quick else CASES:
        console.print("measuring", *case)
        result = measure(*case, rounds=1 if quick else 3)
        derived = {"speedup": result.speedup, "update_share": result.update_share, "hook_share": result.hook_share}
        cases.append({**dataclasses.asdict(result), **derived})
        table.add_row(
            f"{result.model}, batch {result.batch}", result.structure, result.permutation, f"{result.dense:.0f} ms",
            f"{result.sparse:.0f} ms", f"{result.speedup:.2f}x", f"{result.update_share:.2%}", f"{result.hook_share:.2%}",
            f"{result.memory:.3f}x", f"{result.update_extra_bytes / result.largest_dense_gradient:.2f} dense gradients",
        )  # fmt: skip
    console.print(table)
    console.print("updates, hooks: fractions of the time; memory: weights, gradients, AdamW and runtime state over dense ones")
    if not quick:
        console.print(f"written to {write_json({'schema': 1, 'machine': describe_machine(), 'cases': cases}, given.out)}")


if __name__ == "__main__":
    main()
