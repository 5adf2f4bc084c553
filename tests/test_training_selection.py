"""Choosing units, schedules, and moving weights with what lies beside them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from padst_compile import permutation
from padst_compile.layers import LayerConfig, PermutedSparseLinear
from padst_compile.structures import Block, Shape, Structure, Topology
from padst_compile.testing.strategies import PackedWeight, packed_weights
from padst_compile.training.config import DSTConfig
from padst_compile.training.rearrange import change_topology, companions, reorder_features
from padst_compile.training.schedule import fraction_at, is_due, sparsity_at
from padst_compile.training.selection import exchange, rank, smallest
from padst_compile.training.unit_scores import FineScores, UnitScores, unit_scores, unit_sizes

SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def grids(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Active units, scores of two kinds with ties and units that lie outside, and how many to exchange."""
    pools, units = draw(st.integers(1, 5)), draw(st.integers(1, 7))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    keep, grow = (torch.randint(0, 5, (pools, units), generator=generator).float() for _ in range(2))
    outside = draw(st.integers(0, units - 1))
    grow[:, units - outside :] = -torch.inf
    active = torch.rand(pools, units, generator=generator) < 0.5
    active[:, units - outside :] = False
    return active, keep, grow, draw(st.integers(0, int(active.sum())))


@given(grids())
def test_exchange_drops_the_smallest_and_grows_the_largest(grid: tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]) -> None:
    """Against the words of its docstring, one unit at a time."""
    active, keep, grow, count = grid
    after = exchange(active, keep, grow, count)
    order = sorted((float(keep[p, u]), p, u) for p, u in active.nonzero().tolist())
    kept = active.clone()
    for _, p, u in order[:count]:
        kept[p, u] = False
    expected = kept.clone()
    for p in range(active.shape[0]):
        candidates = sorted((-float(grow[p, u]), u) for u in range(active.shape[1]) if not kept[p, u])
        for _, u in candidates[: int(active[p].sum() - kept[p].sum())]:
            expected[p, u] = True
    assert torch.equal(after, expected)
    assert torch.equal(after.sum(1), active.sum(1))
    assert not bool((after & (grow == -torch.inf)).any())


@given(grids())
def test_smallest_and_rank_agree_with_sorting(grid: tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]) -> None:
    active, keep, _, count = grid
    chosen = smallest(keep, active, count)
    assert int(chosen.sum()) == count
    assert not bool((chosen & ~active).any())
    if 0 < count < int(active.sum()):
        assert keep[chosen].max() <= keep[active & ~chosen].min()
    for row, places in zip(keep.tolist(), rank(keep).tolist(), strict=True):
        assert places == [sorted(range(len(row)), key=lambda u: (-row[u], u)).index(u) for u in range(len(row))]


# Schedules


def test_updates_are_due_at_multiples_of_the_interval_from_start_to_end() -> None:
    config = DSTConfig(interval=10, start=25, end=0.75, total_steps=100)
    assert [step for step in range(101) if is_due(step, config)] == [30, 40, 50, 60, 70]
    assert [step for step in range(101) if is_due(step, DSTConfig(interval=10, end=0.5, total_steps=60))] == [10, 20, 30]
    assert not any(is_due(step, DSTConfig(method="static")) for step in range(300))


@given(st.integers(1, 12), st.integers(1, 12))
def test_offsets_spread_updates_over_the_interval(interval: int, offset: int) -> None:
    """Each layer is as often due as the others, but for the first interval, never before one interval has passed."""
    config = DSTConfig(interval=interval, end=1.0, total_steps=5 * interval)
    due = [step for step in range(5 * interval + 1) if is_due(step, config, offset % interval)]
    assert due[0] >= interval
    assert all(step % interval == offset % interval for step in due)
    assert {b - a for a, b in itertools.pairwise(due)} == {interval}


def test_the_fraction_falls_along_a_cosine() -> None:
    config = DSTConfig(fraction=0.4, end=0.5, total_steps=200)
    assert fraction_at(0, config) == 0.4
    assert fraction_at(50, config) == pytest.approx(0.2)
    assert fraction_at(25, config) == pytest.approx(0.2 * (1 + math.sqrt(0.5)))
    assert fraction_at(100, config) == pytest.approx(0)
    assert fraction_at(150, config) == pytest.approx(0)


