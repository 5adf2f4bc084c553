"""Runs a module with other tensors in the place of its parameters and buffers, and leaves it as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn


def named_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name; a tensor with several names is there under each."""
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))


@contextlib.contextmanager
def substituted(root: nn.Module, replacement: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Swap every parameter and buffer for its replacement; whatever a forward sets on a module is undone as well."""
    modules = list(root.modules())
    states = [[dict(table) for table in _tables(module)] for module in modules]
    made: dict[int, torch.Tensor] = {}
    try:
        for module in modules:
            for table in _tensors(module):
                for name, tensor in table.items():
                    if tensor is not None:
                        table[name] = made[id(tensor)] = made[id(tensor)] if id(tensor) in made else replacement(tensor)
        yield
    finally:
        for module, state in zip(modules, states, strict=True):
            for table, content in zip(_tables(module), state, strict=True):
                table.clear()
                table.update(content)


def _tensors(module: nn.Module) -> tuple[dict[str, Any], ...]:
    return vars(module)["_parameters"], vars(module)["_buffers"]


def _tables(module: nn.Module) -> tuple[dict[str, Any], ...]:
    return vars(module), vars(module)["_modules"], *_tensors(module)
