"""What users do wrong when they train, and what they are told; nothing is left half done."""

from __future__ import annotations

import copy
import gc
import io
import logging
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import padst_compile as padst
from padst_compile.errors import (
    AlreadyAttachedError,
    AttachError,
    NotAttachedError,
    PadstError,
    ResumeError,
    TrainingConfigError,
    UnknownFieldError,
)
from padst_compile.kernels import gradient_tap
from padst_compile.testing.training import batch, layers_of, loss_at, small_model
from padst_compile.training.attach import runtime_of

LEARNED = padst.LearnedPermutation()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def config(**fields: Any) -> padst.DSTConfig:
    return padst.DSTConfig(**({"interval": 2, "total_steps": 20} | fields))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        loss_at(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_untouched(model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    assert all(layer.soft is None and layer.gate is None for layer in layers_of(model))
    assert all(runtime_of(layer) is None for layer in layers_of(model))
    assert not any(optimizer._optimizer_step_post_hooks or optimizer._optimizer_step_pre_hooks for optimizer in optimizers)
    assert all(gradient_tap.listener_of(layer.topology) is None for layer in layers_of(model))


# Configurations


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"total_steps": None}, "total_steps"),
        ({"method": "static", "total_steps": None, "permutation": LEARNED}, "total_steps"),
        ({"total_steps": 0}, "total_steps"),
        ({"total_steps": 1.5}, "total_steps"),
        ({"interval": 0}, "interval"),
        ({"interval": True}, "interval"),
        ({"fraction": 1.5}, "fraction"),
        ({"fraction": float("nan")}, "fraction"),
        ({"end": -0.1}, "end"),
        ({"start": -1}, "start"),
        ({"gradient_rows": 0.0}, "gradient_rows"),
        ({"method": "set", "gradient_rows": 0.5}, "gradient_rows samples .* method 'set' takes no sample"),
        ({"ablation": 0.3, "gradient_rows": 0.5}, "gradient_rows samples .* ablation"),
        ({"mest_weight": -1.0}, "mest_weight"),
        ({"method": "magnitude"}, "final_sparsity"),
        ({"method": "rigl", "final_sparsity": 0.9}, "final_sparsity"),
        ({"method": "set", "ablation": 0.5}, "ablation"),
        ({"permutation": "autoshuffle"}, "permutation"),
    ],
    ids=str,
)
def test_configurations_that_make_no_sense(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(TrainingConfigError, match=named):
        config(**fields)


def test_configurations_of_permutations_that_make_no_sense() -> None:
    for name, value in {"threshold": 2.0, "learning_rate": -1.0, "group": 0, "interval": 0, "deadline": "x"}.items():
        with pytest.raises(TrainingConfigError, match=f"LearnedPermutation: {name}"):
            padst.LearnedPermutation(**{name: value})  # type: ignore[arg-type]  # wrong on purpose


def test_unknown_names_come_with_the_closest_known_one() -> None:
    with pytest.raises(UnknownFieldError, match="did you mean 'rigl'"):
        config(method="rigel")
    with pytest.raises(UnknownFieldError, match="did you mean 'interval'"):
        padst.DSTConfig.from_dict({"intervall": 3, "total_steps": 5})
    with pytest.raises(UnknownFieldError, match="did you mean 'autoshuffle'"):
        padst.LearnedPermutation(method="autoshufle")  # type: ignore[arg-type]  # wrong on purpose


@pytest.mark.parametrize("permutation", [None, LEARNED])
def test_configurations_survive_json(permutation: padst.LearnedPermutation | None) -> None:
    made = config(method="mest", score="l2", permutation=permutation)
    assert padst.DSTConfig.from_dict(made.to_dict()) == made


def test_static_topologies_need_no_schedule() -> None:
    assert padst.DSTConfig(method="static").total_steps is None


# attach


def without_first(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(list(model.parameters())[1:], lr=0.1)


def stale(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(copy.deepcopy(model).parameters(), lr=0.1)


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4))


def frozen() -> nn.Module:
    model = small_model()
    for layer in layers_of(model):
        layer.values.requires_grad_(False)
    return model


def diagonals() -> nn.Module:
    return small_model("diagonal", sparsity=0.0)


def second_refused() -> nn.Module:
    """Of its layers method dynadiag can train the first."""
    model = diagonals()
    model[2] = small_model("block:4")[2]
    return model


def permuted() -> nn.Module:
    return small_model(permutation="learned")


def late(method: Any) -> padst.LearnedPermutation:
    """First acts when learning has ended."""
    return padst.LearnedPermutation(method=method, interval=22)


def on_meta() -> nn.Module:
    return small_model().to("meta")


@pytest.mark.parametrize(
    ("make", "optimizer", "fields", "message"),
    [
        (dense, sgd, {}, r"padst\.sparsify"),
        (frozen, sgd, {}, "requires_grad"),
        (small_model, without_first, {}, r"layer '0'.*model\.parameters\(\)"),
        (small_model, stale, {}, r"layer '0'.*model\.parameters\(\)"),
        (small_model, sgd, {"permutation": LEARNED}, "permutation='learned'"),
        (lambda: small_model("nm:1:4"), sgd, {"method": "magnitude", "final_sparsity": 0.9}, r"layer '0'.*nm:1:4.*block"),
        (small_model, sgd, {"method": "dynadiag", "final_sparsity": 0.9}, r"layer '0'.*Diagonal\(\)"),
        (second_refused, sgd, {"method": "dynadiag", "final_sparsity": 0.9}, r"layer '2'.*Diagonal\(\)"),
        (diagonals, sgd, {"method": "dynadiag", "final_sparsity": 0.999}, r"layer '0'.*at most"),
        (small_model, sgd, {"ablation": 0.3}, "N:M"),
        (
            permuted,
            sgd,
            {"permutation": late("sinkhorn_ste")},
            r"layer '0' would never learn.*step 11.*step 10.*than 22",
        ),
        (permuted, sgd, {"permutation": late("regroup"), "end": 0.5}, r"layer '0' would never learn.*DSTConfig\.end.*step 10"),
        (on_meta, sgd, {}, r"layer '0'.*materialise"),
    ],
)
def test_what_attach_refuses(
    make: Callable[[], nn.Module],
    optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    fields: dict[str, Any],
    message: str,
) -> None:
    """The message says where and what to do, and a right attach works afterwards."""
    model = make()
    made = optimizer(model)
    with pytest.raises(PadstError, match=message):
        padst.attach(model, made, config(**fields))
    assert_untouched(model, made)


def test_a_failure_half_way_leaves_no_training_state() -> None:
    """The second layer is one that the learner refuses after the first one's has been made."""
    model = permuted()
    optimizer = sgd(model)
    permutation = model[2].permutation.clone()
    model[2].permutation.fill_(0)  # no permutation any more
    with pytest.raises(PadstError):
        padst.attach(model, optimizer, config(permutation=LEARNED))
    assert_untouched(model, optimizer)
    model[2].permutation.copy_(permutation)
    padst.attach(model, optimizer, config(permutation=LEARNED))
    train(model, optimizer, range(3))
    padst.finalize(model)


def test_two_optimizers_must_not_share_a_parameter() -> None:
    model = small_model()
    first, second = sgd(model), sgd(model)
    with pytest.raises(AttachError, match="two optimizers"):
        padst.attach(model, [first, second], config())
    assert_untouched(model, first, second)


def test_a_configuration_that_is_none() -> None:
    model = small_model()
    with pytest.raises(AttachError, match="DSTConfig"):
        padst.attach(model, sgd(model), {"interval": 3})  # type: ignore[arg-type]  # wrong on purpose


def test_parameters_that_the_optimizer_gets_later() -> None:
    """Refused before, accepted after."""
    model = small_model()
    optimizer = torch.optim.SGD(model[4].parameters(), lr=0.1)
    with pytest.raises(AttachError, match="layer '0'"):
        padst.attach(model, optimizer, config())
    optimizer.add_param_group({"params": [p for layer in layers_of(model) for p in layer.parameters()]})
    runtime = padst.attach(model, optimizer, config())
    train(model, optimizer, range(4))
    assert runtime.updates == 2
    padst.finalize(model)


def test_a_sparse_layer_that_comes_during_a_training_is_refused_before_the_step() -> None:
    model = small_model()
    optimizer = sgd(model)
    runtime = padst.attach(model, optimizer, config())
    width = model[4].out_features
    model.append(nn.Linear(width, width).double())  # dense ones may come
    optimizer.add_param_group({"params": model[-1].parameters()})
    train(model, optimizer, range(2))
    late = padst.sparsify(nn.Linear(width, width).double(), padst.SparsitySpec(padst.Unstructured(), 0.5))
    model.append(late)
    train(model, optimizer, range(2, 3))  # it is not in the optimizer, and stays as it is
    optimizer.add_param_group({"params": late.parameters()})
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        with pytest.raises(
            AttachError, match=r"weights of layer '6' after padst\.attach.*padst\.finalize\(model\) and attach again"
        ):
            train(model, optimizer, range(3, 4))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (runtime.step, runtime.updates) == (3, 1)
    late.values.requires_grad_(False)
    late.values.grad = None
    train(model, optimizer, range(3, 4))
    assert (runtime.step, runtime.updates) == (4, 2)
    late.values.requires_grad_()
    padst.finalize(model)
    assert_untouched(model, optimizer)
    assert [layer.name for layer in padst.attach(model, optimizer, config()).layers] == ["0", "2", "6"]


def test_a_second_attach_is_refused_and_the_first_goes_on() -> None:
    model = small_model()
    optimizer, other = sgd(model), sgd(model)
    runtime = padst.attach(model, optimizer, config())
    with pytest.raises(AlreadyAttachedError, match=r"layer '0'.*padst\.finalize"):
        padst.attach(model, other, config())
    assert not other._optimizer_step_post_hooks
    train(model, optimizer, range(4))
    assert (runtime.step, runtime.updates) == (4, 2)
    padst.finalize(model)
    assert_untouched(model, optimizer, other)
    padst.attach(model, other, config())
    padst.finalize(model)


def test_finalize_without_attach() -> None:
    model = small_model()
    with pytest.raises(NotAttachedError, match=r"padst\.attach"):
        padst.finalize(model)
    optimizer = sgd(model)
    padst.attach(model, optimizer, config())
    padst.finalize(model)
    with pytest.raises(NotAttachedError):
        padst.finalize(model)


@pytest.mark.parametrize("learned", ["autoshuffle", "sinkhorn_ste", "regroup"])
def test_a_training_that_is_given_up_leaves_nothing_behind(learned: str) -> None:
    """Neither the model, nor anybody who listens to memory that others may use by then."""
    gc.collect()
    listeners = len(gradient_tap._listeners)

    def give_up() -> weakref.ref[nn.Module]:
        model = permuted()
        optimizer = sgd(model)
        method = padst.LearnedPermutation(method=learned, interval=1)  # type: ignore[arg-type]  # a method
        padst.attach(model, optimizer, config(interval=2, permutation=method))
        train(model, optimizer, range(1))
        assert len(gradient_tap._listeners) > listeners
        return weakref.ref(model[0])

    layer = give_up()
    gc.collect()
    assert layer() is None
    assert len(gradient_tap._listeners) == listeners


def test_a_model_outlives_its_optimizer_and_is_finalized_later() -> None:
    def begin() -> nn.Module:
        model = permuted()
        optimizer = sgd(model)
        padst.attach(model, optimizer, config(permutation=LEARNED))
        train(model, optimizer, range(2))
        return model

    model = begin()
    gc.collect()
    assert layers_of(model)[0].soft is not None
    padst.finalize(model)
    assert_untouched(model)


def test_copies_of_a_model_in_training_are_not_in_training() -> None:
    model = permuted()
    padst.attach(model, sgd(model), config(permutation=LEARNED))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(twin(batch(0)[0]), model(batch(0)[0]))
        with pytest.raises(NotAttachedError):
            padst.finalize(twin)
        padst.attach(twin, sgd(twin), config(permutation=LEARNED))
        padst.finalize(twin)
    padst.finalize(model)


# Gradients that are not finite


@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("method", ["rigl", "set", "mest"])
def test_updates_are_left_out_counted_and_logged(method: str, poison: float, caplog: pytest.LogCaptureFixture) -> None:
    model = small_model(permutation="learned")
    learned = padst.LearnedPermutation(method="regroup", interval=2)
    optimizer = sgd(model)
    runtime = padst.attach(model, optimizer, config(method=method, permutation=learned, check_invariants=True))
    train(model, optimizer, range(1))
    good = copy.deepcopy(model.state_dict())
    with caplog.at_level(logging.WARNING, "padst_compile"):
        (loss_at(model, 1) * poison).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (runtime.updates, runtime.skipped) == (0, 1)
    assert runtime.metrics()["skipped_updates"] == 1
    assert "step 2" in caplog.text
    assert "'0'" in caplog.text
    for layer, name in zip(layers_of(model), ("0", "2"), strict=True):
        assert all(torch.equal(good[f"{name}.{key}"], getattr(layer, key)) for key in ("row_pointers", "columns"))
    model.load_state_dict(good)
    train(model, optimizer, range(2, 6))
    assert (runtime.updates, runtime.skipped) == (2, 1)
    padst.finalize(model)


@pytest.mark.parametrize("learned", ["autoshuffle", "sinkhorn_ste"])
def test_permutations_survive_gradients_that_are_not_finite(learned: str) -> None:
    model = small_model(permutation="learned")
    optimizer = sgd(model)
    method = padst.LearnedPermutation(method=learned, interval=1, deadline=1.0)  # type: ignore[arg-type]  # a method
    runtime = padst.attach(model, optimizer, config(permutation=method))
    train(model, optimizer, range(1))
    good = copy.deepcopy(model.state_dict())
    (loss_at(model, 1) * torch.nan).backward()
    optimizer.step()
    optimizer.zero_grad()
    model.load_state_dict(good)
    train(model, optimizer, range(2, 5))
    assert all(0 <= learner.penalty < 1 for learner in runtime.learners.values())
    assert loss_at(padst.finalize(model), 0).isfinite()


def test_a_layer_that_is_not_used_keeps_its_topology(caplog: pytest.LogCaptureFixture) -> None:
    model = small_model()
    optimizer = sgd(model)
    runtime = padst.attach(model, optimizer, config(interval=1))
    head = nn.Linear(24, 24).double()
    before = layers_of(model)[1].columns.clone()
    with caplog.at_level(logging.WARNING, "padst_compile"):
        nn.Sequential(model[0], nn.Linear(48, 24).double(), head)(torch.randn(3, 24).double()).sum().backward()
        optimizer.step()
    assert "'2'" in caplog.text
    assert (runtime.updates, runtime.skipped) == (1, 1)
    assert torch.equal(before, layers_of(model)[1].columns)
    padst.finalize(model)


# Resuming


@pytest.mark.parametrize(
    ("other", "fields", "message"),
    [
        (lambda: small_model("block:4"), {"interval": 3}, "interval=2.*3"),
        (lambda: small_model("block:4"), {"seed": 1}, "seed"),
        (lambda: small_model("block:8x4"), {}, "layer '0' has structure block:4x4.*block:8x4"),
        (lambda: small_model("block:4", seed=1, init="random"), {}, "layer '0' has another topology"),
        (lambda: nn.Sequential(small_model("block:4")), {}, "other sparse layers"),
        (lambda: small_model("block:4")[:2], {}, "other sparse layers.*2"),
        (lambda: small_model("block:4"), {"method": "static"}, "method"),
    ],
)
def test_a_state_of_something_else_is_refused_and_changes_nothing(
    other: Callable[[], nn.Module], fields: dict[str, Any], message: str
) -> None:
    model = small_model("block:4")
    optimizer = sgd(model)
    runtime = padst.attach(model, optimizer, config())
    train(model, optimizer, range(1))
    state = copy.deepcopy(runtime.state_dict())
    fresh = other()
    resumed = padst.attach(fresh, sgd(fresh), config(**fields))
    before = copy.deepcopy(resumed.state_dict())
    with pytest.raises(ResumeError, match=message):
        resumed.load_state_dict(state)
    after = resumed.state_dict()
    assert (after["steps"], after["updates"], after["config"]) == (before["steps"], before["updates"], before["config"])
    padst.finalize(model)
    padst.finalize(fresh)


def test_what_is_no_state_at_all() -> None:
    model = small_model()
    runtime = padst.attach(model, sgd(model), config())
    for state in ({}, model.state_dict(), {**runtime.state_dict(), "version": 99}):
        with pytest.raises(ResumeError):
            runtime.load_state_dict(state)
    padst.finalize(model)


def test_the_number_of_optimizers_must_be_the_same() -> None:
    model, other = small_model(), small_model()
    runtime = padst.attach(model, sgd(model), config())
    halves = [torch.optim.SGD(list(part.parameters()), lr=0.1) for part in (other[:2], other[2:])]
    resumed = padst.attach(other, halves, config())
    with pytest.raises(ResumeError, match="1 optimizers, this runtime 2"):
        resumed.load_state_dict(runtime.state_dict())
    padst.finalize(model)
    padst.finalize(other)
