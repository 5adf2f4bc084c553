"""Truly sparse training against a plain one: dense weights, masks and any optimizer, step by step in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

import padst_compile as padst
from padst_compile.backend import padst as backend
from padst_compile.layers import PermutedSparseLinear
from padst_compile.permutation_search.units import PlaceUnits
from padst_compile.structures import NM, Block, Diagonal, Structure
from padst_compile.testing.training import STRUCTURES, batch, layers_of, loss_at, small_model
from padst_compile.training.permutations.regroup import combine, regroup
from padst_compile.training.runtime import Runtime

INTERVAL, END, TOTAL, FRACTION = 3, 0.75, 16, 0.5


def config(method: str = "rigl", **fields: Any) -> padst.DSTConfig:
    settings = {"interval": INTERVAL, "end": END, "total_steps": TOTAL, "fraction": FRACTION}
    settings |= {"check_invariants": True, "staggered": False}
    return padst.DSTConfig(method=method, **(settings | fields))  # type: ignore[arg-type]  # a method


# The reference: which weights make up a unit is written out anew, and so are choosing, dropping and growing.


def units(structure: Structure, rows: int, columns: int) -> list[list[torch.Tensor]]:
    """Pools of units, each of which is the flat indices of its weights."""
    flat = torch.arange(rows * columns).reshape(rows, columns)
    match structure:
        case Block():
            height, width = structure.rows, structure.columns
            tiles = [flat[r : r + height, c : c + width] for r in range(0, rows, height) for c in range(0, columns, width)]
            return [[tile.flatten() for tile in tiles]]
        case NM():
            m, v = structure.m, structure.vector
            corners = [(r, c) for r in range(0, rows, v) for c in range(0, columns, m)]
            return [[flat[r : r + v, c + k] for k in range(m)] for r, c in corners]
        case Diagonal():
            long, short = max(rows, columns), min(rows, columns)
            stride = long if structure.group == 1 else short // structure.group
            steps = torch.arange(short)
            diagonals = [
                flat[steps, (steps + o) % columns] if columns >= rows else flat[(steps + o) % rows, steps] for o in range(long)
            ]
            return [[torch.cat(diagonals[o::stride]) for o in range(stride)]]
        case _:
            return [[index.reshape(1) for index in flat.flatten()]]


def norm(weights: torch.Tensor, score: str) -> float:
    return float(weights.abs().sum() if score == "l1" else weights.square().sum().sqrt())


def norms(gradient: torch.Tensor, score: str, pools: list[list[torch.Tensor]]) -> torch.Tensor:
    """Of each unit, `[pools, units]`."""
    return torch.tensor([[norm(gradient.flatten()[unit], score) for unit in pool] for pool in pools], dtype=torch.float64)


class Reference:
    """A masked dense layer in training.

    Args:
        weight: dense, with zeros at what is not active.
        mask: bool, of its shape.
    """

    def __init__(self, weight: torch.Tensor, mask: torch.Tensor, structure: Structure) -> None:
        self.weight = nn.Parameter(weight.clone())
        self.mask = mask
        self.structure = structure
        self.pools = units(structure, *weight.shape)
        self.first = 1 - sum(map(sum, self.active())) / sum(map(len, self.pools))  # the sparsity of units at the start
        self.seen: list[torch.Tensor] = []  # the masked weights of forward passes; they get the dense gradient

    def masked(self) -> torch.Tensor:
        weight = self.weight * self.mask
        weight.retain_grad()
        self.seen.append(weight)
        return weight

    def update(self, settings: padst.DSTConfig, state: dict[str, Any], step: int, chance: torch.Tensor) -> None:
        """Drop and grow, or prune; `chance` are random numbers `[pools, units]`."""
        last = int(END * TOTAL)
        if settings.method == "magnitude":
            assert settings.final_sparsity is not None
            slope = (1 - step / last) ** 3
            sparsity = settings.final_sparsity + (self.first - settings.final_sparsity) * slope
            wanted = max(1, round((1 - sparsity) * sum(map(len, self.pools))))
            for p, u in self.smallest(settings, len(self.smallest(settings, None)) - wanted):
                self.mask.view(-1)[self.pools[p][u]] = False
        else:
            self.exchange(settings, FRACTION / 2 * (1 + math.cos(math.pi * step / last)), chance)
        self.hold(state)

    def smallest(self, settings: padst.DSTConfig, count: int | None) -> list[tuple[int, int]]:
        """Places of the active units that matter least, those first; all of them for None."""
        magnitude = self.weight.detach().abs()
        if settings.method == "mest":
            assert self.weight.grad is not None
            magnitude = magnitude + settings.mest_weight * self.weight.grad.abs()
        active = self.active()
        places = [(p, u) for p, pool in enumerate(self.pools) for u in range(len(pool)) if active[p][u]]
        scores = {(p, u): norm(magnitude.view(-1)[self.pools[p][u]], settings.score) for p, u in places}
        return sorted(places, key=lambda place: (scores[place], place))[:count]

    def active(self) -> list[list[bool]]:
        """Which units are."""
        return [[bool(self.mask.view(-1)[unit].any()) for unit in pool] for pool in self.pools]

    def exchange(self, settings: padst.DSTConfig, fraction: float, chance: torch.Tensor) -> None:
        gradients = [weight.grad for weight in self.seen if weight.grad is not None]
        scores = torch.stack([norms(gradient, settings.score, self.pools) for gradient in gradients]).sum(0)
        active = self.active()
        dropped = set(self.smallest(settings, round(fraction * sum(map(sum, active)))))
        worth = scores if settings.method == "rigl" else chance
        mask = torch.zeros(self.mask.numel(), dtype=torch.bool)
        for p, pool in enumerate(self.pools):
            kept = [u for u in range(len(pool)) if active[p][u] and (p, u) not in dropped]
            lost = sum(active[p]) - len(kept)
            others = [u for u in range(len(pool)) if u not in kept]
            grown = sorted(others, key=lambda u: (-float(worth[p, u]), u))[:lost]
            for u in (*kept, *grown):
                mask[pool[u]] = True
        self.mask = mask.reshape(self.mask.shape)

    def units_at(self, side: Literal["input", "output"]) -> PlaceUnits:
        """What is active at each place of the permuted side, read off the mask."""
        match self.structure:
            case Block():
                rows, columns = self.structure.rows, self.structure.columns
            case NM():
                rows, columns = self.structure.vector, 1
            case _:
                rows = columns = 1
        corners = self.mask[::rows, ::columns]
        active, lines, places = (corners, rows, columns) if side == "input" else (corners.T, columns, rows)
        return PlaceUnits(active, torch.arange(active.shape[1] * places) // places, lines, side)

    def move(self, order: torch.Tensor, side: str, state: dict[str, Any]) -> None:
        """Let the features of a side change places; what lands outside the mask is lost."""
        with torch.no_grad():
            for tensor in (self.weight, *state.values()):
                if isinstance(tensor, torch.Tensor) and tensor.shape == self.mask.shape:
                    tensor.copy_(tensor[:, order] if side == "input" else tensor[order])
        self.hold(state)

    def hold(self, state: dict[str, Any]) -> None:
        """Zero what is not active, in the weight and in what lies beside it."""
        with torch.no_grad():
            for tensor in (self.weight, *state.values()):
                if isinstance(tensor, torch.Tensor) and tensor.shape == self.mask.shape:
                    tensor.mul_(self.mask)


class ReferenceModel(nn.Module):
    """The small model with masked dense weights and fixed permutations, trained by hooks of its optimizers."""

    def __init__(self, model: nn.Sequential, settings: padst.DSTConfig) -> None:
        super().__init__()
        sparse = layers_of(model)
        self.settings = settings
        self.layers = [Reference(*dense_of(layer), layer.config.structure) for layer in sparse]
        self.weights = nn.ParameterList([layer.weight for layer in self.layers])
        self.biases = nn.ParameterList([copy.deepcopy(layer.bias) for layer in sparse])
        self.head = copy.deepcopy(model[4])
        tables = [None if layer.permutation is None else layer.permutation.clone() for layer in sparse]
        self.around = [(layer.config.permuted, table) for layer, table in zip(sparse, tables, strict=True)]
        self.generators: Callable[[int, int, str], torch.Generator] = lambda layer, step, purpose: torch.Generator()
        self.steps: dict[int, int] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer, bias, (side, table) in zip(self.layers, self.biases, self.around, strict=True):
            matrix = torch.eye(1 if table is None else table.numel(), dtype=x.dtype)
            matrix = matrix if table is None else matrix[table.long()]
            x = x @ matrix.T if side == "input" else x
            x = x @ layer.masked().T
            x = x @ matrix.T if side == "output" else x
            x = torch.tanh(x + bias)
        logits: torch.Tensor = self.head(x)
        return logits

    def train_with(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        for optimizer in optimizers:
            optimizer.register_step_post_hook(self.after_step)

    def after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        step = self.steps[id(optimizer)] = self.steps.get(id(optimizer), 0) + 1
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        last = int(END * TOTAL)
        for number, layer in enumerate(self.layers):
            if id(layer.weight) in held:
                layer.hold(optimizer.state[layer.weight])
                updated = step % INTERVAL == 0 and step <= last
                if updated:
                    generator = self.generators(number, step, "growth")
                    chance = torch.rand(len(layer.pools), len(layer.pools[0]), generator=generator)
                    layer.update(self.settings, optimizer.state[layer.weight], step, chance)
                learned = self.settings.permutation
                if learned is not None and step <= last and not updated and acts(step, learned.interval):
                    self.regroup(number, learned, step, last, optimizer.state[layer.weight])
                layer.seen.clear()

    def regroup(self, number: int, learned: padst.LearnedPermutation, step: int, last: int, state: dict[str, Any]) -> None:
        """Move features between units by the gradients that the step had; which of them is tested on its own."""
        layer, (side, table) = self.layers[number], self.around[number]
        units = layer.units_at(side)
        gradient = torch.stack([weight.grad.abs() for weight in layer.seen if weight.grad is not None]).sum(0)
        order = regroup(
            combine(units.scores(layer.weight.detach().float().abs()), units.scores(gradient.float()), units),
            units,
            fraction=learned.fraction / 2 * (1 + math.cos(math.pi * step / last)),
            generator=self.generators(number, step, "regroup"),
            gain=learned.gain,
        )
        layer.move(order, side, state)
        self.around[number] = side, table[order] if side == "input" else torch.argsort(order)[table.long()]


def acts(step: int, interval: int) -> bool:
    """Halfway through the interval, or behind an update of the topology there."""
    middles = [step, *([step - 1] if (step - 1) % INTERVAL == 0 else [])]
    return any(middle % interval == interval // 2 for middle in middles)


def dense_of(layer: PermutedSparseLinear) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer's S and where it is active, `[out, in]` each."""
    structure, shape = layer.config.structure, layer.config.shape
    ones = structure.pack(torch.ones(shape.out_features, shape.in_features), layer.topology)
    return (
        structure.unpack(layer.values.detach(), layer.topology, shape),
        structure.unpack(ones, layer.topology, shape).bool(),
    )


