"""SRigL's ablation: which outputs of N:M layers are given up, and what is left of them, in training and afterwards."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import padst_compile as padst
from padst_compile.structures import NM, Shape
from padst_compile.testing.training import HIDDEN, WIDTH, batch, layers_of, loss_at, losses, small_model
from padst_compile.tolerance import allowed_error, relative_error
from padst_compile.training.ablation import neurons_to_keep
from padst_compile.training.rearrange import companions
from padst_compile.training.runtime import Runtime

TOTAL, INTERVAL = 12, 2
LOST = 5  # the output that nothing needs

Training = tuple[nn.Sequential, torch.optim.Optimizer, Runtime]


def begin(structure: str = "nm:1:4", ablation: float = 0.1, learned: str | None = None, **spec: Any) -> Training:
    model = small_model(structure, **spec)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    method = learned and padst.LearnedPermutation(learned, interval=INTERVAL, fraction=0.5, gain=0.0)  # type: ignore[arg-type]  # a name
    config = padst.DSTConfig(
        interval=INTERVAL, total_steps=TOTAL, end=1.0, ablation=ablation, permutation=method or None, check_invariants=True
    )
    return model, optimizer, padst.attach(model, optimizer, config)


def make_useless(model: nn.Sequential, output: int = LOST) -> None:
    """An output of the first layer without weights, whose gradient is zero, for no weight of the next layer reads it."""
    first, second = layers_of(model)
    with torch.no_grad():
        for layer, rows in ((first, True), (second, False)):
            structure, shape = layer.config.structure, layer.config.shape
            dense = structure.unpack(layer.values, layer.topology, shape)
            dense[output] = 0 if rows else dense[output]
            if not rows:
                dense[:, output] = 0
            layer.values.copy_(structure.pack(dense, layer.topology))


# The choice


@st.composite
def updates(draw: st.DrawFn) -> tuple[NM, Shape, torch.Tensor, torch.Tensor, torch.Tensor, int, float]:
    """A layer of which some neurons may have been given up, with scores that have ties and a ragged last group."""
    n, vector = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    structure = NM(n, n + draw(st.integers(1, 2)), vector)
    shape = Shape(vector * draw(st.integers(1, 5)), structure.m * draw(st.integers(1, 3)) + draw(st.sampled_from([0, n])))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    rows, groups = structure.groups(shape)
    totals = structure.unit_totals(torch.rand(shape.out_features, shape.in_features, generator=generator))
    active = structure.active_units(
        structure.choose(torch.rand(shape.out_features, shape.in_features, generator=generator), 0.0), shape
    )
    gone = torch.rand(rows, generator=generator) < 0.3
    gone[0] = False
    active &= ~gone.repeat_interleave(groups)[:, None]
    keep, grow = (torch.randint(0, 4, totals.shape, generator=generator).float() for _ in range(2))
    grow.masked_fill_(totals == -torch.inf, -torch.inf)
    return (
        structure,
        shape,
        active,
        keep,
        grow,
        draw(st.integers(0, int(active.sum()))),
        draw(st.sampled_from([0.0, 0.3, 0.7, 1.0])),
    )


@given(updates())
def test_the_choice_is_that_of_its_definition(
    update: tuple[NM, Shape, torch.Tensor, torch.Tensor, torch.Tensor, int, float],
) -> None:
    structure, shape, active, keep, grow, count, threshold = update
    rows, groups = structure.groups(shape)
    places = [(p, u) for p in range(active.shape[0]) for u in range(active.shape[1])]
    living = {row for row in range(rows) if active[row * groups : (row + 1) * groups].any()}
    staying = sorted((place for place in places if active[place]), key=lambda place: (-float(keep[place]), place))
    growing = [p for p in places if not active[p] and grow[p] > -torch.inf and p[0] // groups in living]
    growing.sort(key=lambda place: (-float(grow[place]), place))
    salient = staying[: len(staying) - count] + growing[:count]
    worth = {row: sum(place[0] // groups == row for place in salient) for row in living}
    expected = {row for row in living if worth[row] >= threshold * structure.n * groups}
    least = min(len(living), -(-rows * structure.n * groups // shape.in_features))
    if len(expected) < least:
        expected = set(sorted(living, key=lambda row: (-worth[row], row))[:least])
    found = neurons_to_keep(structure, shape, active, keep, grow, count, threshold).reshape(rows, -1)
    assert {row for row in range(rows) if found[row].all()} == expected
    assert {row for row in range(rows) if found[row].any()} == expected


# In training


@pytest.mark.parametrize("structure", ["nm:1:4", "nm:2:4:2"])
def test_an_output_that_nothing_needs_is_given_up_and_others_are_not(structure: str) -> None:
    training = begin(structure)
    model, _, runtime = training
    vector = layers_of(model)[0].config.structure.vector  # type: ignore[attr-defined]  # N:M
    for output in range(LOST // vector * vector, LOST // vector * vector + vector):
        make_useless(model, output)
    lost = torch.zeros(HIDDEN, dtype=torch.bool)
    lost[LOST // vector * vector : LOST // vector * vector + vector] = True
    losses(*training[:2], 0, INTERVAL - 1)
    assert runtime.metrics()["ablated"] == 0
    losses(*training[:2], INTERVAL - 1, INTERVAL + 1)
    first, _ = layers_of(model)
    assert torch.equal(runtime.layers[0].given_up(), lost) and not runtime.layers[1].given_up().any()
    metrics = runtime.metrics()
    assert metrics["ablated"] == vector
    weights = sum(layer.active for layer in layers_of(model)) - vector * first.active // HIDDEN
    assert metrics["density"] == weights / (2 * HIDDEN * WIDTH)
    with torch.no_grad():
        x = batch(99)[0]
        assert first.bias is not None
        assert torch.equal(first(x)[:, lost], first.bias[lost].expand(len(x), -1))
        assert bool((first(x)[:, ~lost] != first.bias[~lost]).all())


@pytest.mark.parametrize("structure", ["nm:1:4", "nm:2:4:2"])
def test_layers_become_sparser_down_to_what_they_could_hold_dense(structure: str) -> None:
    """At a threshold of 1 most outputs go; those that went stay away, and each that is left keeps its fan-in."""
    training = begin(structure, ablation=1.0)
    _, optimizer, runtime = training
    gone = [layer.given_up() for layer in runtime.layers]
    for step in range(TOTAL):
        before = runtime.metrics()["density"]
        losses(*training[:2], step, step + 1)
        assert runtime.metrics()["density"] <= before
        for trained, earlier in zip(runtime.layers, gone, strict=True):
            assert not bool((earlier & ~trained.given_up()).any())
            nm = trained.structure
            assert isinstance(nm, NM)
            pools = trained.active().sum(1).unique().tolist()
            assert set(pools) <= {0, nm.n}
        gone = [layer.given_up() for layer in runtime.layers]
    for trained in runtime.layers:
        left = int((~trained.given_up()).sum())
        assert left == trained.shape.out_features * trained.layer.config.structure.n // trained.layer.config.structure.m  # type: ignore[attr-defined]  # N:M
        mask = trained.structure.unpack(trained.mask, trained.layer.topology, trained.shape)  # type: ignore[arg-type]  # it prunes
        assert int(mask.sum()) == trained.active_weights()
        for tensor in (trained.layer.values, *companions(trained.layer.values, optimizer)):
            assert tensor.shape == trained.layer.values.shape and bool(tensor.isfinite().all())


def test_a_resumed_training_is_that_of_an_unbroken_one(tmp_path: Path) -> None:
    """Cut before and after outputs are given up; in memory and through a folder."""
    whole = begin(ablation=0.7)
    expected = losses(*whole[:2], 0, TOTAL)
    assert whole[2].metrics()["ablated"] > 0
    for cut in (INTERVAL - 1, INTERVAL, INTERVAL + 1):
        broken, fresh, other = begin(ablation=0.7), begin(ablation=0.7), begin(ablation=0.7)
        assert losses(*broken[:2], 0, cut) == expected[:cut]
        for part, source in zip(fresh, broken, strict=True):
            part.load_state_dict(copy.deepcopy(source.state_dict()))
        padst.save_checkpoint(tmp_path / str(cut), *broken)
        padst.load_checkpoint(tmp_path / str(cut), *other)
        for training in (fresh, other):
            assert losses(*training[:2], cut, TOTAL) == expected[cut:], f"cut at {cut}"
            for own, original in zip(training[2].layers, whole[2].layers, strict=True):
                assert torch.equal(own.given_up(), original.given_up())
            timeless = {"update_seconds": 0.0, "hook_seconds": 0.0}
            assert training[2].metrics() | timeless == whole[2].metrics() | timeless


# With permutations


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("learned", ["regroup", "sinkhorn_ste", "autoshuffle"])
def test_learned_permutations_bring_no_weights_to_outputs_given_up(learned: str, side: str) -> None:
    training = begin("nm:1:4", 0.7, learned, permutation="learned", permutation_side=side)
    model, _, runtime = training
    for step in range(TOTAL):
        losses(*training[:2], step, step + 1)
        for trained in runtime.layers:
            if trained.mask is not None:
                assert not bool((trained.layer.values[trained.mask == 0] != 0).any()), f"step {step}"
    assert runtime.metrics()["ablated"] > 0
    assert padst.permutation_report(runtime).layers[0].from_start.moved > 0
    before = loss_at(model, 99)
    hard = learned != "autoshuffle" or runtime.metrics()["hardened"] == 2
    padst.finalize(model)
    assert not hard or loss_at(model, 99).item() == before.item()


# Afterwards


def test_a_finished_model_computes_the_same_compiled_saved_and_dense(tmp_path: Path) -> None:
    training = begin("nm:2:4:2", 0.7, dtype=torch.float32)
    model, _, runtime = training
    losses(*training[:2], 0, TOTAL)
    lost = [layer.given_up() for layer in runtime.layers]
    assert lost[0].any()
    padst.finalize(model)
    dense = padst.densify(copy.deepcopy(model))
    x = batch(99, torch.float32)[0]
    with torch.no_grad():
        for layer, gone in zip(layers_of(model), lost, strict=True):
            assert not bool(layer.weight[gone].any())
        exact = copy.deepcopy(dense).double()(x.double())
        allowed = allowed_error(relative_error([model(x)], [exact]), torch.float32)
        assert relative_error([dense(x)], [exact]) <= allowed
        assert relative_error([torch.compile(model, backend="padst")(x)], [exact]) <= allowed
        padst.save_pretrained(model, tmp_path / "kept")
        assert torch.equal(padst.load_pretrained(tmp_path / "kept", dense)(x), model(x))
