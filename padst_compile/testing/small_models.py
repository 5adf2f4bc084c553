"""Small networks that each have one thing that permutations meet in real models, and what tests ask of their graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from padst_compile.passes.context import Context
from padst_compile.passes.graph import PERMUTE, STRUCTURED_LINEAR, argument

WIDTH, HIDDEN, HEADS = 16, 32, 4


def tables(facts: Context) -> int:
    """Index tables of structured products, and permutations that stand alone."""
    products = [node for node in facts.module.graph.nodes if node.target is STRUCTURED_LINEAR]
    sides = [argument(node, f"{side}_permutation") for node in products for side in ("input", "output")]
    alone = sum(node.target is PERMUTE for node in facts.module.graph.nodes)
    return alone + sum(side is not None for side in sides)


def x(*sizes: int) -> torch.Tensor:
    """Whole numbers in float64."""
    return torch.randint(-4, 5, sizes).double()


class MLP(nn.Module):
    """A residual block: norm, fc1, activation, fc2."""

    def __init__(self, activation: Callable[[torch.Tensor], torch.Tensor] = F.relu) -> None:
        super().__init__()
        self.norm, self.activation = nn.LayerNorm(WIDTH), activation
        self.fc1, self.fc2 = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: torch.Tensor) -> Any:
        return x + self.fc2(self.activation(self.fc1(self.norm(x))))


class Gated(nn.Module):
    """SwiGLU with two projections, a scale per channel and a third projection back."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, HIDDEN), nn.Linear(WIDTH, HIDDEN, bias=False)
        self.scale = nn.Parameter(torch.ones(HIDDEN))
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: torch.Tensor) -> Any:
        return self.down(F.silu(self.gate(x)) * self.up(x) * self.scale)


class FusedGate(nn.Module):
    """GEGLU whose gate and value come from one projection, by `chunk`."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(WIDTH, 2 * HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: torch.Tensor) -> Any:
        gate, up = self.both(x).chunk(2, dim=-1)
        return self.down(F.gelu(gate) * up)


class Attention(nn.Module):
    """Separate projections, grouped heads, optionally rotary embeddings."""

    angles: torch.Tensor

    def __init__(self, kv_heads: int = HEADS, *, rotary: bool = False) -> None:
        super().__init__()
        self.kv_heads, self.rotary = kv_heads, rotary
        size = WIDTH // HEADS
        self.q, self.k, self.v = (nn.Linear(WIDTH, heads * size) for heads in (HEADS, kv_heads, kv_heads))
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("angles", torch.randn(5, size // 2).double())

    def heads(self, x: torch.Tensor) -> Any:
        x = x.unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)
        return x[:, :, None].expand(-1, -1, HEADS // x.shape[1], -1, -1).flatten(1, 2)

    def rotate(self, x: torch.Tensor) -> Any:
        angles = torch.cat((self.angles, self.angles), -1)
        first, second = x.chunk(2, -1)
        return x * angles.cos() + torch.cat((-second, first), -1) * angles.sin()

    def forward(self, x: torch.Tensor) -> Any:
        q, k, v = self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x))
        if self.rotary:
            q, k = self.rotate(q), self.rotate(k)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(x.shape))


class FusedAttention(nn.Module):
    """One projection for queries, keys and values, divided as in timm."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> Any:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, WIDTH))


class Mixer(nn.Module):
    """One block that mixes tokens, then channels, between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.tokens1, self.tokens2 = nn.Linear(8, 12), nn.Linear(12, 8)
        self.channels1, self.channels2 = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.embed(x)
        x = x + self.tokens2(F.gelu(self.tokens1(x.transpose(1, 2)))).transpose(1, 2)
        x = x + self.channels2(F.gelu(self.channels1(x)))
        return self.head(x.mean(1))


class Stream(nn.Module):
    """Two blocks on a residual stream between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(10, WIDTH), nn.Parameter(torch.zeros(1, 5, WIDTH))
        self.start = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.blocks = nn.Sequential(MLP(), MLP())
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 6)

    def forward(self, ids: torch.Tensor) -> Any:
        x = self.tokens(ids) + self.places
        x = torch.cat((self.start.expand(len(ids), -1, -1), x), 1)
        return self.head(self.norm(self.blocks(x))[:, 0])


def ids() -> torch.Tensor:
    """Two sequences for `Stream`."""
    return torch.randint(0, 10, (2, 5))


def within_heads(seed: int = 0) -> np.ndarray[Any, Any]:
    """Another order of the channels in each head."""
    generator, size = np.random.default_rng(seed), WIDTH // HEADS
    return np.concatenate([head * size + generator.permutation(size) for head in range(HEADS)])


def whole_heads(*order: int) -> np.ndarray[Any, Any]:
    """The heads in another order."""
    size = WIDTH // HEADS
    return (np.array(order)[:, None] * size + np.arange(size)).reshape(-1)