Parts = tuple[list[nn.Parameter], list[nn.Parameter]]
MakeOptimizers = Callable[[Parts], list[torch.optim.Optimizer]]
Step = Callable[[nn.Module, Sequence[torch.optim.Optimizer], int], None]


def parts_of(model: nn.Module) -> Parts:
    """Weights of the sparse layers, and all other parameters; in the same order for both models."""
    if isinstance(model, ReferenceModel):
        return list(model.weights), [*model.biases, *model.head.parameters()]
    layers = layers_of(model)
    head = model[4].parameters()  # type: ignore[index]  # a Sequential
    return [layer.values for layer in layers], [*(layer.bias for layer in layers), *head]  # type: ignore[list-item]  # have one


def sgd(parts: Parts) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD([*parts[0], *parts[1]], lr=0.1, momentum=0.9, weight_decay=0.01)]


def adamw(parts: Parts) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW([*parts[0], *parts[1]], lr=0.01, weight_decay=0.1)]


def groups(parts: Parts) -> list[torch.optim.Optimizer]:
    first, second = parts[0]
    settings: list[dict[str, Any]] = [
        {"params": [first], "weight_decay": 0.3},
        {"params": [second], "lr": 0.03, "betas": (0.8, 0.9)},
        {"params": parts[1], "weight_decay": 0.0},
    ]
    return [torch.optim.AdamW(settings, lr=0.01)]


