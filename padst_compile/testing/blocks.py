"""The modules behind the descriptions in `padst_compile.testing.grammar`, one per step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F

from padst_compile.equivalence.registry import definition
from padst_compile.testing import grammar
from padst_compile.testing.grammar import Activation, Layer, Step

_GELU_CUBIC = 0.044715


class Block(nn.Module):
    """A module that maps activations `[batch, tokens, features]` to activations."""

    __call__: Callable[..., torch.Tensor]


def gelu_expression(x: torch.Tensor) -> torch.Tensor:
    """GELU's tanh form as transformers' `gelu_new` writes it."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + _GELU_CUBIC * torch.pow(x, 3.0))))


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU's tanh form as torch has it."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu tanh": gelu_tanh,
    "gelu expression": gelu_expression,
    "relu": F.relu,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


@torch.library.custom_op("padst_testing::opaque", mutates_args=())
def opaque(x: torch.Tensor) -> torch.Tensor:
    """`x[..., i] * (i + 1) / n`: linear, and different at every position."""
    return x * torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device) / x.shape[-1]


@opaque.register_fake
def _opaque_fake(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@definition("padst_testing::opaque")
def _opaque_definition(x: torch.Tensor) -> torch.Tensor:
    return x * torch.arange(1, x.shape[-1] + 1, device=x.device) / x.shape[-1]


opaque.register_autograd(lambda _ctx, gradient: opaque(gradient.contiguous()))


class Builder:
    """Makes modules for descriptions, and remembers which description every linear layer came from.

    Args:
        tokens: length of the sequence, for the steps whose parameters depend on it.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.layers: dict[nn.Module, Layer] = {}

    def linear(self, layer: Layer, in_features: int) -> Block:
        """A dense `nn.Linear` or `Conv1D`; `sparsify` makes it sparse later."""
        module = _conv1d(layer, in_features) if layer.conv1d else nn.Linear(in_features, layer.out, bias=layer.bias)
        self.layers[module] = layer
        return cast("Block", module)

    def step(self, step: Step, width: int) -> Block:
        """The module of one step."""
        if isinstance(step, Layer):
            return self.linear(step, width)
        return _MODULES[type(step)](step, width, self)

    def chain(self, steps: Sequence[Step], width: int) -> Block:
        """Steps one after the other."""
        modules: list[Block] = []
        for step in steps:
            modules.append(self.step(step, width))
            width = out_features(step, width)
        return cast("Block", nn.Sequential(*modules))


def out_features(step: Step, width: int) -> int:
    """How many features a step returns: only linear layers and branches change the number."""
    if isinstance(step, grammar.Branches):
        return step.out.out
    return step.out if isinstance(step, Layer) else width


def _conv1d(layer: Layer, in_features: int) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return cast("nn.Module", Conv1D(layer.out, in_features))


class _Act(Block):
    def __init__(self, step: grammar.Act, width: int, builder: Builder) -> None:
        super().__init__()
        self.function = ACTIVATIONS[step.kind]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


class _RMSNorm(Block):
    """RMSNorm as Llama writes it out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


def _norm(step: grammar.Norm, width: int, builder: Builder) -> Block:
    modules: dict[str, Callable[[], nn.Module]] = {
        "layer": lambda: nn.LayerNorm(width),
        "rms": lambda: nn.RMSNorm(width, eps=1e-5),
        "rms expression": lambda: _RMSNorm(width),
        "plain layer": lambda: nn.LayerNorm(width, elementwise_affine=False),
    }
    return cast("Block", modules[step.kind]())


class _Channels(Block):
    def __init__(self, step: grammar.Channels, width: int, builder: Builder) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width)) if step.kind != "shift" else None
        self.shift = nn.Parameter(torch.zeros(width)) if step.kind != "scale" else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x if self.scale is None else x * self.scale
        return x if self.shift is None else x + self.shift


def _dropout(step: grammar.Dropout, width: int, builder: Builder) -> Block:
    return cast("Block", nn.Dropout(0.5))


class _Opaque(Block):
    def __init__(self, step: grammar.Opaque, width: int, builder: Builder) -> None:
        super().__init__()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = opaque(x)
        return y


