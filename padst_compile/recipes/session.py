"""A training in memory: model, optimizer and runtime, one step at a time, and all of it as a state to save."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from padst_compile.backend import padst
from padst_compile.benchmarking.models import first_tensor
from padst_compile.conversion import sparse_layers
from padst_compile.errors import MissingDeviceError, RunFolderError
from padst_compile.foldable import sparsify
from padst_compile.recipes.config import TrainConfig
from padst_compile.recipes.evaluation import Scores, autocast, cross_entropy, evaluate
from padst_compile.recipes.optimisation import learning_rate, make_optimizer, set_learning_rate
from padst_compile.recipes.seeding import seed_of
from padst_compile.recipes.tasks import Task, example_of
from padst_compile.spec import SparsitySpec
from padst_compile.training import Runtime, attach, finalize

# What the runtime reports that is the same whenever the training is repeated.
_RUNTIME_METRICS = ("density", "exploration", "updates", "skipped_updates", "penalty", "hardened")
_RUNTIME_TIMES = ("update_seconds", "hook_seconds")


class Session:
    """A training that begins with random weights, or goes on from a state.

    Args:
        config: of the run.
        task: its data and model.
        prepare: changes tensors of the sparse model before anything else has seen it.

    Attributes:
        step: optimizer steps taken so far.

    Raises:
        PadstError: the model cannot be built or sparsified as asked, or there is no such device.
    """

    def __init__(self, config: TrainConfig, task: Task, prepare: Callable[[nn.Module], None] | None = None) -> None:
        self.config, self.data = config, task.data
        self.device = find_device(config.device)
        model = build_sparse(task, config.sparsity)
        if prepare is not None:
            prepare(model)
        self.model = model.to(self.device).train()
        self.optimizer = make_optimizer(self.model, config)
        self.runtime = _attach(self.model, self.optimizer, config)
        self.step = 0
        self._forward = torch.compile(self.model, backend=padst, dynamic=False) if config.compile else self.model
        self._parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def train_step(self) -> torch.Tensor:
        """Take one optimizer step and return its loss, a number on the device."""
        self.model.train()
        torch.manual_seed(seed_of(self.config.seed, "step", self.step))  # dropout depends on the step alone
        set_learning_rate(self.optimizer, learning_rate(self.step, self.config))
        batch = self.data.training_batch(self.step).to(self.device)
        with autocast(self.device, self.config.dtype):
            logits = first_tensor(self._forward(batch.inputs))
        loss = cross_entropy(logits, batch.targets, label_smoothing=self.config.label_smoothing)
        loss.backward()
        if self.config.clip is not None:
            nn.utils.clip_grad_norm_(self._parameters, self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return loss.detach()

    def validate(self) -> Scores:
        """Scores of the model as it is now."""
        self.model.eval()
        return evaluate(self._forward, self.data, self.device, self.config.dtype)

    def metrics(self) -> dict[str, float]:
        """The learning rate of the last step, and what the runtime says about topology and permutations."""
        rate = learning_rate(self.step - 1, self.config)
        if self.runtime is None:
            return {"lr": rate}
        found = self.runtime.metrics()
        return {"lr": rate, **{name: found[name] for name in _RUNTIME_METRICS}}

    def times(self) -> dict[str, float]:
        """Seconds that the runtime took in this process."""
        if self.runtime is None:
            return {}
        found = self.runtime.metrics()
        return {name: found[name] for name in _RUNTIME_TIMES}

    def state_dict(self) -> dict[str, Any]:
        """All that a run needs to go on, beside its configuration."""
        return {
            "step": self.step,
            "data": self.data.describe(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "runtime": None if self.runtime is None else self.runtime.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`.

        Raises:
            RunFolderError: the data is not what it was.
        """
        if state["data"] != self.data.describe():
            raise RunFolderError(f"{self.config.data} has changed since this run began; restore it, or give another folder")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.runtime is not None:
            self.runtime.load_state_dict(state["runtime"])
        self.step = state["step"]

    def finish(self) -> nn.Module:
        """End the training: what was soft becomes hard. The model in evaluation mode."""
        if self.runtime is not None:
            finalize(self.model)
        return self.model.eval()


def build_sparse(task: Task, spec: SparsitySpec | None) -> nn.Module:
    """The model of a task with the random weights of its seed, sparsified on the CPU.

    Raises:
        PadstError: the model cannot be built, or cannot be sparsified as asked.
    """
    model = task.build()
    if spec is None:
        return model
    example = (example_of(task.data, torch.device("cpu")),) if spec.permutation_group == "foldable" else ()
    return sparsify(model, spec, *example)


def density(model: nn.Module) -> float:
    """Active weights of the sparse layers as a fraction of what dense ones had; 1 without sparse layers."""
    layers = [layer for _, layer in sparse_layers(model)]
    return sum(layer.active for layer in layers) / sum(layer.config.shape.numel for layer in layers) if layers else 1.0


def find_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        MissingDeviceError: this machine has none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise MissingDeviceError("device 'cuda': PyTorch finds no GPU here; `padst doctor` says more")
    return torch.device(name)


def _attach(model: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig) -> Runtime | None:
    return None if config.dst is None else attach(model, optimizer, config.dst)