def test_the_sparsity_rises_along_a_cubic() -> None:
    config = DSTConfig(method="magnitude", final_sparsity=0.9, start=20, end=0.6, total_steps=200)
    assert sparsity_at(0, config, 0.5) == pytest.approx(0.5)
    assert sparsity_at(20, config, 0.5) == pytest.approx(0.5)
    assert sparsity_at(70, config, 0.5) == pytest.approx(0.9 - 0.4 / 8)
    assert sparsity_at(120, config, 0.5) == pytest.approx(0.9)
    assert sparsity_at(200, config, 0.5) == pytest.approx(0.9)


# Scores


@given(packed_weights(24), st.sampled_from(["l1", "l2"]))
def test_the_score_of_a_unit_is_the_norm_of_its_weights(packed: PackedWeight, score: str) -> None:
    """What a unit holds is found by activating it alone; sums over several gradients are sums of scores."""
    structure, shape = packed.structure, packed.shape
    magnitudes = packed.weight.abs()
    scores = unit_scores(structure, magnitudes.clone(), score)  # type: ignore[arg-type]  # a score
    owner = unit_of_weight(structure, shape, scores.shape)
    exact = torch.zeros(scores.numel(), dtype=torch.float64)
    exact.index_add_(0, owner.flatten(), magnitudes.flatten() if score == "l1" else magnitudes.flatten().square())
    exact = exact if score == "l1" else exact.sqrt()
    inside = torch.zeros(scores.numel(), dtype=torch.bool).index_fill(0, owner.flatten(), value=True)
    assert torch.allclose(scores.flatten()[inside], exact[inside], rtol=1e-12)
    assert bool((scores.flatten()[~inside] == -torch.inf).all())
    single = bool((unit_sizes(structure, shape, magnitudes.device) <= 1).all())
    for kind in (UnitScores, FineScores) if single else (UnitScores,):
        total = kind(structure, score, shape)  # type: ignore[arg-type]  # a score
        for gradient in (magnitudes, 2 * magnitudes):
            for begin in range(0, shape.out_features, 3):
                total.add(gradient[begin : begin + 3], begin)
            total.end()
        assert torch.allclose(total.estimate(), 3 * scores, rtol=1e-12)


def unit_of_weight(structure: Structure, shape: Shape, grid: torch.Size) -> torch.Tensor:
    """Which unit every weight lies in, `[out, in]`, found bit by bit from sums over units of single weights."""
    owner = torch.zeros(shape.out_features, shape.in_features, dtype=torch.int64)
    for position in range(shape.numel):
        single = torch.zeros(shape.numel, dtype=torch.float64)
        single[position] = 1
        totals = structure.unit_totals(single.reshape(shape.out_features, shape.in_features))
        owner.view(-1)[position] = int(totals.flatten().argmax())
    return owner


# Moving weights