def two(parts: Parts) -> list[torch.optim.Optimizer]:
    first, second = parts[0]
    return [torch.optim.SGD([first], lr=0.1, momentum=0.9), torch.optim.AdamW([second, *parts[1]], lr=0.01)]


def plain(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], step: int) -> None:
    loss_at(model, step).backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def compare(
    structure: str,
    method: str,
    make: MakeOptimizers,
    run: Step = plain,
    tolerance: float = 1e-8,
    fields: Mapping[str, Any] | None = None,
    **spec: Any,
) -> Runtime:
    """Train both models and compare weights, masks and permutations after every step, and optimizer state at the end.

    Args:
        structure: of the layers.
        method: of the training.
        make: the optimizers.
        run: one step.
        tolerance: relative.
        fields: others of the configuration.
        spec: fields of the specification.
    """
    settings = config(method, **(fields or {}))
    model = small_model(structure, **spec)
    reference = ReferenceModel(model, settings)
    own, others = make(parts_of(model)), make(parts_of(reference))
    runtime = padst.attach(model, own, settings)
    reference.train_with(others)

    reference.generators = lambda number, step, purpose: runtime.layers[number].generator(settings.seed, step, purpose)
    changed = 0
    for step in range(TOTAL):
        run(model, own, step)
        run(reference, others, step)
        for trained, layer, masked in zip(runtime.layers, layers_of(model), reference.layers, strict=True):
            weight, mask = dense_of(layer)
            assert torch.equal(mask, masked.mask) or method == "magnitude", f"step {step}"  # which prunes what stays stored
            assert trained.active().tolist() == masked.active(), f"step {step}"
            assert torch.allclose(weight, masked.weight, rtol=tolerance, atol=tolerance / 100), f"step {step}"
        for layer, (_, table) in zip(layers_of(model), reference.around, strict=True):
            assert table is None or torch.equal(layer.permutation, table.int()), f"step {step}"
        changed += sum(update.dropped for update in runtime.last_update) if runtime.step % INTERVAL == 0 else 0
    assert runtime.updates > 0
    assert changed > 0
    check_state(model, own, reference, others, tolerance)
    return runtime


