"""Checkpoints in one process: what they bring back, what they refuse, and that a killed writer leaves a complete one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import padst_compile as padst
from padst_compile.errors import CheckpointError, ResumeError
from padst_compile.training.config import Method, PermutationMethod

STEPS = 12


def make(
    structure: str = "block:8",
    method: Method = "rigl",
    permutation: PermutationMethod | None = None,
    sparsity: float | None = 0.5,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    width: int = 32,
) -> tuple[nn.Module, torch.optim.Optimizer, padst.Runtime]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, width), nn.GELU(), nn.Dropout(0.2), nn.Linear(width, 16), nn.Linear(16, 4))
    permuted = "none" if permutation is None else "learned"
    model = padst.sparsify(
        model, padst.SparsitySpec(structure=structure, sparsity=sparsity, permutation=permuted, ignore=("4",))
    )
    own = optimizer(model.parameters(), lr=1e-2)
    config = padst.DSTConfig(
        method=method,
        interval=4,
        end=1.0,
        total_steps=STEPS,
        final_sparsity=0.8 if method in ("magnitude", "dynadiag") else None,
        check_invariants=True,
        permutation=permutation and padst.LearnedPermutation(method=permutation, deadline=0.75),
    )
    return model, own, padst.attach(model, own, config)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> float:
    generator = torch.Generator().manual_seed(number)
    x, y = torch.randn(8, 16, generator=generator), torch.randint(0, 4, (8,), generator=generator)
    loss = cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer, runtime: padst.Runtime) -> list[torch.Tensor]:
    """Copies of all tensors."""
    found: list[torch.Tensor] = []

    def collect(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found.append(value.clone())
        elif isinstance(value, dict):
            for item in value.values():
                collect(item)

    for state in (model.state_dict(), optimizer.state_dict(), runtime.state_dict()):
        collect(state)
    return found


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


@pytest.mark.parametrize("stop", [0, 3, 6, 10])
@pytest.mark.parametrize(
    ("structure", "method", "permutation", "sparsity"),
    [
        ("block:8", "rigl", None, 0.5),
        ("block:8", "set", "autoshuffle", 0.5),
        ("diagonal", "mest", "sinkhorn_ste", 0.5),
        ("nm:1:4", "rigl", "regroup", None),
        ("block:8", "magnitude", None, 0.25),
        ("diagonal", "dynadiag", None, 0.0),
    ],
)
def test_a_resumed_training_has_the_losses_of_an_unbroken_one(
    structure: str, method: Method, permutation: PermutationMethod | None, sparsity: float | None, stop: int, tmp_path: Path
) -> None:
    model, optimizer, runtime = make(structure, method, permutation, sparsity)
    losses = []
    for number in range(STEPS):
        if number == stop:
            padst.save_checkpoint(tmp_path, model, optimizer, runtime)
        losses.append(step(model, optimizer, number))
    other, its_optimizer, its_runtime = make(structure, method, permutation, sparsity)
    for number in range(20, 22):  # its own state must not show
        step(other, its_optimizer, number)
    padst.load_checkpoint(tmp_path, other, its_optimizer, its_runtime)
    assert [step(other, its_optimizer, number) for number in range(stop, STEPS)] == losses[stop:]
    assert same(state_of(model, optimizer, runtime), state_of(other, its_optimizer, its_runtime))


def test_extra_comes_back_and_a_second_checkpoint_replaces_the_first(tmp_path: Path) -> None:
    model, optimizer, runtime = make(optimizer=torch.optim.SGD)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    path = tmp_path / "deep" / "checkpoint"
    for number in range(2):
        step(model, optimizer, number)
        scheduler.step()
        padst.save_checkpoint(path, model, optimizer, runtime, {"scheduler": scheduler.state_dict(), "step": number})
    assert padst.load_checkpoint(path, model, optimizer, runtime) == {"scheduler": scheduler.state_dict(), "step": 1}
    assert len(list(path.iterdir())) == 2  # the data, and the name of the data


def test_a_training_without_runtime_and_with_two_optimizers_is_saved(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    first = torch.optim.SGD(model[0].parameters(), lr=0.1, momentum=0.9)
    second = torch.optim.Adam(model[1].parameters(), lr=0.1)
    model(torch.ones(1, 4)).sum().backward()
    first.step()
    second.step()
    padst.save_checkpoint(tmp_path, model, (first, second))
    want = {name: value.clone() for name, value in model.state_dict().items()}
    moment = second.state[model[1].weight]["exp_avg"].clone()
    first.step()
    second.step()
    padst.load_checkpoint(tmp_path, model, (first, second))
    assert all(torch.equal(value, want[name]) for name, value in model.state_dict().items())
    assert torch.equal(second.state[model[1].weight]["exp_avg"], moment)
    with pytest.raises(ResumeError, match="has 2 optimizers, this training 1"):
        padst.load_checkpoint(tmp_path, model, first)


def _missing(path: Path) -> None:
    (path / "current").unlink()


def _gone(path: Path) -> None:
    (path / "current").write_text("data-of-nobody")


def _cut(path: Path) -> None:
    file = next(path.glob("data-*/state.pt"))
    file.write_bytes(file.read_bytes()[:100])


def _no_index(path: Path) -> None:
    next(path.glob("data-*/.metadata")).write_bytes(b"")


def _no_data(path: Path) -> None:
    next(path.glob("data-*/*.distcp")).unlink()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (_missing, "no checkpoint in"),
        (_gone, "names 'data-of-nobody', which is not there"),
        (_cut, "state.pt is not as it was written"),
        (_no_index, ".metadata is not as it was written"),
        (_no_data, r"is damaged: .*__0_0\.distcp.*bring back a copy of the folder"),
    ],
)
def test_damaged_checkpoints_are_refused_and_nothing_changes(
    harm: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    model, optimizer, runtime = make(permutation="autoshuffle")
    step(model, optimizer, 0)
    padst.save_checkpoint(tmp_path, model, optimizer, runtime)
    harm(tmp_path)
    step(model, optimizer, 1)
    before = state_of(model, optimizer, runtime)
    with pytest.raises(CheckpointError, match=message):
        padst.load_checkpoint(tmp_path, model, optimizer, runtime)
    assert same(state_of(model, optimizer, runtime), before)


def test_older_checkpoints_without_digests_of_tensors_are_loaded(tmp_path: Path) -> None:
    model, optimizer, runtime = make()
    step(model, optimizer, 0)
    padst.save_checkpoint(tmp_path, model, optimizer, runtime)
    want = state_of(model, optimizer, runtime)
    (digests,) = tmp_path.glob("data-*/digests.json")
    known = json.loads(digests.read_text())
    assert known.keys() == {file.name for file in digests.parent.iterdir()} - {digests.name}
    digests.write_text(json.dumps({name: digest for name, digest in known.items() if not name.endswith(".distcp")}))
    step(model, optimizer, 1)
    padst.load_checkpoint(tmp_path, model, optimizer, runtime)
    assert same(state_of(model, optimizer, runtime), want)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"method": "set"}, "made with method='rigl'"),
        ({"width": 64}, "layer '0' has shape"),
        ({"sparsity": 0.75}, "0.values is"),
        ({"structure": "block:4"}, "structure block:8"),
        ({"optimizer": torch.optim.SGD}, "state of an optimizer AdamW, this one is SGD"),
    ],
)
def test_checkpoints_of_another_training_are_refused_and_nothing_changes(
    other: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model, optimizer, runtime = make()
    step(model, optimizer, 0)
    padst.save_checkpoint(tmp_path, model, optimizer, runtime)
    model, optimizer, runtime = make(**other)
    step(model, optimizer, 1)
    before = state_of(model, optimizer, runtime)
    with pytest.raises(ResumeError, match=message):
        padst.load_checkpoint(tmp_path, model, optimizer, runtime)
    with pytest.raises(ResumeError, match="saved with a runtime"):
        padst.load_checkpoint(tmp_path, model, optimizer)
    assert same(state_of(model, optimizer, runtime), before)


def test_what_cannot_be_saved_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    model, optimizer, runtime = make()
    padst.save_checkpoint(tmp_path, model, optimizer, runtime, {"step": 0})
    with pytest.raises(CheckpointError, match="extra takes"):
        padst.save_checkpoint(tmp_path, model, optimizer, runtime, {"step": object()})
    assert padst.load_checkpoint(tmp_path, model, optimizer, runtime) == {"step": 0}
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(CheckpointError, match="could not be written"):
        padst.save_checkpoint(file, model, optimizer, runtime)


def test_a_trained_model_is_saved_and_loaded(tmp_path: Path) -> None:
    model, optimizer, _ = make(permutation="regroup", structure="nm:1:4", sparsity=None)
    for number in range(5):
        step(model, optimizer, number)
    padst.finalize(model)
    model.eval()
    padst.save_pretrained(model, tmp_path)
    other, *_ = make(permutation="regroup", structure="nm:1:4", sparsity=None)
    padst.finalize(other)
    padst.load_pretrained(tmp_path, padst.densify(other))
    x = torch.randn(3, 16)
    assert torch.equal(other.eval()(x), model(x))


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_a_writer_killed_at_any_moment_leaves_a_complete_checkpoint(tmp_path: Path) -> None:
    script = Path(__file__).parent / "distributed" / "killed_writers.py"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_one_process_saves_and_loads_without_a_warning(tmp_path: Path) -> None:
    model, optimizer, runtime = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        padst.save_checkpoint(tmp_path, model, optimizer, runtime)
        padst.load_checkpoint(tmp_path, model, optimizer, runtime)
