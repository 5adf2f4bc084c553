"""Backward passes whose step never comes count for nothing, whichever layers' gradients were finite."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import padst_compile as padst
from padst_compile.testing.training import batch, layers_of, loss_at, small_model

TOTAL, INTERVAL = 12, 3
LEARNED = (None, "autoshuffle", "sinkhorn_ste", "regroup")
IN_VAIN = (0, 2, 5, 6)  # iterations before which a backward pass is dropped; of steps 1, 3 and 6, 7


def attached(learned: Any, side: str, dtype: torch.dtype = torch.float64, **arguments: Any) -> tuple[Any, Any, Any]:
    """A model that listens at every step: to updates of the topology, or for its permutations."""
    spec = {"permutation": "learned", "permutation_side": side} if learned else {}
    model = small_model(dtype=dtype, **spec)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    method = learned and padst.LearnedPermutation(method=learned, interval=1, deadline=0.75, fraction=1.0, gain=0.0)
    config = padst.DSTConfig(interval=INTERVAL, total_steps=TOTAL, end=1.0, check_invariants=True, permutation=method)
    return model, optimizer, padst.attach(model, optimizer, config, **arguments)


def twice(model: nn.Module, step: int) -> torch.Tensor:
    """A loss that uses every layer twice in one backward pass."""
    return loss_at(model, step) + loss_at(model, 100 + step)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("learned", LEARNED)
def test_gradients_that_are_dropped_leave_no_trace(learned: Any, side: str, set_to_none: bool) -> None:
    """With two backward passes for each step, and further ones in vain, as if those had not been; bit for bit."""
    results = []
    for in_vain in ((), IN_VAIN):
        model, optimizer, runtime = attached(learned, side)
        for step in range(TOTAL):
            if step in in_vain:
                (3 * twice(model, 50 + step)).backward()
                optimizer.zero_grad(set_to_none)
            for part in range(2):
                twice(model, 2 * step + part).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none)
        assert (runtime.updates, runtime.skipped) == (TOTAL // INTERVAL, 0)
        results.append(list(model.state_dict().values()))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("learned", LEARNED)
def test_an_overflow_in_one_layer_keeps_a_scaler_from_counting_the_others(learned: Any, side: str) -> None:
    """Scales are powers of two, so that the same comes out bit for bit as without the steps that are skipped."""
    results = []
    for scaled in (True, False):
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=2.0**8, growth_interval=100)
        model, optimizer, runtime = attached(learned, side, torch.float32, **({"grad_scaler": scaler} if scaled else {}))
        for step in range(TOTAL):
            for overflows in (True, False) if scaled and step in IN_VAIN else (False,):
                x, classes = batch(50 + step if overflows else step, torch.float32)
                hidden = model[0](x)
                if overflows:  # behind this layer everything is finite
                    hidden.register_hook(lambda gradient: gradient * torch.inf)
                scaler.scale(F.cross_entropy(model[1:](hidden), classes)).backward()
                assert bool(layers_of(model)[1].values.grad.isfinite().all())  # type: ignore[union-attr]  # after backward
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
        assert (runtime.step, runtime.updates, runtime.skipped) == (TOTAL, TOTAL // INTERVAL, 0)
        results.append(list(model.state_dict().values()))
    assert all(map(torch.equal, *results))


def test_a_layer_that_only_a_dropped_pass_reached_keeps_its_topology(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer, runtime = attached(None, "input")
    for step in range(INTERVAL - 1):
        loss_at(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    before = [layer.columns.clone() for layer in layers_of(model)]
    loss_at(model, INTERVAL).backward()
    optimizer.zero_grad()
    model[0](batch(INTERVAL)[0]).square().sum().backward()
    with caplog.at_level(logging.WARNING, "padst_compile"):
        optimizer.step()
    assert "no gradient came from layer '2'" in caplog.text
    assert [torch.equal(*pair) for pair in zip(before, (layer.columns for layer in layers_of(model)), strict=True)] == [
        False,
        True,
    ]
    assert (runtime.updates, runtime.skipped) == (1, 1)
