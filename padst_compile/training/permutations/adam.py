"""Adam for one tensor, with its state in the open: plain tensors that exist from the start, so that checkpoints hold them.

The arithmetic is torch's functional Adam. The tensors that permutations are learned with get an optimizer of their own: another
learning rate, no weight decay, and none of the hooks of the user's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.optim.adam import adam

from padst_compile.errors import ResumeError

_BETAS = (0.9, 0.999)
_EPSILON = 1e-8


class Adam:
    """Adam's moments for one tensor.

    Args:
        parameter: float32; changed in place by `step`.

    Attributes:
        steps: how many there were, float32 scalar on the CPU.
    """

    def __init__(self, parameter: torch.Tensor) -> None:
        self.parameter = parameter
        self.mean = torch.zeros_like(parameter)
        self.square = torch.zeros_like(parameter)
        self.steps = torch.zeros((), dtype=torch.float32, device="cpu")

    def step(self, gradient: torch.Tensor, learning_rate: float) -> None:
        """One step along `-gradient`, in the parameter's shape and dtype."""
        with torch.no_grad():
            adam(
                [self.parameter],
                [gradient],
                [self.mean],
                [self.square],
                [],
                [self.steps],
                foreach=False,
                amsgrad=False,
                beta1=_BETAS[0],
                beta2=_BETAS[1],
                lr=learning_rate,
                weight_decay=0.0,
                eps=_EPSILON,
                maximize=False,
            )

    def to(self, device: torch.device) -> None:
        """Move parameter and moments."""
        self.parameter, self.mean, self.square = (each.to(device) for each in (self.parameter, self.mean, self.square))

    def state_dict(self) -> dict[str, Any]:
        """Parameter, moments and number of steps; the tensors themselves, as from `nn.Module.state_dict`."""
        return {"parameter": self.parameter, "mean": self.mean, "square": self.square, "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any], owner: str) -> None:
        """Copy a state into the tensors that are there.

        Raises:
            ResumeError: it is of something else; nothing was changed.
        """
        own = self.state_dict()
        if state.keys() != own.keys():
            raise ResumeError(f"{owner}: a state holds {', '.join(own)}; this one {', '.join(state) or 'nothing'}")
        for name, tensor in own.items():
            if tensor.shape != state[name].shape:
                raise ResumeError(
                    f"{owner}: {name} is {list(state[name].shape)} in the state and {list(tensor.shape)} here; "
                    "resume with the model and configuration that it was saved from"
                )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])
