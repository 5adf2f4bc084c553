"""DynaDiag's choice of diagonals (Tyagi et al. 2025): a soft top-K over all of them that becomes hard as it cools.

All diagonals are stored, and diagonal j counts with the weight `min(1, K softmax(a / T)_j)`; a learns, T falls along a cosine.
At the end the K largest stay, with their weights multiplied in, and the others are pruned.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from padst_compile.structures import Diagonal
from padst_compile.training.permutations.adam import Adam
from padst_compile.training.pruning import stored_mask
from padst_compile.training.sharding import shard_like, whole
from padst_compile.training.trained_layer import TrainedLayer
from padst_compile.training.world import World

_HOT, _COLD = 5.0, 0.05  # temperatures of its example
_LEARNING_RATE = 0.01
_LEAST_GATE = 1e-6


class SoftTopK:
    """The gates of one layer's diagonals, in place on the layer (`PermutedSparseLinear.gate`).

    Args:
        trained: a layer with all its diagonals stored.
        keep: K, diagonals that stay (or residue classes of them).
        end: the optimizer step at which the choice is final.
    """

    def __init__(self, trained: TrainedLayer, keep: int, end: int) -> None:
        structure = trained.structure
        assert isinstance(structure, Diagonal)
        self.trained, self.keep, self.end = trained, keep, end
        self._classes = structure.classes(trained.shape)
        values = trained.layer.values
        device = trained.layer.topology[0].device
        self._adam = Adam(torch.zeros(self._classes, device=device))
        self.final = False
        self._gate = torch.ones(values.shape[0], 1, device=device, dtype=values.dtype)
        for layer in trained.layers:
            layer.gate = self._gate
        self._open(0)

    def after_step(self, step: int, world: World) -> None:
        """Learn from the gradient that the values had in this step, then cool."""
        if self.final:
            return
        self._follow()
        gradient = self._gate_gradient()
        if gradient is not None and not world.any(not bool(gradient.isfinite().all()), gradient.device):
            alpha = self._adam.parameter.clone().requires_grad_()
            with torch.enable_grad():
                (through,) = torch.autograd.grad(self._gates(alpha, step), alpha, gradient)
            self._adam.step(through, _LEARNING_RATE)
        if step >= self.end:
            self._settle(world)
        else:
            self._open(step)

    def finish(self, world: World) -> None:
        """Make the choice final and take the gates off the layer."""
        self._follow()
        if not self.final:
            self._settle(world)
        for layer in self.trained.layers:
            layer.gate = None

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return {**self._adam.state_dict(), "gate": self._gate, "final": self.final}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self._follow()
        own = {name: value for name, value in state.items() if name not in ("gate", "final")}
        self._adam.load_state_dict(own, self.trained.name)
        self._gate.copy_(state["gate"])
        self.final = state["final"]

    def _follow(self) -> None:
        """Use the gate that the layer has, which is another tensor once the model was moved to another dtype or device."""
        gate = self.trained.layer.gate
        if gate is not None and gate is not self._gate:
            self._gate = gate
            self._adam.to(gate.device)
            for layer in self.trained.layers:
                layer.gate = gate

    def _gates(self, alpha: torch.Tensor, step: int) -> torch.Tensor:
        done = min(1.0, step / max(1, self.end))
        temperature = _COLD + (_HOT - _COLD) / 2 * (1 + math.cos(math.pi * done))
        return (self.keep * torch.softmax(alpha / temperature, 0)).clamp(max=1.0)

    def _gate_gradient(self) -> torch.Tensor | None:
        """The gradient by each gate, float32 `[classes]`: with `W = gate * V` it is `<V, V.grad> / gate`."""
        values = self.trained.layer.values
        if values.grad is None:
            return None
        along = (whole(values) * whole(values.grad)).float().sum(1) / self._gate[:, 0].float().clamp_min(_LEAST_GATE)
        return along.reshape(-1, self._classes).sum(0)

    def _open(self, step: int) -> None:
        gates = self._gates(self._adam.parameter, step)
        self._gate.copy_(gates.repeat(self._gate.shape[0] // self._classes)[:, None])

    def _settle(self, world: World) -> None:
        """Multiply the gates in, prune all but the K largest, and leave all gates at 1."""
        trained = self.trained
        order = torch.sort(self._adam.parameter, descending=True, stable=True).indices
        alive = torch.zeros(1, self._classes, dtype=torch.bool, device=order.device)
        alive[0, order[: self.keep]] = True
        with torch.no_grad():
            trained.layer.values.mul_(shard_like(self._gate.expand(trained.layer.values.shape), trained.layer.values))
        self._gate.fill_(1.0)
        trained.alive = world.agree(alive)
        trained.mask = stored_mask(trained)
        trained.hold_at_zero()
        self.final = True
