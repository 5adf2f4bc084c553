"""Whatever a user does with a model in training, in whatever order: what must hold, holds."""

from __future__ import annotations

import copy
import math
from typing import Any

import hypothesis
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn

import padst_compile as padst
from padst_compile import permutation
from padst_compile.backend import padst as backend
from padst_compile.kernels.soft_permute import HARD
from padst_compile.testing.training import batch, layers_of, loss_at, small_model
from padst_compile.training.rearrange import companions

INTERVAL, TOTAL = 3, 24
# structure, method, learned permutation, permuted side
TRAININGS = (
    ("block:4", "rigl", "autoshuffle", "output"),
    ("unstructured", "set", "autoshuffle", "input"),
    ("nm:2:4:2", "rigl", "regroup", "input"),
    ("diagonal:4", "mest", "sinkhorn_ste", "output"),
    ("block:8x4", "magnitude", "sinkhorn_ste", "input"),
    ("diagonal", "dynadiag", None, None),
    ("nm:1:4", "static", "regroup", "output"),
)


class Training(RuleBasedStateMachine):
    """A user's loop, one thing after the other."""

    @initialize(training=st.sampled_from(TRAININGS), adam=st.booleans())
    def begin(self, training: tuple[str, str, str | None, str | None], adam: bool) -> None:
        self.training, self.adam = training, adam
        self.dtype = torch.float64
        self.compiled = False
        self.number = 0
        self.model, self.optimizer, self.runtime = self.make()
        self.program: nn.Module = self.model
        self.units = [layer.active().sum(1) for layer in self.runtime.layers]
        self.density = self.runtime.metrics()["density"]
        self.state: dict[str, Any] | None = None

    def make(self) -> tuple[nn.Sequential, torch.optim.Optimizer, padst.Runtime]:
        structure, method, learned, side = self.training
        permuted = {"permutation": "learned", "permutation_side": side} if learned else {}
        sparsity = {"sparsity": 0.0} if method == "dynadiag" else {}
        model = small_model(structure, **permuted, **sparsity)
        parameters = model.parameters()
        optimizer: torch.optim.Optimizer = (
            torch.optim.AdamW(parameters, lr=0.01) if self.adam else torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
        )
        learning = learned and padst.LearnedPermutation(method=learned, fraction=0.5, interval=2, deadline=0.5)  # type: ignore[arg-type]  # a method
        config = padst.DSTConfig(
            method=method,  # type: ignore[arg-type]  # a method
            interval=INTERVAL,
            total_steps=TOTAL,
            final_sparsity=0.9 if method in ("magnitude", "dynadiag") else None,
            permutation=learning or None,
            check_invariants=True,
            staggered=False,
        )
        return model, optimizer, padst.attach(model, optimizer, config)

    def backward(self) -> None:
        self.number += 1
        x, classes = batch(self.number, self.dtype)
        nn.functional.cross_entropy(self.program(x), classes).backward()

    def step(self) -> None:
        before = self.runtime.step
        self.optimizer.step()
        self.optimizer.zero_grad()
        assert self.runtime.step == before + 1

    # Rules

    @rule()
    def train(self) -> None:
        self.backward()
        self.step()

    @rule(times=st.integers(2, 3))
    def accumulate(self, times: int) -> None:
        for _ in range(times):
            self.backward()
        self.step()

    @rule()
    def until_an_update(self) -> None:
        """Update the topology where that is still due."""
        updates, due = self.runtime.updates, self.runtime.step // INTERVAL * INTERVAL + INTERVAL
        while self.runtime.step < due:
            self.train()
        moves = self.training[1] in ("rigl", "set", "mest", "magnitude") and due <= self.runtime.config.last_update
        assert self.runtime.updates == updates + moves
        assert self.runtime.skipped == 0

    @rule()
    def until_hard(self) -> None:
        """Past the deadline, at whose step topologies may change."""
        while self.runtime.step <= TOTAL // 2:
            self.train()
        assert all(learner.hard for learner in self.runtime.learners.values())

    @rule()
    def skipped_step(self) -> None:
        """As a GradScaler skips one: a backward pass that overflows, and no step."""
        before, steps = copy.deepcopy(self.model.state_dict()), self.runtime.step
        x, classes = batch(self.number, self.dtype)
        (nn.functional.cross_entropy(self.program(x), classes) * torch.inf).backward()
        self.optimizer.zero_grad()
        assert self.runtime.step == steps
        assert all(map(torch.equal, before.values(), self.model.state_dict().values()))

    @rule()
    def save(self) -> None:
        parts = {"model": self.model, "optimizer": self.optimizer, "runtime": self.runtime}
        self.state = copy.deepcopy({name: part.state_dict() for name, part in parts.items()})  # type: ignore[attr-defined]  # have one
        self.saved_loss = loss_at(self.model, 0).item()
        self.saved_dtype = self.dtype

    @precondition(lambda self: self.state is not None)
    @rule()
    def load_into_a_fresh_model(self) -> None:
        assert self.state is not None
        padst.finalize(self.model)
        self.model, self.optimizer, self.runtime = self.make()
        self.dtype = self.saved_dtype
        self.model.to(self.dtype)
        self.program, self.compiled = self.model, False
        self.model.load_state_dict(self.state["model"])
        self.optimizer.load_state_dict(copy.deepcopy(self.state["optimizer"]))
        self.runtime.load_state_dict(copy.deepcopy(self.state["runtime"]))
        assert loss_at(self.model, 0).item() == self.saved_loss
        self.density = self.runtime.metrics()["density"]

    @rule()
    def deepcopy(self) -> None:
        """A copy computes the same, and training the model does not change it."""
        twin = copy.deepcopy(self.model)
        x, _ = batch(0, self.dtype)
        expected = self.model(x)
        assert torch.equal(twin(x), expected)
        self.train()
        assert torch.equal(twin(x), expected)

    @precondition(lambda self: not self.compiled)
    @rule()
    def compile(self) -> None:
        torch._dynamo.reset()
        self.program, self.compiled = torch.compile(self.model, backend=backend), True  # type: ignore[assignment]  # a module
        self.train()

    @precondition(lambda self: self.compiled)
    @rule()
    def compiled_as_eager(self) -> None:
        x, _ = batch(0, self.dtype)
        close = {"rtol": 1e-4, "atol": 1e-5} if self.dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-12}
        assert torch.allclose(self.program(x), self.model(x), **close)

    @rule(factor=st.sampled_from((0.1, 0.5, 2.0)))
    def change_the_learning_rate(self, factor: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = min(0.1, group["lr"] * factor)

    @precondition(lambda self: not self.compiled)
    @rule(dtype=st.sampled_from((torch.float32, torch.float64)))
    def move_to_another_dtype(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.model.to(dtype)
        self.optimizer.load_state_dict(self.optimizer.state_dict())  # which casts the moments

    @precondition(lambda self: not self.compiled)
    @rule()
    def move_to_other_memory(self) -> None:
        """As to another device and back, in the midst of accumulation."""
        self.backward()
        self.model._apply(torch.clone)
        self.train()

    # What must hold

    @invariant()
    def density_is_exact(self) -> None:
        density = self.runtime.metrics()["density"]
        if self.training[1] in ("magnitude", "dynadiag"):
            assert density <= self.density
            self.density = density
        else:
            assert density == self.density
            for units, layer in zip(self.units, self.runtime.layers, strict=True):
                assert torch.equal(layer.active().sum(1), units)

    @invariant()
    def topologies_and_permutations_are_valid(self) -> None:
        for layer in layers_of(self.model):
            assert layer.config.structure.check_topology(layer.topology, layer.config.shape) is None
            if layer.permutation is not None:
                permutation.check(layer.permutation, layer.permutation.numel(), "layer")

    @invariant()
    def zeros_stay_zero(self) -> None:
        """In the weights, and in all that lies beside them, which has their shape and dtype."""
        for layer in self.runtime.layers:
            values, structure = layer.layer.values, layer.structure
            assert values.dtype == self.dtype
            for tensor in (values, *companions(values, self.optimizer)):
                again = structure.pack(structure.unpack(tensor, layer.layer.topology, layer.shape), layer.layer.topology)
                assert torch.equal(again, tensor)
                assert tensor.isfinite().all()
            if self.training[1] == "magnitude":
                pruned = structure.unit_totals(layer.layer.dense_weight().abs()) if layer.layer.permutation is None else None
                assert pruned is None or bool((pruned[~layer.active()] == 0).all())
        states = [state for values, state in self.optimizer.state.items() if values is self.runtime.layers[0].layer.values]
        assert self.runtime.step == 0 or states

    @invariant()
    def soft_matrices_are_doubly_stochastic(self) -> None:
        for name, learner in self.runtime.learners.items():
            layer = self.model.get_submodule(name)
            assert learner.hard or layer.soft is not None  # type: ignore[union-attr]  # a sparse layer
            soft = layer.soft
            if soft is None:
                continue
            if learner.hard:
                assert int(soft.state) == HARD  # type: ignore[union-attr]  # a SoftPermutation
                continue
            matrix = soft.matrix  # type: ignore[union-attr]  # a SoftPermutation
            assert matrix.dtype == torch.float32
            assert bool((matrix >= 0).all())
            assert torch.allclose(matrix.sum(1), torch.ones(matrix.shape[0]), atol=1e-5)

    @invariant()
    def metrics_are_finite(self) -> None:
        assert all(math.isfinite(number) for number in self.runtime.metrics().values())

    def teardown(self) -> None:
        if not hasattr(self, "model"):
            return
        exact = self.training[1] != "dynadiag" and all(learner.hard for learner in self.runtime.learners.values())
        before = loss_at(self.model, 0).item()
        padst.finalize(self.model)
        after = loss_at(self.model, 0).item()
        assert math.isclose(before, after, rel_tol=1e-5) or not exact
        assert math.isfinite(after)
        assert all(layer.soft is None and layer.gate is None for layer in layers_of(self.model))


Training.TestCase.settings = hypothesis.settings(
    max_examples=14, stateful_step_count=15, deadline=None, suppress_health_check=list(hypothesis.HealthCheck)
)
test_training_as_a_state_machine = Training.TestCase


def test_gates_follow_a_model_to_another_dtype() -> None:
    """DynaDiag goes on cooling the gates that the layers multiply with."""
    model = small_model("diagonal", sparsity=0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    padst.attach(model, optimizer, padst.DSTConfig(method="dynadiag", final_sparsity=0.9, total_steps=TOTAL))
    model.float()
    gates = [layer.gate for layer in layers_of(model)]
    before = [gate.clone() for gate in gates if gate is not None]
    for step in range(2):
        loss_at(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(
        layer.gate is gate for layer, gate in zip(layers_of(model), gates, strict=True)
    )  # the same tensors: nothing is compiled anew
    assert not any(map(torch.equal, before, gates))  # type: ignore[arg-type]  # tensors
    padst.finalize(model)
    assert [layer.density for layer in layers_of(model)] == [5 / 48, 5 / 48]