def check_state(
    model: nn.Module,
    own: Sequence[torch.optim.Optimizer],
    reference: ReferenceModel,
    others: Sequence[torch.optim.Optimizer],
    tolerance: float,
) -> None:
    for layer, masked in zip(layers_of(model), reference.layers, strict=True):
        state = next(o.state[layer.values] for o in own if layer.values in o.state)
        other = next(o.state[masked.weight] for o in others if masked.weight in o.state)
        assert state.keys() == other.keys()
        for name, tensor in state.items():
            found = torch.as_tensor(tensor)
            if found.shape == layer.values.shape:
                found = layer.config.structure.unpack(found, layer.topology, layer.config.shape) * masked.mask
            assert torch.allclose(found, torch.as_tensor(other[name]), rtol=tolerance, atol=tolerance / 100), name


@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize("method", ["rigl", "set", "mest"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_sparse_training_is_masked_dense_training(structure: str, method: str, make: MakeOptimizers) -> None:
    compare(structure, method, make)


@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize("method", ["rigl", "mest"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_units_by_their_euclidean_norm(structure: str, method: str, make: MakeOptimizers) -> None:
    compare(structure, method, make, fields={"score": "l2"})


@pytest.mark.parametrize("weight", [0.0, 30.0])
@pytest.mark.parametrize("score", ["l1", "l2"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_gradients_count_as_much_as_asked_for(structure: str, score: str, weight: float) -> None:
    compare(structure, "mest", sgd, fields={"score": score, "mest_weight": weight})


@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize("score", ["l1", "l2"])
@pytest.mark.parametrize("structure", [name for name in STRUCTURES if not name.startswith("nm")])
def test_pruning_by_magnitude_is_that_of_a_masked_weight(structure: str, score: str, make: MakeOptimizers) -> None:
    compare(structure, "magnitude", make, fields={"score": score, "final_sparsity": 0.9})


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("structure", ["block:8x4", "nm:2:4:2", "diagonal:4"])
def test_permuted_layers_too(structure: str, side: str) -> None:
    compare(structure, "rigl", adamw, permutation="random", permutation_side=side)


@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("interval", [INTERVAL, 2])  # between updates of the topology; behind some that fall on its steps
@pytest.mark.parametrize(("structure", "method"), [("block:8x4", "rigl"), ("nm:1:4", "rigl"), ("diagonal", "mest")])
def test_features_move_with_their_weights_and_moments(
    structure: str, method: str, interval: int, side: str, make: MakeOptimizers
) -> None:
    """Growth is decided by gradients in the order of features that they were computed in."""
    learned = padst.LearnedPermutation(method="regroup", interval=interval, fraction=1.0, gain=0.0)
    spec = {"permutation": "learned", "permutation_side": side}
    runtime = compare(structure, method, make, fields={"permutation": learned}, **spec)
    assert not all(torch.equal(layer.start, layer.layer.permutation) for layer in runtime.layers)


def accumulating(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], step: int) -> None:
    """Two backward passes for each step."""
    loss_at(model, 2 * step).backward()
    plain(model, optimizers, 2 * step + 1)


def clipping(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], step: int) -> None:
    loss_at(model, step).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    assert norm > 0.05
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def keeping_zeros(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], step: int) -> None:
    """Gradients that are filled with zeros instead of dropped."""
    loss_at(model, step).backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)


def closures(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], step: int) -> None:
    def closure() -> float:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = loss_at(model, step)
        loss.backward()
        return loss.item()

    for optimizer in optimizers:
        optimizer.step(closure)


@pytest.mark.parametrize("run", [accumulating, clipping, keeping_zeros, closures])
@pytest.mark.parametrize("method", ["rigl", "mest"])
def test_loops_of_every_kind(method: str, run: Step) -> None:
    compare("block:4", method, adamw, run)


@pytest.mark.parametrize("structure", ["block:8x4", "nm:2:4:2", "diagonal"])
def test_norms_are_added_up_over_backward_passes(structure: str) -> None:
    compare(structure, "rigl", sgd, accumulating, fields={"score": "l2"})


@pytest.mark.parametrize("make", [groups, two])
def test_several_groups_and_several_optimizers(make: MakeOptimizers) -> None:
    compare("nm:1:4", "rigl", make)


def test_learning_rate_schedulers() -> None:
    schedulers: dict[int, torch.optim.lr_scheduler.LRScheduler] = {}

    def run(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], step: int) -> None:
        (optimizer,) = optimizers
        if id(optimizer) not in schedulers:
            schedulers[id(optimizer)] = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=TOTAL)
        plain(model, optimizers, step)
        schedulers[id(optimizer)].step()

    compare("diagonal", "rigl", sgd, run)


