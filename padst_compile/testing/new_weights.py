"""Checks that programs notice new weights."""

from __future__ import annotations

import torch
from torch import nn

from padst_compile.backend import padst as backend


def assert_new_weights_are_followed(model: nn.Module, x: torch.Tensor) -> None:
    """A compiled model computes with weights that were changed in place, whatever it made of the old ones, once for all calls.

    Args:
        model: linear in all its parameters together, such as one layer.
        x: what it takes.
    """
    program = torch.compile(model, backend=backend, options={"kernels": "sparse"})
    with torch.no_grad():
        before = program(x)
        for parameter in model.parameters():
            parameter.mul_(2)
        torch.testing.assert_close(program(x), 2 * before, rtol=0, atol=0)