class _Mlp(Block):
    def __init__(self, step: grammar.Mlp, width: int, builder: Builder) -> None:
        super().__init__()
        self.function = ACTIVATIONS[step.activation]
        self.up = builder.linear(step.up, width)
        self.down = builder.linear(step.down, step.up.out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.function(self.up(x)))


class _Gated(Block):
    def __init__(self, step: grammar.Gated, width: int, builder: Builder) -> None:
        super().__init__()
        self.function, self.split = ACTIVATIONS[step.activation], step.split
        self.gate = builder.linear(step.gate, width)
        self.up = None if step.up is None else builder.linear(step.up, width)
        self.down = builder.linear(step.down, step.gate.out // (2 if step.up is None else 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = take_apart(self.gate(x), 2, self.split) if self.up is None else (self.gate(x), self.up(x))
        return self.down(self.function(gate) * up)


def take_apart(x: torch.Tensor, count: int, split: str) -> tuple[torch.Tensor, ...]:
    """The equal parts of the last axis, in the spellings that models use."""
    size = x.shape[-1] // count
    if split == "slice":
        return tuple(x[..., i * size : (i + 1) * size] for i in range(count))
    parts: tuple[torch.Tensor, ...] = x.split(size, dim=-1) if split == "split" else x.chunk(count, dim=-1)
    return parts


class _Mixer(Block):
    def __init__(self, step: grammar.Mixer, width: int, builder: Builder) -> None:
        super().__init__()
        self.mlp = _Mlp(step.mlp, builder.tokens, builder)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(x.transpose(1, 2)).transpose(1, 2)


class _Residual(Block):
    def __init__(self, step: grammar.Residual, width: int, builder: Builder) -> None:
        super().__init__()
        self.body, self.in_place = builder.chain(step.body, width), step.in_place
        norm = None if step.norm is None else _norm(step.norm, width, builder)
        self.before: Block | None = None if step.post else norm
        self.behind: Block | None = norm if step.post else None
        self.scale = nn.Parameter(torch.ones(width)) if step.layer_scale else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.body(x if self.before is None else self.before(x))
        y = y if self.scale is None else y * self.scale
        y = y.add_(x) if self.in_place else x + y
        return y if self.behind is None else self.behind(y)


class _Branches(Block):
    def __init__(self, step: grammar.Branches, width: int, builder: Builder) -> None:
        super().__init__()
        self.left, self.right = builder.chain(step.left, width), builder.chain(step.right, width)
        self.out = builder.linear(step.out, 2 * width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.cat([self.left(x), self.right(x)], dim=-1))


class _Halves(Block):
    def __init__(self, step: grammar.Halves, width: int, builder: Builder) -> None:
        super().__init__()
        self.left, self.right = builder.chain(step.left, width // 2), builder.chain(step.right, width // 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = x.chunk(2, dim=-1)
        return torch.cat([self.left(left), self.right(right)], dim=-1)


class _Siblings(Block):
    def __init__(self, step: grammar.Siblings, width: int, builder: Builder) -> None:
        super().__init__()
        self.layers = nn.ModuleList(builder.linear(layer, width) for layer in step.layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total: torch.Tensor = self.layers[0](x)
        for layer in self.layers[1:]:
            total = total + layer(x)
        return total


class _Twice(Block):
    def __init__(self, step: grammar.Twice, width: int, builder: Builder) -> None:
        super().__init__()
        self.function = ACTIVATIONS[step.activation]
        self.layer = builder.linear(step.layer, width)
        self.again = self.layer
        if step.tied:
            self.again = builder.linear(step.layer, width)
            self.again.weight = self.layer.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.again(self.function(self.layer(x)))


class _InPlace(Block):
    def __init__(self, step: grammar.InPlace, width: int, builder: Builder) -> None:
        super().__init__()
        self.layer, self.write = builder.linear(step.layer, width), step.write

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        if self.write == "add_":
            y.add_(1.0)
        elif self.write == "mul_":
            y.mul_(0.5)
        elif self.write == "relu_":
            y = F.relu(y, inplace=True)
        elif self.write == "view":
            y[..., :2].add_(1.0)
        else:
            y[:, 0] = 1.0
        return y


class _ReadThenWritten(Block):
    def __init__(self, step: grammar.ReadThenWritten, width: int, builder: Builder) -> None:
        super().__init__()
        self.first, self.second = builder.linear(step.first, width), builder.linear(step.second, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        copied, seen = y * 2.0, y.view(y.shape)
        y.add_(1.0)
        return self.second(copied) + seen


class _Unused(Block):
    def __init__(self, step: grammar.Unused, width: int, builder: Builder) -> None:
        super().__init__()
        self.layer = builder.linear(step.layer, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.layer(x)
        return x


class _Attention(Block):
    def __init__(self, step: grammar.Attention, width: int, builder: Builder) -> None:
        super().__init__()
        self.step, self.key_heads = step, step.key_heads or step.heads
        self.projections = nn.ModuleList(builder.linear(layer, width) for layer in step.projections)
        self.out = builder.linear(step.out, width)
        tokens = builder.tokens
        self.bias = nn.Parameter(torch.zeros(step.heads, tokens, tokens)) if step.position == "bias" else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self._projected(x)
        if self.step.position == "rotary":
            query, key = rotated(query), rotated(key)
        key, value = self._repeated(key), self._repeated(value)
        result = self._attend(query, key, value)
        return self.out(result.transpose(1, 2).reshape(x.shape))

    def _projected(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Query, key and value as `[batch, heads, tokens, features of a head]`."""
        batch, tokens, width = x.shape
        size = width // self.step.heads
        if len(self.projections) == 3:
            return tuple(layer(x).view(batch, tokens, -1, size).transpose(1, 2) for layer in self.projections)
        joint: torch.Tensor = self.projections[0](x)
        if self.step.split == "unbind":
            return joint.reshape(batch, tokens, 3, self.step.heads, size).permute(2, 0, 3, 1, 4).unbind(0)
        return tuple(part.view(batch, tokens, -1, size).transpose(1, 2) for part in take_apart(joint, 3, self.step.split))

    def _repeated(self, x: torch.Tensor) -> torch.Tensor:
        count = self.step.heads // self.key_heads
        if count == 1:
            return x
        if self.step.repeat == "interleave":
            return x.repeat_interleave(count, dim=1)
        batch, heads, tokens, size = x.shape
        return x[:, :, None].expand(batch, heads, count, tokens, size).reshape(batch, heads * count, tokens, size)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if not self.step.written_out:
            causal = self.step.causal and self.bias is None
            return F.scaled_dot_product_attention(query, key, value, attn_mask=self.bias, is_causal=causal)
        scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
        scores = scores if self.bias is None else scores + self.bias
        return scores.softmax(dim=-1) @ value


def rotated(x: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of `[batch, heads, tokens, features]` as Llama writes it."""
    half = x.shape[-1] // 2
    frequencies = 1.0 / (100.0 ** (torch.arange(half, device=x.device, dtype=x.dtype) / half))
    angles = torch.arange(x.shape[-2], device=x.device, dtype=x.dtype)[:, None] * frequencies
    cosine, sine = torch.cat([angles.cos()] * 2, dim=-1), torch.cat([angles.sin()] * 2, dim=-1)
    swapped = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * cosine + swapped * sine


_MODULES: dict[type, Callable[[Any, int, Builder], Block]] = {
    grammar.Act: _Act,
    grammar.Norm: _norm,
    grammar.Channels: _Channels,
    grammar.Dropout: _dropout,
    grammar.Opaque: _Opaque,
    grammar.Mlp: _Mlp,
    grammar.Gated: _Gated,
    grammar.Attention: _Attention,
    grammar.Mixer: _Mixer,
    grammar.Residual: _Residual,
    grammar.Branches: _Branches,
    grammar.Halves: _Halves,
    grammar.Siblings: _Siblings,
    grammar.Twice: _Twice,
    grammar.InPlace: _InPlace,
    grammar.ReadThenWritten: _ReadThenWritten,
    grammar.Unused: _Unused,
}
