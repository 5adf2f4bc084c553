"""Long use: memory stays flat and nothing is compiled anew, whatever the batch sizes and the topologies are.

`make soak` takes 10,000 calls and 200 updates, the tests a few.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import mmap
import os
import random
from collections.abc import Callable

import psutil
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import padst_compile as padst
from padst_compile.tolerance import allowed_error, relative_error

CALLS, UPDATES = (10_000, 200) if os.environ.get("PADST_SOAK") else (400, 20)
WARM_UP = 0.25  # of the calls: caches by number of tokens fill up
SLACK_BYTES = 16 << 20  # what an allocator keeps more or less of, much below one weight a call
SLACK_OBJECTS = 200  # of Python's, much below one a call


class Growth:
    """How much more there is of something than there was after warming up."""

    def __init__(self, steps: int) -> None:
        self._warm = int(steps * WARM_UP)
        self._before = (0, 0)
        self._compilations: dict[str, int] = {}

    def look(self, step: int) -> None:
        """Remember what there is, once."""
        if step == self._warm:
            self._before, self._compilations = _in_use(), _compilations()

    def check(self) -> None:
        """Fail if there is more."""
        (bytes_before, objects_before), (bytes_now, objects_now) = self._before, _in_use()
        assert bytes_before > 0
        assert _compilations() == self._compilations
        assert objects_now - objects_before <= SLACK_OBJECTS
        assert bytes_now - bytes_before <= SLACK_BYTES


def _in_use() -> tuple[int, int]:
    """Bytes of memory of this process without what its heap holds free, and Python's objects."""
    gc.collect()
    with contextlib.suppress(AttributeError):  # glibc has it
        ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss, len(gc.get_objects())


def _compilations() -> dict[str, int]:
    return {name: counters["stats"][name] for name in ("unique_graphs", "calls_captured")}


@pytest.fixture(autouse=True)
def _fresh_counters() -> None:
    torch._dynamo.reset()
    counters.clear()


def sparse(*structures: str) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in structures:
        layers += [nn.Linear(64, 64), nn.GELU(), nn.LayerNorm(64)]
    model = nn.Sequential(*layers)
    sparsity = {"nm:1:4": None}
    specs = {
        str(3 * place): padst.SparsitySpec(structure, sparsity.get(structure, 0.75), permutation="random")
        for place, structure in enumerate(structures)
    }
    return padst.sparsify(model, specs)


def test_calls_with_changing_batch_sizes_leave_nothing_behind() -> None:
    model = sparse("block:8", "nm:1:4", "diagonal").eval()
    compiled = torch.compile(model, backend="padst", dynamic=True)
    sizes, growth = random.Random(0), Growth(CALLS)
    with torch.no_grad():
        for call in range(CALLS):
            x = torch.randn(sizes.randint(2, 300), 64)
            y = compiled(x)
            growth.look(call)
            if call % (CALLS // 10) == 0:
                check(model, x, y)
    growth.check()


def check(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    """It is what the model in float64 gives, but for rounding."""
    eager = model(x)
    exact = [copy.deepcopy(model).double()(x.double())]
    assert relative_error([y], exact) <= allowed_error(relative_error([eager], exact), x.dtype)


@pytest.mark.parametrize("learned", [False, True], ids=["fixed permutations", "learned permutations"])
def test_updates_of_the_topology_leave_nothing_behind(learned: bool) -> None:
    model = sparse("block:8", "nm:1:4", "diagonal")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    permutation = padst.LearnedPermutation(method="regroup") if learned else None
    config = padst.DSTConfig(method="rigl", interval=2, end=1.0, total_steps=2 * UPDATES + 2, permutation=permutation)
    runtime = padst.attach(model, optimizer, config)
    compiled, growth = torch.compile(model, backend="padst"), Growth(2 * UPDATES)
    for step in range(2 * UPDATES):
        loss = compiled(torch.randn(32, 64)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        growth.look(step)
    assert runtime.metrics()["updates"] >= UPDATES - 1
    growth.check()


def new_pages(size: int) -> mmap.mmap:
    """Bytes that come from no heap, whose free parts would hide them."""
    pages = mmap.mmap(-1, size)
    pages.write(bytes([1]) * size)
    return pages


def test_what_is_left_behind_is_noticed() -> None:
    kept: list[object] = []
    leaks: list[Callable[[], object]] = [lambda: kept.append(new_pages(2 * SLACK_BYTES // CALLS)), lambda: kept.append([[]])]
    for leak in leaks:
        growth = Growth(CALLS)
        for call in range(CALLS):
            leak()
            growth.look(call)
        with pytest.raises(AssertionError):
            growth.check()
        kept.clear()