@pytest.mark.parametrize(("make", "tolerance"), [(sgd, 1e-8), (adamw, 1e-3)])  # compiled, Adam corrects its bias in float32
def test_compiled_optimizer_steps(make: MakeOptimizers, tolerance: float) -> None:
    compiled: dict[int, Callable[[], None]] = {}

    def run(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], step: int) -> None:
        (optimizer,) = optimizers
        if isinstance(model, ReferenceModel):
            plain(model, optimizers, step)
            return
        if id(optimizer) not in compiled:
            compiled[id(optimizer)] = torch.compile(optimizer.step)
        loss_at(model, step).backward()
        compiled[id(optimizer)]()
        optimizer.zero_grad()

    compare("block:4", "rigl", make, run, tolerance)


@pytest.mark.parametrize("learned", [None, "autoshuffle", "sinkhorn_ste"])
def test_steps_that_a_scaler_skips_are_none(learned: str | None) -> None:
    """With a loss that overflows in two of the iterations, one of them before an update: as if these were left out."""
    method = padst.LearnedPermutation(method=learned, interval=2, deadline=0.75) if learned else None  # type: ignore[arg-type]  # a method
    settings = config(permutation=method)
    results = []
    for scaled in (True, False):
        model = small_model(permutation="learned" if learned else "none", dtype=torch.float32)
        (optimizer,) = adamw(parts_of(model))
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=8.0, growth_interval=100)
        runtime = padst.attach(model, optimizer, settings, grad_scaler=scaler if scaled else None)
        for step in range(TOTAL):
            poison = step in (2, 9)
            if poison and not scaled:
                continue
            loss = loss_at(model, step) * (torch.inf if poison else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert runtime.step == TOTAL - 2
        assert runtime.skipped == 0
        assert runtime.updates == 4
        results.append(list(model.state_dict().values()))
    for tensor, other in zip(*results, strict=True):
        assert torch.allclose(tensor, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("structure", "method", "learned", "side"),
    [
        ("block:4", "rigl", None, None),
        ("nm:1:4", "rigl", "regroup", "input"),
        ("diagonal", "mest", "sinkhorn_ste", "output"),
        ("block:8x4", "set", "autoshuffle", "input"),
        ("unstructured", "rigl", "autoshuffle", "output"),
    ],
)
def test_compiled_models_train_like_eager_ones_and_are_never_compiled_anew(
    structure: str, method: str, learned: str | None, side: str | None
) -> None:
    learning = padst.LearnedPermutation(method=learned, deadline=0.5, warmup=0.1, fraction=0.5, gain=0.0) if learned else None  # type: ignore[arg-type]  # a method
    permuted = {"permutation": "learned", "permutation_side": side} if learned else {}
    results = []
    for compiled in (False, True):
        model = small_model(structure, **permuted)
        (optimizer,) = adamw(parts_of(model))
        runtime = padst.attach(model, optimizer, config(method, permutation=learning))
        first = [layer.permutation.clone() for layer in layers_of(model) if layer.permutation is not None]
        program = torch.compile(model, backend=backend) if compiled else model
        counters.clear()
        for step in range(TOTAL):
            x, classes = batch(step)
            F.cross_entropy(program(x), classes).backward()
            optimizer.step()
            optimizer.zero_grad()
            if compiled:
                assert counters["stats"]["unique_graphs"] == 1, f"step {step}"
        assert runtime.updates == int(END * TOTAL) // INTERVAL
        assert runtime.metrics()["hardened"] == (2 if learned else 0)
        moved = [layer.permutation for layer in layers_of(model) if layer.permutation is not None]
        assert not learned or not all(map(torch.equal, first, moved))
        assert torch.allclose(program(batch(99)[0]), model(batch(99)[0]), rtol=1e-10)
        results.append(model.state_dict())
    if learned == "regroup":
        return  # exchanges that gain the same are chosen among by rounding
    for (name, eager), other in zip(results[0].items(), results[1].values(), strict=True):
        assert torch.allclose(eager, other, rtol=1e-7, atol=1e-9), name
