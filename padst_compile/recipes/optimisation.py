"""AdamW with the parameter groups and the learning-rate schedule of transformer training."""

from __future__ import annotations

import math

import torch
from torch import nn

from padst_compile.conversion import sparse_layers
from padst_compile.recipes.config import TrainConfig

_BETA1 = 0.9


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over all parameters: weights of layers decay, biases, norms and other vectors do not."""
    sparse = {id(layer.values) for _, layer in sparse_layers(model)}  # some structures keep their weights in a vector
    decaying: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (decaying if parameter.ndim > 1 or id(parameter) in sparse else others).append(parameter)
    groups = [{"params": decaying, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=config.lr, betas=(_BETA1, config.beta2))


def learning_rate(step: int, config: TrainConfig) -> float:
    """Of a step, counted from 0: a linear rise to `lr`, then a cosine that is at `final_lr * lr` after the last step."""
    warmup = round(config.warmup * config.steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    done = (step - warmup) / (config.steps - warmup)
    return config.lr * (config.final_lr + (1 - config.final_lr) * (1 + math.cos(math.pi * done)) / 2)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give all parameters one learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
