"""Notices sparse layers that come too late: whose weights an optimizer gets after `attach`."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import nn

from padst_compile.conversion import sparse_layers
from padst_compile.errors import AttachError
from padst_compile.training.trained_layer import TrainedLayer


class Newcomers:
    """See the module; looks at the model only when the number of an optimizer's parameters has changed.

    Args:
        model: whose layers are trained; not kept alive.
        optimizers: of the training.
        layers: that it began with.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], layers: Sequence[TrainedLayer]) -> None:
        self._model = weakref.ref(model)
        self._members = {id(layer) for trained in layers for layer in trained.layers}
        self._sizes = [_size(optimizer) for optimizer in optimizers]

    def check(self, number: int, optimizer: torch.optim.Optimizer) -> None:
        """See whether the optimizer of this number got weights of a sparse layer; other parameters are its own affair.

        Raises:
            AttachError: it did.
        """
        size, model = _size(optimizer), self._model()
        if size == self._sizes[number] or model is None:
            return
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for name, layer in sparse_layers(model):
            if id(layer) not in self._members and id(layer.values) in held and layer.values.requires_grad:
                raise AttachError(
                    f"the optimizer got the weights of layer {name!r} after padst.attach, so nobody would train its topology; "
                    "call padst.finalize(model) and attach again, or freeze its values to keep them as they are"
                )
        self._sizes[number] = size


def _size(optimizer: torch.optim.Optimizer) -> int:
    return sum(len(group["params"]) for group in optimizer.param_groups)
