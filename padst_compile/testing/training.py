"""A small sparse model to train in tests, and its training data."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from padst_compile.conversion import sparsify
from padst_compile.layers import PermutedSparseLinear
from padst_compile.spec import SparsitySpec
from padst_compile.structures import parse

STRUCTURES = ("block:4", "block:8x4", "nm:1:4", "nm:2:4:2", "diagonal", "diagonal:4", "unstructured")
WIDTH, HIDDEN, CLASSES = 24, 48, 5


def small_model(structure: str = "block:4", *, dtype: torch.dtype = torch.float64, **spec: Any) -> nn.Sequential:
    """Two sparse layers, `0` and `2`, before a dense head, 75 % sparse where the structure leaves that free; always the same.

    Args:
        structure: short form.
        dtype: of all parameters.
        spec: other fields of the `SparsitySpec`.
    """
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        layers = (nn.Linear(WIDTH, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, WIDTH), nn.Tanh(), nn.Linear(WIDTH, CLASSES))
        model = nn.Sequential(*layers).to(dtype)
    sparsity = None if structure.startswith("nm") else 0.75
    return sparsify(model, SparsitySpec(parse(structure), spec.pop("sparsity", sparsity), ignore=("4",), **spec))


def layers_of(model: nn.Module) -> list[PermutedSparseLinear]:
    """The sparse layers of a model, in order."""
    return [module for module in model.modules() if isinstance(module, PermutedSparseLinear)]


def batch(step: int, dtype: torch.dtype = torch.float64, rows: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """The inputs `[rows, WIDTH]` and classes `[rows]` of a step."""
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(0, CLASSES, (rows,), generator=generator)


def loss_at(model: nn.Module, step: int) -> torch.Tensor:
    """The loss of a small model on the batch of a step."""
    x, classes = batch(step, next(model.parameters()).dtype)
    return F.cross_entropy(model(x), classes)


def losses(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> list[float]:
    """Trains from step `first` to before `last`, and returns the loss of each."""
    found = []
    for step in range(first, last):
        loss = loss_at(model, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found
