"""From a description to a module with numbers, example inputs and a specification."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping
from typing import TypeAlias, cast

import torch
from torch import nn

from padst_compile import permutation
from padst_compile.conversion import sparse_layers, sparsify
from padst_compile.spec import SparsitySpec
from padst_compile.structures import parse
from padst_compile.testing.blocks import Builder, out_features
from padst_compile.testing.grammar import Layer, Model

_VOCABULARY = 11
_BATCH = 2
_SPARSITY = 0.5

Output: TypeAlias = "torch.Tensor | tuple[torch.Tensor, ...] | dict[str, torch.Tensor]"


@dataclasses.dataclass(frozen=True)
class GeneratedModel:
    """A dense model in float64 and evaluation mode, and how to make it sparse.

    Attributes:
        module: the dense model.
        inputs: of one call.
        spec: for every linear layer by name, what `sparsify` is to make of it.
        permutations: for some sparse layers by name, the permutation to set afterwards.
    """

    module: nn.Module
    inputs: tuple[torch.Tensor, ...]
    spec: Mapping[str, SparsitySpec | None]
    permutations: Mapping[str, torch.Tensor]

    def sparse(self) -> nn.Module:
        """A sparse copy; `module` stays as it is."""
        model = copy.deepcopy(self.module)
        if any(spec is not None for spec in self.spec.values()):
            model = sparsify(model, self.spec)
        layers = dict(sparse_layers(model))
        for name, indices in self.permutations.items():
            if name in layers:  # `sparsify` leaves a layer dense whose weight an embedding shares
                layers[name].set_permutation(indices)
        return model


def build(description: Model) -> GeneratedModel:
    """The model that a description stands for: the same one every time."""
    builder = Builder(description.tokens + description.class_token)
    module = _Whole(description, builder)
    generator = torch.Generator().manual_seed(description.seed)
    fill(module, generator)
    layers = {name: builder.layers[m] for name, m in module.named_modules() if m in builder.layers}
    return GeneratedModel(
        module.double().eval(),
        (example_input(description, description.tokens),),
        {name: _spec(layer, description.seed) for name, layer in layers.items()},
        _permutations(module, layers, description.seed),
    )


def example_input(description: Model, tokens: int) -> torch.Tensor:
    """An input for the model of a description with any number of tokens."""
    generator = torch.Generator().manual_seed(description.seed + 1)
    if description.embedding:
        return torch.randint(_VOCABULARY, (_BATCH, tokens), generator=generator)
    return torch.randn(_BATCH, tokens, description.width, generator=generator, dtype=torch.float64)


def fill(module: nn.Module, generator: torch.Generator) -> None:
    """Give every parameter numbers that differ from channel to channel, such that activations stay near one."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 2:
                parameter.copy_(noise / math.sqrt(min(parameter.shape)))
            elif name.endswith(("weight", "scale")):
                parameter.copy_(1 + noise / 4)
            else:
                parameter.copy_(noise / 2)


def table(layer: Layer, size: int, seed: int) -> torch.Tensor:
    """The permutation that a layer names, for a side of `size` features; the same for all layers that name it.

    Groups are permuted one after the other, so that the tables of two sizes agree as far as both go.
    """
    generator = torch.Generator().manual_seed(seed)
    kind, _, group = layer.order.partition(":")
    if kind == "shared":
        indices = permutation.random(size, generator)
    elif kind == "whole":
        starts = permutation.random(size // int(group), generator) * int(group)
        indices = (starts[:, None] + torch.arange(int(group))).flatten()
    else:
        orders = [permutation.random(int(group), generator) + start for start in range(0, size, int(group))]
        indices = torch.cat(orders)
    return permutation.inverse(indices) if layer.inverse else indices


def _spec(layer: Layer, seed: int) -> SparsitySpec | None:
    if layer.structure is None:
        return None
    structure = parse(layer.structure)
    return SparsitySpec(
        structure,
        _SPARSITY if structure.natural_sparsity() is None else None,
        permutation="none" if layer.order == "none" else "learned" if layer.order == "learned" else "random",
        permutation_side=layer.side,
        seed=seed,
    )


def _permutations(module: nn.Module, layers: Mapping[str, Layer], seed: int) -> dict[str, torch.Tensor]:
    return {
        name: table(layer, _features(module.get_submodule(name), layer), seed)
        for name, layer in layers.items()
        if layer.structure is not None and layer.order not in ("none", "random", "learned")
    }


def _features(module: nn.Module, layer: Layer) -> int:
    """Size of the side that a layer permutes."""
    if layer.side == "output":
        return layer.out
    return cast("torch.Tensor", module.weight).numel() // layer.out


class _Whole(nn.Module):
    def __init__(self, description: Model, builder: Builder) -> None:
        super().__init__()
        width = description.width
        self.pool, self.output = description.pool, description.output
        self.embedding = nn.Embedding(_VOCABULARY, width) if description.embedding else None
        self.class_token = nn.Parameter(torch.zeros(1, 1, width)) if description.class_token else None
        self.positions = nn.Parameter(torch.zeros(1, builder.tokens, width)) if description.positions else None
        self.steps = builder.chain(description.steps, width)
        for step in description.steps:
            width = out_features(step, width)
        self.head = None if description.head is None else builder.linear(description.head, width)
        if description.tied_head and self.embedding is not None:
            self.head = builder.linear(Layer(_VOCABULARY, bias=False), width)
            self.head.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> Output:
        features = self._pooled(self.steps(self._embedded(x)))
        result = features if self.head is None else self.head(features)
        if self.output == "tensor":
            return result
        return (result, features) if self.output == "tuple" else {"result": result, "features": features}

    def _embedded(self, x: torch.Tensor) -> torch.Tensor:
        x = x if self.embedding is None else self.embedding(x)
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1)
        return x if self.positions is None else x + self.positions[:, : x.shape[1]]

    def _pooled(self, x: torch.Tensor) -> torch.Tensor:
        if self.pool is None:
            return x
        return x[:, 0] if self.pool == "first" else x.mean(dim=1)