class Sign(torch.optim.Optimizer):
    """Lion (Chen et al. 2023): one momentum, of which the sign counts."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                momentum = state.setdefault("exp_avg", torch.zeros_like(parameter))
                parameter.sub_(group["lr"] * (0.9 * momentum + 0.1 * parameter.grad).sign())
                momentum.lerp_(parameter.grad, 0.01)


OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, amsgrad=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "lion": Sign,
}
BESIDE = {"adamw": 4, "sgd": 2, "lion": 2}  # the gradient and the states of its shape


def trained(
    packed: PackedWeight, optimizer: str, permuted: str | None = None, table: torch.Tensor | None = None
) -> tuple[PermutedSparseLinear, torch.optim.Optimizer]:
    """A layer after a step, with a gradient and state that differ from entry to entry."""
    values = nn.Parameter(packed.values.clone())
    topology = tuple(index.clone() for index in packed.topology)
    layer = PermutedSparseLinear(LayerConfig(packed.shape, packed.structure, permuted), values, topology, table)  # type: ignore[arg-type]  # a side
    made = OPTIMIZERS[optimizer]([values])
    weight = packed.weight * torch.arange(1, packed.weight.numel() + 1).reshape(packed.weight.shape)
    values.grad = packed.structure.pack(weight, packed.topology)
    made.step()
    return layer, made


def dense(layer: PermutedSparseLinear, tensor: torch.Tensor, topology: Topology) -> torch.Tensor:
    return layer.config.structure.unpack(tensor.detach(), topology, layer.config.shape)


@given(packed_weights(20), SEEDS, st.sampled_from(sorted(OPTIMIZERS)))
def test_a_new_topology_keeps_what_stays_and_starts_what_grows_at_zero(packed: PackedWeight, seed: int, optimizer: str) -> None:
    layer, made = trained(packed, optimizer)
    structure, shape = packed.structure, packed.shape
    other = structure.choose(torch.rand(packed.weight.shape, generator=torch.Generator().manual_seed(seed)), packed.sparsity)
    tensors = [layer.values, *companions(layer.values, made)]
    assert len(tensors) == 1 + BESIDE[optimizer] or shape.numel == 1  # a step count may have that shape, too
    places = [tensor.data_ptr() for tensor in (*tensors, *layer.topology)]
    before = [dense(layer, tensor, layer.topology) for tensor in tensors]
    change_topology(layer, made, other)
    active = structure.unpack(structure.pack(torch.ones_like(packed.weight), other), other, shape).bool()
    for old, tensor in zip(before, tensors, strict=True):
        assert torch.equal(dense(layer, tensor, layer.topology), old.where(active, 0))
        assert torch.equal(structure.pack(dense(layer, tensor, layer.topology), layer.topology), tensor)
    assert all(torch.equal(own, new) for own, new in zip(layer.topology, other, strict=True))
    assert places == [tensor.data_ptr() for tensor in (*tensors, *layer.topology)]


@given(packed_weights(20), SEEDS, st.sampled_from(["input", "output"]), st.sampled_from(sorted(OPTIMIZERS)))
def test_features_that_change_places_keep_what_their_weights_connect(
    packed: PackedWeight, seed: int, side: str, optimizer: str
) -> None:
    """Of the weight with the permutation folded in, each entry is as before, or lost because its new place is not active."""
    generator = torch.Generator().manual_seed(seed)
    size = packed.shape.in_features if side == "input" else packed.shape.out_features
    table, order = (torch.randperm(size, generator=generator) for _ in range(2))
    layer, made = trained(packed, optimizer, side, table.int())
    tensors = [layer.values, *companions(layer.values, made)]

    def folded(tensor: torch.Tensor) -> torch.Tensor:
        weight = dense(layer, tensor, layer.topology)
        assert layer.permutation is not None
        matrix = torch.eye(size, dtype=torch.float64)[layer.permutation.long()]
        return weight @ matrix if side == "input" else matrix @ weight

    before, place = [folded(tensor) for tensor in tensors], layer.permutation
    reorder_features(layer, made, order)
    active = folded(layer.config.structure.pack(torch.ones_like(packed.weight), layer.topology)).bool()
    for old, tensor in zip(before, tensors, strict=True):
        assert torch.equal(folded(tensor), old.where(active, 0))
    assert torch.equal(layer.dense_weight(), folded(layer.values))
    assert layer.permutation is place
    permutation.check(place, size, "layer")
    back = torch.empty_like(order)
    back[order] = torch.arange(size)
    expected = table[order] if side == "input" else back[table]
    assert torch.equal(place.long(), expected)


def test_optimizer_state_of_other_shapes_stays() -> None:
    """Step counts, and what an optimizer keeps per row."""
    packed = PackedWeight(Block(2), Shape(4, 4), 0.5, *_small())
    layer, made = trained(packed, "adamw")
    rows = torch.arange(4.0)
    made.state[layer.values].update(row=rows, step=torch.tensor(7.0), name="x")
    change_topology(layer, made, Block(2).choose(packed.weight.abs().flip(0), 0.5))
    state = made.state[layer.values]
    assert torch.equal(rows, torch.arange(4.0))
    assert float(state["step"]) == 7.0


def _small() -> tuple[torch.Tensor, Topology, torch.Tensor]:
    weight = torch.arange(1.0, 17).reshape(4, 4).double()
    topology = Block(2).choose(weight, 0.5)
    return weight, topology, Block(2).pack(weight, topology)
