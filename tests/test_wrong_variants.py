"""Wrong variants of the passes and of the permutation algebra, each of which a fixed battery of checks must notice.

`VARIANTS` lists mistakes that someone could make: one place of one function reads differently. `BATTERY` is a list of small
models and checks: graphs whose function is proved to stay the same by exact arithmetic and in which a known number of index
tables must be left, programs that must notice changed tensors, brute force over all orders, and laws of the algebra.

Rules about the C++ kernels are checked on their results too, and skipped where those kernels cannot run.

A variant that survives means that the battery is too weak, or that the code which it changes has no effect.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import padst_compile as padst
from padst_compile import backend, permutation
from padst_compile.errors import InvalidPermutationError
from padst_compile.kernels import native, triton_support
from padst_compile.kernels.block import aten as block_aten
from padst_compile.kernels.block.reference import block_linear
from padst_compile.kernels.diagonal import bands as diagonal_bands
from padst_compile.kernels.diagonal import blocks as diagonal_blocks
from padst_compile.layers import PermutedSparseLinear
from padst_compile.options import Options
from padst_compile.passes import (
    absorb_bias,
    cancel_permutations,
    choose_kernels,
    compose_permutations,
    context,
    fold_bands,
    fold_diagonals,
    fold_into_norm,
    fuse_activation,
    fuse_gate,
    fuse_input_permutation,
    fuse_mlp,
    fuse_operand,
    fuse_output_permutation,
    fuse_residual,
    graph,
    hand_over_feature_major,
    hoist_constants,
    index_nodes,
    interleave_blocks,
    keep_feature_major,
    labelling,
    native_calls,
    place_permutations,
    split_gates,
    tanh_gate,
    triton_trial,
    unfold_patches,
    widen_values,
)
from padst_compile.passes.axes import axis, orders, trace
from padst_compile.passes.axes.rules import (
    attention,
    contractions,
    convolutions,
    indexing,
    norms,
    pieces,
    pointwise,
    reductions,
    reshapes,
    structured,
)
from padst_compile.passes.graph import PERMUTE, STRUCTURED_LINEAR, argument, fake
from padst_compile.passes.native_calls import epilogue, is_native_linear, layouts
from padst_compile.passes.pipeline import Pipeline
from padst_compile.passes.place_permutations import Placement, _Rewriting
from padst_compile.specialization import Program
from padst_compile.testing.blocks import gelu_expression, opaque, rotated
from padst_compile.testing.capture import Captured, capture
from padst_compile.testing.source_edits import edited

WIDTH, HIDDEN = 8, 16
GROUP = 4
BLOCK = padst.Block(2)

# --- models ---


class Net(nn.Module):
    """A model written as a function of its parts and its input."""

    def __init__(self, function: Callable[[Any, torch.Tensor], Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


def random_table(size: int, seed: int = 0) -> torch.Tensor:
    """A permutation without fixed points that is not its own inverse, where there is one."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        table = permutation.random(size, generator)
        moves_all = not bool((table == permutation.identity(size)).any())
        if moves_all and (size <= 2 or not torch.equal(table[table.long()], permutation.identity(size))):
            return table


def within(size: int, group: int = GROUP, seed: int = 0) -> torch.Tensor:
    """Each group of neighbours in an order of its own."""
    return torch.cat([start + random_table(group, seed + start) for start in range(0, size, group)])


def whole(size: int, group: int = GROUP, seed: int = 0) -> torch.Tensor:
    """Groups of neighbours change places."""
    starts = random_table(size // group, seed) * group
    return (starts[:, None] + torch.arange(group)).flatten().int()


def long_cycles() -> torch.Tensor:
    """16 features in cycles of 5, 7 and 4: only the 140th power is the identity."""
    return torch.cat([start + torch.arange(size).roll(1) for start, size in ((0, 5), (5, 7), (12, 4))]).int()


def half_identity(size: int) -> torch.Tensor:
    """Moves features of the second half alone."""
    return torch.cat([torch.arange(size // 2), size // 2 + random_table(size - size // 2, 3)]).int()


def sparse(inputs: int, outputs: int, table: torch.Tensor | None = None, side: str = "input", **options: Any) -> nn.Module:
    """A block-sparse layer with a given permutation."""
    spec = padst.SparsitySpec(
        options.pop("structure", BLOCK),
        0.5,
        permutation="none" if table is None else "random",
        permutation_side=side,  # type: ignore[arg-type]  # one of two words
        ignore=(),
    )
    (layer,) = padst.sparsify(nn.Sequential(nn.Linear(inputs, outputs, **options)), spec)
    if table is not None:
        layer.permutation.copy_(table)
    return layer


def dense(inputs: int, outputs: int, **options: Any) -> nn.Linear:
    return nn.Linear(inputs, outputs, **options)


def features(*sizes: int) -> torch.Tensor:
    return torch.randn(*(sizes or (2, 5, WIDTH)), dtype=torch.float64)


def heads(x: torch.Tensor, size: int = GROUP) -> torch.Tensor:
    """`[batch, tokens, heads * size]` -> `[batch, heads, tokens, size]`."""
    return x.unflatten(-1, (-1, size)).transpose(1, 2)


def joined(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).flatten(2)


def separate_attention(m: Any, x: torch.Tensor) -> torch.Tensor:
    q, k, v = heads(m.q(x)), heads(m.k(x)), heads(m.v(x))
    return m.down(joined(F.scaled_dot_product_attention(q, k, v)))


def grouped_attention(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Two heads of queries share one of keys and values."""

    def repeated(y: torch.Tensor) -> torch.Tensor:
        return heads(y)[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2)

    return m.down(joined(F.scaled_dot_product_attention(heads(m.q(x)), repeated(m.k(x)), repeated(m.v(x)))))


def joint_attention(m: Any, x: torch.Tensor) -> torch.Tensor:
    """One layer computes queries, keys and values; a rotary embedding fixes the channels of the first two."""
    q, k, v = m.qkv(x).unflatten(-1, (3, -1, GROUP)).permute(2, 0, 3, 1, 4).unbind(0)
    return m.down(joined(F.scaled_dot_product_attention(rotated(q), rotated(k), v)))


def attention_net(order: torch.Tensor) -> nn.Module:
    q, k, v = (dense(WIDTH, HIDDEN) for _ in range(3))
    return Net(separate_attention, q=q, k=k, v=v, down=sparse(HIDDEN, WIDTH, order))


def grouped_net(order: torch.Tensor) -> nn.Module:
    q, k, v = (dense(WIDTH, size) for size in (HIDDEN, HIDDEN // 2, HIDDEN // 2))
    return Net(grouped_attention, q=q, k=k, v=v, down=sparse(HIDDEN, WIDTH, order))


def joint_net(order: torch.Tensor) -> nn.Module:
    return Net(joint_attention, qkv=dense(WIDTH, 3 * HIDDEN), down=sparse(HIDDEN, WIDTH, order))


def between(function: Callable[[Any, torch.Tensor], torch.Tensor], order: torch.Tensor, **parts: Any) -> nn.Module:
    """A dense layer, something in between, and a sparse layer that reads its features in another order."""
    return Net(
        lambda m, x: m.down(function(m, m.up(x))), up=dense(WIDTH, HIDDEN), down=sparse(order.numel(), WIDTH, order), **parts
    )


def split_gelu(m: Any, x: torch.Tensor) -> torch.Tensor:
    first, second = m.up(x).split([4, HIDDEN - 4], dim=-1)
    return m.a(F.gelu(first)) + m.b(F.gelu(second))


def siblings(*order_seeds: int) -> nn.Module:
    layers = nn.ModuleList(sparse(HIDDEN, WIDTH, random_table(HIDDEN, seed)) for seed in order_seeds)
    return Net(
        lambda m, x: sum(layer(h) for h in [F.relu(m.up(x))] for layer in m.layers), up=dense(WIDTH, HIDDEN), layers=layers
    )


def written_later(m: Any, x: torch.Tensor) -> torch.Tensor:
    """What is permuted is written to before the permuted copy is read."""
    hidden = m.up(x)
    copied = PERMUTE(hidden, m.p)
    hidden.mul_(2)
    return m.layer(copied) + hidden


def written_copy(m: Any, x: torch.Tensor) -> torch.Tensor:
    """The permuted copy is written to, and what was permuted is read again."""
    hidden = m.up(x)
    copied = PERMUTE(hidden, m.p)
    copied.mul_(2)
    return m.down(copied) + m.other(hidden)


def two_permutations(m: Any, x: torch.Tensor) -> torch.Tensor:
    hidden = F.relu(m.up(x))
    return PERMUTE(hidden, m.p) * PERMUTE(hidden, m.q)


def positions_from_a_layer(m: Any, x: torch.Tensor) -> torch.Tensor:
    """A convolution along the outputs of a sparse layer."""
    return F.conv1d(m.layer(x).unsqueeze(1), m.kernel, padding=1)


def read_twice(m: Any, x: torch.Tensor) -> torch.Tensor:
    """A product without bias whose result two calls read."""
    product = m.layer(x)
    return (product + m.bias) * product


def normed(order: torch.Tensor) -> nn.Module:
    def function(m: Any, x: torch.Tensor) -> torch.Tensor:
        return PERMUTE(F.layer_norm(PERMUTE(x, m.p), (WIDTH,), m.weight, m.bias), m.q) * 2

    weights = {name: nn.Parameter(torch.randn(WIDTH)) for name in ("weight", "bias")}
    return Net(function, p=random_table(WIDTH), q=order, **weights)


def own_tables(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Permutations before and behind a product that has both tables already."""
    layer = m.layer
    y = STRUCTURED_LINEAR(PERMUTE(x, m.p), layer.values, list(layer.topology), layer.bias, m.a, m.b, HIDDEN, BLOCK.to_string())
    return PERMUTE(y, m.q) * 2


def own_tables_net() -> nn.Module:
    tables = {"p": random_table(WIDTH), "a": random_table(WIDTH, 1), "b": random_table(HIDDEN, 2), "q": random_table(HIDDEN, 3)}
    return Net(own_tables, layer=sparse(WIDTH, HIDDEN), **tables)


def around(layer: nn.Module, *, border: bool) -> nn.Module:
    """Permutations before and behind a sparse layer; a border keeps the orders around them fixed."""

    def function(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = x if border else m.up(x)
        y = PERMUTE(m.layer(PERMUTE(x, m.p)), m.q)
        return y * 2 if border else m.down(y)

    ends = {} if border else {"up": dense(WIDTH, WIDTH), "down": dense(HIDDEN, WIDTH)}
    return Net(function, p=random_table(WIDTH, 5), q=random_table(HIDDEN, 6), layer=layer, **ends)


ROWS = padst.NM(1, 2)
CLASSES = padst.Diagonal(16)


def chain(structure: Any) -> nn.Module:
    """Three sparse layers with an activation behind each, and what is added to the last."""

    def function(m: Any, x: torch.Tensor) -> torch.Tensor:
        return F.relu(m.down(F.gelu(m.middle(F.relu(m.up(x)))))) + x

    sizes = {"up": (WIDTH, HIDDEN), "middle": (HIDDEN, 12), "down": (12, WIDTH)}
    layers = {n: sparse(*s, random_table(s[0], k), structure=structure) for k, (n, s) in enumerate(sizes.items())}
    return Net(function, **layers)


def classes_net() -> nn.Module:
    """A product of diagonals in classes, with tables of its own on both sides."""

    def function(m: Any, x: torch.Tensor) -> torch.Tensor:
        layer = m.layer
        return STRUCTURED_LINEAR(x, layer.values, list(layer.topology), layer.bias, m.p, m.q, 96, CLASSES.to_string()) * 2

    return Net(function, layer=sparse(32, 96, structure=CLASSES), p=random_table(32), q=random_table(96, 1))


def bands_net() -> nn.Module:
    """A product of diagonals in one run that no block begins with, with tables of its own on both sides."""

    def function(m: Any, x: torch.Tensor) -> torch.Tensor:
        return STRUCTURED_LINEAR(x, m.values, [m.offsets], m.bias, m.p, m.q, 256, "diagonal") * 2

    values, bias = nn.Parameter(torch.randn(97, 256)), nn.Parameter(torch.randn(256))
    offsets = torch.arange(37, 37 + 97, dtype=torch.int32)
    return Net(function, values=values, bias=bias, offsets=offsets, p=random_table(256), q=random_table(256, 1))


# --- graphs, rewritten ---


@dataclasses.dataclass(frozen=True)
class Graph:
    """A model whose captured graph the passes rewrite.

    Args:
        build: makes the model, for float64.
        tables: index tables and permutations that must be left.
        inputs: of a call.
        kernels: policy of the pass that chooses kernels, or None to leave it out.
        inference: what the graph is for.
        dtype: of the model. In others than float64, C++ kernels run, and their results are compared too.
        forms: what each of their calls does beside the product, in order.
    """

    build: Callable[[], nn.Module]
    tables: int
    inputs: Callable[[], torch.Tensor] = features
    kernels: Any = None
    inference: bool = True
    dtype: torch.dtype = torch.float64
    forms: tuple[str, ...] = ()


GRAPHS: dict[str, Graph] = {
    "three permutations": Graph(
        lambda: Net(
            lambda m, x: PERMUTE(PERMUTE(PERMUTE(x, m.p), m.q), m.r) * 2,
            p=random_table(WIDTH), q=random_table(WIDTH, 1), r=random_table(WIDTH, 2),
        ), 1,
    ),
    "a permutation of the second half": Graph(lambda: Net(lambda m, x: PERMUTE(x + 1, m.p) * 2, p=half_identity(WIDTH)), 1),
    "an identity": Graph(lambda: Net(lambda m, x: PERMUTE(x + 1, m.p) * 2, p=permutation.identity(WIDTH)), 0),
    "a norm between permutations": Graph(lambda: normed(random_table(WIDTH, 1)), 1),
    "a norm between a permutation and its inverse": Graph(lambda: normed(permutation.inverse(random_table(WIDTH))), 0),
    "both tables and a bias": Graph(lambda: around(sparse(WIDTH, HIDDEN, random_table(WIDTH, 2)), border=True), 2),
    "a product with tables of its own": Graph(own_tables_net, 2),
    "a product with tables of its own for training": Graph(own_tables_net, 2, inference=False),
    "both tables for training": Graph(
        lambda: around(sparse(WIDTH, HIDDEN, random_table(WIDTH, 2)), border=True), 2, inference=False
    ),
    "both tables, run dense": Graph(
        lambda: around(sparse(WIDTH, HIDDEN, random_table(WIDTH, 2)), border=True), 0, kernels="dense"
    ),
    "both tables between dense layers": Graph(lambda: around(sparse(WIDTH, HIDDEN, random_table(WIDTH, 2)), border=False), 0),
    "a product that is read twice": Graph(
        lambda: Net(read_twice, layer=sparse(WIDTH, HIDDEN, bias=False), bias=nn.Parameter(torch.randn(HIDDEN))), 0
    ),
    "a bias behind a store": Graph(
        lambda: Net(lambda m, x: m.layer(x), layer=sparse(WIDTH, HIDDEN, random_table(HIDDEN), "output")), 1
    ),
    "the graph's input": Graph(lambda: Net(lambda m, x: m.layer(x), layer=sparse(WIDTH, HIDDEN, random_table(WIDTH))), 1),
    "a function of the graph's input": Graph(
        lambda: Net(lambda m, x: m.layer(F.relu(x)), layer=sparse(WIDTH, HIDDEN, random_table(WIDTH))), 1
    ),
    "a dense producer": Graph(lambda: between(lambda m, h: F.gelu(h), random_table(HIDDEN)), 0),
    "a dense producer, half of it": Graph(lambda: between(lambda m, h: F.gelu(h), half_identity(HIDDEN)), 0),
    "a dense producer in two dimensions": Graph(
        lambda: between(lambda m, h: F.gelu(h), random_table(HIDDEN)), 0, lambda: features(3, WIDTH)
    ),
    "a gate and a scale": Graph(
        lambda: between(
            lambda m, h: F.silu(h) * m.scale, random_table(HIDDEN), scale=nn.Parameter(torch.randn(HIDDEN))
        ), 0,
    ),
    "a norm of the hidden layer": Graph(
        lambda: between(lambda m, h: m.norm(h), random_table(HIDDEN), norm=nn.LayerNorm(HIDDEN)), 0
    ),
    "an output table and a dense reader": Graph(
        lambda: Net(
            lambda m, x: m.down(F.relu(m.layer(x))),
            layer=sparse(WIDTH, HIDDEN, random_table(HIDDEN), "output"), down=dense(HIDDEN, WIDTH),
        ), 0,
    ),
    "two sparse layers whose tables cancel": Graph(
        lambda: Net(
            lambda m, x: m.b(F.relu(m.a(x))),
            a=sparse(WIDTH, HIDDEN, random_table(HIDDEN), "output"),
            b=sparse(HIDDEN, WIDTH, permutation.inverse(random_table(HIDDEN))),
        ), 0,
    ),
    "two sparse layers whose tables do not cancel": Graph(
        lambda: Net(
            lambda m, x: m.b(F.relu(m.a(x))),
            a=sparse(WIDTH, HIDDEN, random_table(HIDDEN), "output"), b=sparse(HIDDEN, WIDTH, random_table(HIDDEN, 1)),
        ), 1,
    ),
    "outputs of several sparse layers": Graph(
        lambda: Net(
            lambda m, x: m.down(m.a(x) + m.b(x) + m.c(x)),
            down=dense(HIDDEN, WIDTH),
            **{name: sparse(WIDTH, HIDDEN, random_table(HIDDEN, int(name == "b")), "output") for name in "abc"},
        ), 1,
    ),
    "siblings that agree": Graph(lambda: siblings(0, 0), 0),
    "siblings that disagree": Graph(lambda: siblings(0, 1, 0), 1),
    "two halves of one layer": Graph(
        lambda: between(lambda m, h: F.gelu(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1], random_table(HIDDEN // 2)), 0
    ),
    "unequal pieces": Graph(
        lambda: Net(
            split_gelu, up=dense(WIDTH, HIDDEN), a=sparse(4, WIDTH, random_table(4, 2)), b=sparse(12, WIDTH, random_table(12))
        ), 0,
    ),
    "a slice from the middle": Graph(lambda: between(lambda m, h: F.relu(h)[..., 3:11], random_table(8)), 0),
    "slices that begin at different places": Graph(
        lambda: between(
            lambda m, h: F.relu(h)[..., 3:11] + m.other(h[..., 3:5]),
            torch.cat([random_table(2), 2 + random_table(6)]), other=dense(2, 8),
        ), 0,
    ),
    "joined tensors": Graph(
        lambda: Net(
            lambda m, x: m.down(torch.cat([m.a(x), m.b(x)], -1)),
            a=dense(WIDTH, GROUP), b=dense(WIDTH, GROUP), down=sparse(2 * GROUP, WIDTH, within(2 * GROUP)),
        ), 0,
    ),
    "joined tensors, mixed": Graph(
        lambda: Net(
            lambda m, x: m.down(torch.cat([m.a(x), m.b(x)], -1)),
            a=dense(WIDTH, GROUP), b=dense(WIDTH, GROUP), down=sparse(2 * GROUP, WIDTH, random_table(2 * GROUP)),
        ), 1,
    ),
    "channels within heads": Graph(lambda: attention_net(within(HIDDEN)), 0),
    "whole heads": Graph(lambda: attention_net(whole(HIDDEN)), 0),
    "heads and their channels": Graph(lambda: attention_net(whole(HIDDEN)[within(HIDDEN).long()]), 0),
    "channels across heads": Graph(lambda: attention_net(random_table(HIDDEN)), 1),
    "channels of heads from one layer": Graph(lambda: joint_net(within(HIDDEN)), 0),
    "heads from one layer": Graph(lambda: joint_net(whole(HIDDEN)), 0),
    "heads within groups": Graph(
        lambda: grouped_net(whole(HIDDEN, 2 * GROUP)[torch.cat([torch.arange(8), 8 + whole(8, 4).long()])]), 0
    ),
    "heads across groups": Graph(lambda: grouped_net(whole(HIDDEN, GROUP, 4)), 1),
    "softmax over groups": Graph(
        lambda: between(lambda m, h: h.unflatten(-1, (GROUP, GROUP)).softmax(-2).flatten(-2), within(HIDDEN)), 1
    ),
    "a norm over groups": Graph(
        lambda: between(
            lambda m, h: F.layer_norm(h.unflatten(-1, (GROUP, GROUP)).mT, (GROUP,)).mT.flatten(-2), within(HIDDEN)
        ), 1,
    ),
    "a scale for each channel of each group": Graph(
        lambda: between(
            lambda m, h: (h.unflatten(-1, (GROUP, GROUP)) * m.scale).flatten(-2), within(HIDDEN),
            scale=nn.Parameter(torch.randn(GROUP, GROUP)),
        ), 1,
    ),
    "groups summed": Graph(lambda: between(lambda m, h: h.unflatten(-1, (4, 4)).sum(-2), random_table(4, 2)), 0),
    "groups divided unevenly": Graph(lambda: between(lambda m, h: h.unflatten(-1, (2, 8)).sum(-2), random_table(8)), 0),
    "groups, then their halves": Graph(
        lambda: between(
            lambda m, h: torch.cat(F.relu(h.unflatten(-1, (4, 4))).flatten(-2).chunk(2, -1)[::-1], -1), within(HIDDEN)
        ), 0,
    ),
    "groups, across their halves": Graph(
        lambda: between(
            lambda m, h: torch.cat(F.relu(h.unflatten(-1, (4, 4))).flatten(-2).chunk(2, -1)[::-1], -1), whole(HIDDEN)
        ), 1,
    ),
    "groups that the graph returns": Graph(
        lambda: Net(
            lambda m, x: F.relu(m.layer(x).unflatten(-1, (4, 4))).flatten(-2),
            layer=sparse(WIDTH, HIDDEN, within(HIDDEN), "output"),
        ), 1,
    ),
    "features repeated": Graph(
        lambda: between(lambda m, h: h[..., None].expand(-1, -1, -1, 2).flatten(2), whole(2 * HIDDEN, 2)), 0
    ),
    "copies in another order": Graph(
        lambda: between(lambda m, h: h[..., None].expand(-1, -1, -1, 2).flatten(2), within(2 * HIDDEN, 2)), 0
    ),
    "copies one after the other": Graph(lambda: between(lambda m, h: h.repeat(1, 1, 2), whole(2 * HIDDEN, HIDDEN, 0)), 0),
    "a copy in another order": Graph(
        lambda: between(lambda m, h: h.repeat(1, 1, 2), torch.cat([random_table(HIDDEN), HIDDEN + random_table(HIDDEN)])), 0
    ),
    "copies in orders of their own": Graph(
        lambda: between(
            lambda m, h: torch.cat([m.other(h), h.repeat(1, 1, 2)], -1),
            torch.cat([torch.arange(4), 4 + random_table(HIDDEN), 4 + HIDDEN + random_table(HIDDEN, 1)]),
            other=sparse(HIDDEN, 4, random_table(HIDDEN, 2)),
        ), 1,
    ),
    "a running sum": Graph(lambda: between(lambda m, h: h.cumsum(-1), random_table(HIDDEN)), 1),
    "channels of a convolution": Graph(
        lambda: between(
            lambda m, h: F.conv1d(h.mT, m.kernel, m.bias, padding=1).mT, random_table(HIDDEN),
            kernel=nn.Parameter(torch.randn(HIDDEN, HIDDEN, 3)), bias=nn.Parameter(torch.randn(HIDDEN)),
        ), 0,
    ),
    "channels into a convolution": Graph(
        lambda: Net(
            lambda m, x: F.conv1d(m.layer(x).mT, m.kernel, padding=1),
            layer=sparse(WIDTH, HIDDEN, random_table(HIDDEN), "output"), kernel=nn.Parameter(torch.randn(HIDDEN, HIDDEN, 3)),
        ), 0,
    ),
    "positions of a convolution": Graph(
        lambda: Net(
            positions_from_a_layer, layer=sparse(WIDTH, HIDDEN, random_table(HIDDEN), "output"),
            kernel=nn.Parameter(torch.randn(1, 1, 3)),
        ), 1, lambda: features(2, WIDTH),
    ),
    "features of an embedding": Graph(
        lambda: Net(
            lambda m, x: m.down(F.embedding(m.numbers, m.table)) + x,
            numbers=torch.tensor([[0, 2, 1], [3, 3, 0]]), table=nn.Parameter(torch.randn(4, HIDDEN)),
            down=sparse(HIDDEN, WIDTH, random_table(HIDDEN)),
        ), 0, lambda: features(2, 3, WIDTH),
    ),
    "entries of an embedding": Graph(
        lambda: Net(
            lambda m, x: F.embedding(m.numbers, m.layer(x).t()),
            numbers=torch.tensor([[0, 12, 1], [3, 9, 0]]), layer=sparse(WIDTH, HIDDEN, random_table(HIDDEN), "output"),
        ), 1, lambda: features(3, WIDTH),
    ),
    "features at some places": Graph(
        lambda: between(lambda m, h: h[..., m.numbers], random_table(GROUP, 2), numbers=torch.tensor([3, 0, 9, 5])), 1
    ),
    "outputs at some places": Graph(
        lambda: Net(
            lambda m, x: m.layer(x)[..., m.numbers], numbers=torch.tensor([3, 0, 9, 5]),
            layer=sparse(WIDTH, HIDDEN, random_table(HIDDEN), "output"),
        ), 1,
    ),
    "an unknown operator": Graph(lambda: between(lambda m, h: opaque(h), random_table(HIDDEN)), 1),
    "tokens of a mixer": Graph(
        lambda: Net(
            lambda m, x: m.out(m.down(F.gelu(m.up(x.mT))).mT),
            up=dense(5, 12), down=sparse(12, 6, random_table(12)), out=dense(WIDTH, WIDTH),
        ), 0,
    ),
    "a permutation between dense layers": Graph(
        lambda: Net(
            lambda m, x: m.b(F.relu(PERMUTE(m.a(x), m.p) + 1)),
            a=dense(WIDTH, HIDDEN), b=dense(HIDDEN, WIDTH), p=random_table(HIDDEN),
        ), 0,
    ),
    "a permutation that a demand lies beyond": Graph(
        lambda: Net(
            lambda m, x: m.b(F.relu(PERMUTE(F.relu(m.a(x)), m.p))),
            a=dense(WIDTH, HIDDEN), b=sparse(HIDDEN, WIDTH, random_table(HIDDEN, 1)), p=random_table(HIDDEN),
        ), 0,
    ),
    "a permutation that a demand lies before": Graph(
        lambda: Net(
            lambda m, x: m.down(F.relu(PERMUTE(F.relu(m.layer(x)), m.p))), down=dense(HIDDEN, WIDTH),
            layer=sparse(WIDTH, HIDDEN, random_table(HIDDEN, 1), "output"), p=long_cycles(),
        ), 0,
    ),
    "two permutations of one tensor": Graph(
        lambda: Net(
            lambda m, x: PERMUTE(F.relu(m.up(x)), m.p) * PERMUTE(F.relu(m.up(x)), m.q),
            up=dense(WIDTH, HIDDEN), p=random_table(HIDDEN), q=random_table(HIDDEN, 1),
        ), 0,
    ),
    "two permutations of one tensor that must agree": Graph(
        lambda: Net(two_permutations, up=dense(WIDTH, HIDDEN), p=random_table(HIDDEN), q=random_table(HIDDEN, 1)), 1
    ),
    "a permuted tensor that is written to": Graph(
        lambda: Net(written_later, up=dense(WIDTH, HIDDEN), layer=sparse(HIDDEN, HIDDEN), p=random_table(HIDDEN)), 1
    ),
    "a permuted copy that is written to": Graph(
        lambda: Net(
            written_copy, up=dense(WIDTH, HIDDEN), down=dense(HIDDEN, WIDTH), p=random_table(HIDDEN),
            other=sparse(HIDDEN, WIDTH, random_table(HIDDEN)),
        ), 1,
    ),
    "a copy that is written to": Graph(
        lambda: Net(
            written_copy, up=dense(WIDTH, HIDDEN), down=dense(HIDDEN, WIDTH), other=dense(HIDDEN, WIDTH),
            p=permutation.identity(HIDDEN),
        ), 1,
    ),
    "patches": Graph(
        lambda: Net(
            lambda m, x: F.conv2d(x, m.kernel, m.bias, stride=2).flatten(2).mT,
            kernel=nn.Parameter(torch.randn(WIDTH, 3, 2, 2)), bias=nn.Parameter(torch.randn(WIDTH)),
        ), 0, lambda: features(2, 3, 4, 6),
    ),
    "the tanh form of GELU": Graph(lambda: Net(lambda m, x: gelu_expression(x)), 0),
    "half a gate": Graph(lambda: Net(lambda m, x: 0.5 * x * (1.0 + torch.tanh(x))), 0),
    "a gate of another height": Graph(lambda: Net(lambda m, x: 0.25 * x * (1.0 + torch.tanh(x))), 0),
}  # fmt: skip


def rows_graph(meet: Callable[[Any, torch.Tensor], torch.Tensor], *expected: str, tables: int = 0) -> Graph:
    """Layers of short rows, `up` and two that read `meet(m, m.up(x))` if they are called there."""

    def build() -> nn.Module:
        up, middle, other = (sparse(size, HIDDEN, structure=ROWS) for size in (WIDTH, HIDDEN, HIDDEN))
        return Net(lambda m, x: meet(m, m.up(x)), up=up, middle=middle, other=other, one=torch.randn(2, 5, HIDDEN))

    return Graph(build, tables, kernels="sparse", dtype=torch.float32, forms=expected)


def halves_graph(
    structure: Any, *expected: str, tables: int = 0, order: torch.Tensor | None = None, read_again: bool = False
) -> Graph:
    """A layer whose outputs are the two factors of a gate."""

    def function(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.up(x)
        a, b = y.chunk(2, -1)
        return F.gelu(a) * b + (y[..., :8] if read_again else 0)

    def build() -> nn.Module:
        side = "input" if order is None else "output"
        return Net(function, up=sparse(WIDTH, HIDDEN, order, side, structure=structure))

    inputs = functools.partial(features, 2, 32, WIDTH)
    return Graph(build, tables, inputs, kernels="sparse", dtype=torch.float32, forms=expected)


def pairs_graph(structure: Any, form: str, dtype: torch.dtype = torch.bfloat16) -> Graph:
    """A block layer whose sizes no block divides."""
    return Graph(
        lambda: Net(lambda m, x: m.layer(x) * 2, layer=sparse(33, 20, random_table(33), structure=structure)), 1,
        lambda: features(2, 3, 33), kernels="sparse", dtype=dtype, forms=(form,),
    )  # fmt: skip


# Where there are C++ kernels, kernels for blocks, and such that read pairs of 16-bit numbers.
ROW_GRAPHS: dict[str, Graph] = {
    **{
        f"a chain of {name}": Graph(
            functools.partial(chain, structure),
            3,
            kernels="sparse",
            dtype=torch.float32,
            forms=(
                "activation, feature-major output",
                "activation, feature-major input, feature-major output",
                "activation, residual, feature-major input",
            ),
        )
        for name, structure in {"short rows": ROWS, "diagonals": padst.Diagonal()}.items()
    },
    "short rows that a product and a function read": rows_graph(lambda m, h: m.middle(h) - h, "", ""),
    "short rows that two products read": rows_graph(
        lambda m, h: m.middle(h) * m.other(h), "feature-major output", "feature-major input", "gate, feature-major input"
    ),
    "short rows gated by short rows": rows_graph(
        lambda m, h: m.other(h * F.silu(m.middle(m.one))),
        "feature-major output",
        "activation, gate, feature-major output",
        "feature-major input",
    ),
    "short rows gated by a tensor": rows_graph(lambda m, h: m.middle(h * m.one), "gate", ""),
    "short rows gated by what they read": rows_graph(lambda m, h: m.other(m.middle(h) * h), "", "gate", ""),
    "a product of a sum": rows_graph(lambda m, h: (h + m.one) * m.one, "residual"),
    "a product of three": rows_graph(lambda m, h: h * m.one * m.one, "gate"),
    "an activation of a product": rows_graph(lambda m, h: F.relu(h * m.one), "gate"),
    "short rows that are added to what reads them": rows_graph(lambda m, h: m.middle(h) + h, "", "residual"),
    "short rows behind a sum": rows_graph(lambda m, h: m.middle(h + m.one), "residual", ""),
    "an activation of what another reads": rows_graph(lambda m, h: F.relu(h) * h, ""),
    "an activation of an activation": rows_graph(lambda m, h: F.silu(F.relu(h)), "activation"),
    "an activation of a sum": rows_graph(lambda m, h: F.relu(h + m.one), "residual"),
    "both forms of GELU": rows_graph(
        lambda m, h: F.gelu(m.middle(F.gelu(h)), approximate="tanh"),
        "activation, feature-major output",
        "activation, feature-major input",
    ),
    "a sum of three": rows_graph(lambda m, h: h + m.one + m.one, "residual"),
    "a sum with a vector": rows_graph(lambda m, h: h + m.one[0, 0], ""),
    "a product doubled": rows_graph(lambda m, h: h + h, ""),
    "a sum of what another reads": rows_graph(lambda m, h: (h + m.one) * h, ""),
    "two factors from one layer": halves_graph(ROWS, "activation", "gate"),
    "two factors from one layer, reordered": halves_graph(ROWS, "activation", "gate", tables=2, order=within(HIDDEN)),
    "two factors from one layer, mixed": halves_graph(ROWS, "", tables=1, order=random_table(HIDDEN)),
    "two factors from one layer that is read again": halves_graph(ROWS, "", read_again=True),
    "two factors whose rows share a choice": halves_graph(padst.NM(1, 2, HIDDEN), ""),
}


def block_layers(meet: Callable[[Any, torch.Tensor], torch.Tensor], *expected: str) -> Graph:
    """Block layers `up` and `middle`, the second called by `meet(m, m.up(x))`."""

    def build() -> nn.Module:
        up, middle = (sparse(size, HIDDEN, structure=padst.Block(2)) for size in (WIDTH, HIDDEN))
        return Net(lambda m, x: meet(m, m.up(x)), up=up, middle=middle, one=torch.randn(2, 5, HIDDEN))

    return Graph(build, 0, kernels="sparse", dtype=torch.float32, forms=expected)


BLOCK_GRAPHS: dict[str, Graph] = {
    "two block layers": block_layers(lambda m, h: m.middle(F.gelu(h)) + m.one, "mlp"),
    "two block layers whose hidden features are added": block_layers(lambda m, h: m.middle(h) + h, "", "residual"),
    "two block layers and an activation behind": block_layers(lambda m, h: F.relu(m.middle(h)), "", "activation"),
    "two block layers and a sum between": block_layers(lambda m, h: m.middle(h + m.one), "residual", ""),
    "two block layers and another reader": block_layers(lambda m, h: m.middle(h) / (2 + h.abs()), "", ""),
    "two factors from one block layer": halves_graph(padst.Block(2), "activation", "gate"),
    "diagonals in classes": Graph(classes_net, 2, lambda: features(2, 3, 32), dtype=torch.float32),
    "diagonals in a run": Graph(bands_net, 2, lambda: features(512, 256), dtype=torch.float32),
}
PAIR_GRAPHS: dict[str, Graph] = {
    "16-bit blocks": pairs_graph(padst.Block((8, 6)), "interleaved"),
    "16-bit blocks with odd numbers of inputs": pairs_graph(padst.Block((8, 5)), ""),
    "blocks of float32": pairs_graph(padst.Block((8, 6)), "", torch.float32),
    "16-bit diagonals": pairs_graph(padst.Diagonal(), "widened"),
}
if native.load():
    GRAPHS |= ROW_GRAPHS
    GRAPHS |= BLOCK_GRAPHS if native.supports("block", torch.float32) else {}
    GRAPHS |= PAIR_GRAPHS if native.interleaves(torch.bfloat16) else {}


@functools.cache
def captured(name: str) -> tuple[nn.Module, Captured]:
    """The model of a graph, and the graph; neither depends on any pass."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = GRAPHS[name].build().to(GRAPHS[name].dtype).eval()
    with torch.set_grad_enabled(not GRAPHS[name].inference):
        return model, capture(model, GRAPHS[name].inputs().to(GRAPHS[name].dtype))


def tables(module: fx.GraphModule) -> int:
    """Index tables of structured products, and permutations that stand alone."""
    products = [node for node in module.graph.nodes if node.target is STRUCTURED_LINEAR or is_native_linear(node)]
    sides = [argument(node, f"{side}_permutation") for node in products for side in ("input", "output")]
    return sum(side is not None for side in sides) + sum(node.target is PERMUTE for node in module.graph.nodes)


def forms(facts: context.Context) -> tuple[str, ...]:
    """What the calls of C++ kernels do beside their products."""
    found = []
    for node in facts.module.graph.nodes:
        if str(node.target) == "padst_native.block_mlp.default":
            found.append("mlp")
        if not is_native_linear(node):
            continue
        values = argument(node, "values")
        known = facts.value(values) if facts.is_static(values) else None
        arranged: tuple[str, ...] = ("interleaved",) if known is not None and known.dim() == 4 else ()
        arranged += ("widened",) if known is not None and known.dtype != fake(node).dtype else ()
        found.append(", ".join(epilogue(node) + layouts(node) + arranged))
    return tuple(found)


def graph_check(name: str) -> str | None:
    wanted, (_, before) = GRAPHS[name], captured(name)
    facts = before.context(inference=wanted.inference)
    Pipeline(kernels=wanted.kernels).run(facts)
    with torch.no_grad():
        verdict = padst.verify(before.graph, facts.module, *before.inputs, seeds=(0,))
    if not verdict:
        return "computes something else"
    left = tables(facts.module)
    if left != wanted.tables:
        return f"leaves {left} tables instead of {wanted.tables}"
    if wanted.dtype == torch.float64:
        return None
    if forms(facts) != wanted.forms:
        return f"makes calls that do {forms(facts)}"
    with torch.no_grad():
        right = _agree(facts.module(*before.inputs), before.graph(*before.inputs))
    return None if right else "computes something else with real kernels"


# --- programs, after a change ---

CHANGES: dict[str, tuple[str, Callable[[Any], torch.Tensor]]] = {
    "another order after compilation": ("a dense producer", lambda m: m.down.permutation),
    "another order for dense weights": ("both tables, run dense", lambda m: m.layer.permutation),
    "an identity that becomes another order": ("an identity", lambda m: m.p),
    "an inverse that becomes another order": ("a norm between a permutation and its inverse", lambda m: m.q),
    "another order between dense layers": ("a permutation between dense layers", lambda m: m.p),
    "another dense weight": ("a dense producer", lambda m: m.up.weight),
    "another dense bias": ("a dense producer", lambda m: m.up.bias),
    "other values of a layer that runs dense": ("both tables, run dense", lambda m: m.layer.values),
    "another norm weight": ("a norm between permutations", lambda m: m.weight),
    "other values of diagonals in classes": ("diagonals in classes", lambda m: m.layer.values),
    "other values of diagonals in a run": ("diagonals in a run", lambda m: m.values),
    "other offsets of diagonals in a run": ("diagonals in a run", lambda m: m.offsets),
    "another order of two factors": ("two factors from one layer, reordered", lambda m: m.up.permutation),
    "other values of 16-bit blocks": ("16-bit blocks", lambda m: m.layer.values),
}
CHANGES = {name: change for name, change in CHANGES.items() if change[0] in GRAPHS}


def change_check(name: str) -> str | None:
    """A compiled program, before and after a tensor that it was made from is written to."""
    of, tensor_of = CHANGES[name]
    model, before = captured(of)
    options = Options(kernels=GRAPHS[of].kernels or "sparse", disable=() if GRAPHS[of].kernels else ("ChooseKernels",))
    tensor = tensor_of(model)
    original = tensor.detach().clone()
    order = tensor.dtype == torch.int32 and permutation.is_identity(original.sort().values)
    with torch.no_grad():
        program, _ = backend.compile_graph(before.graph, before.inputs, options, lambda module, _: module)
        if not _agree(program(*before.inputs), before.graph(*before.inputs)):
            return "computes something else"
        try:
            tensor.copy_(original.roll(1) if order else original + 1)
            return None if _agree(program(*before.inputs), before.graph(*before.inputs)) else "gives a stale answer"
        finally:
            tensor.copy_(original)


def _agree(found: Any, expected: Any) -> bool:
    tolerances = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.05}
    return all(
        torch.allclose(a, b, rtol=tolerances[b.dtype], atol=tolerances[b.dtype]) for a, b in zip(found, expected, strict=True)
    )


# --- everything else ---


def algebra() -> str | None:
    """`permute(x, p)[..., i] = x[..., p[i]]`, and what follows for composition and inverse."""
    p, q = random_table(WIDTH), random_table(WIDTH, 1)
    x = torch.arange(3 * WIDTH).reshape(3, WIDTH)
    laws = {
        "composition": torch.equal(x[:, p][:, q], x[:, permutation.compose(p, q)]),
        "inverse": torch.equal(x[:, p][:, permutation.inverse(p)], x),
        "identity": permutation.is_identity(permutation.identity(WIDTH)),
        "what is no identity": not permutation.is_identity(p) and not permutation.is_identity(half_identity(WIDTH)),
        "check": refused(torch.tensor([0, 1, 1])) and refused(torch.tensor([0, 1, 3])) and not refused(torch.tensor([2, 0, 1])),
    }
    return next((f"the law of {law} does not hold" for law, holds in laws.items() if not holds), None)


def refused(indices: torch.Tensor) -> bool:
    try:
        permutation.check(indices, indices.numel(), "a layer")
    except InvalidPermutationError:
        return True
    return False


def ragged_kernels() -> str | None:
    """Products of sizes that no block divides, with both permutations, against a loop over blocks; and their gradients."""
    torch.manual_seed(0)
    for side, size in (("input", 7), ("output", 5)):
        layer: Any = sparse(7, 5, random_table(size, 4), side).double()
        assert isinstance(layer, PermutedSparseLinear)
        x = features(3, 7).requires_grad_()
        read = x[:, layer.permutation.long()] if side == "input" else x
        expected = block_linear(BLOCK, read, layer.values, layer.topology, 5)
        expected = (expected if side == "input" else expected[:, layer.permutation.long()]) + layer.bias
        found = layer(x)
        gradients = [torch.autograd.grad(y.square().sum(), [x, layer.values, layer.bias]) for y in (found, expected)]
        if not _agree([found], [expected]):
            return "computes another product"
        if not _agree(*gradients):
            return "has other gradients"
    return None


@functools.cache
def contradictions() -> tuple[Captured, ...]:
    """Nets of three features in which demands contradict each other."""

    def function(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.a(x)
        return m.c(x * PERMUTE(m.b(x), m.p))

    found = []
    for seed in range(3):
        torch.manual_seed(seed)
        rows = {
            name: sparse(3, size, random_table(3, (seed >> k) % 2), structure=padst.Block(1))
            for k, (name, size) in enumerate({"b": 3, "c": 2}.items())
        }
        model = Net(function, a=dense(2, 3), p=random_table(3, 7 + seed), **rows).double()
        torch._dynamo.reset()
        with torch.no_grad():
            found.append(capture(model, features(2, 2)))
    return tuple(found)


def cheapest_orders() -> str | None:
    """The orders that are chosen, against all combinations."""
    every = [np.array(order, dtype=np.int32) for order in itertools.permutations(range(3))]
    for net in contradictions():
        problem = Placement(net.context(inference=True))
        cost, leaves = problem.objective(), problem.free_leaves()
        best = min(
            cost({leaf: problem.freedom.label(leaf, order) for leaf, order in zip(leaves, combination, strict=True)})
            for combination in itertools.product(every, repeat=len(leaves))
        )
        if cost(problem.solve()) > best:
            return "another choice of orders is cheaper"
    return None


def cheapest_labels() -> str | None:
    """Cycles of variables with random costs, against all labellings."""
    generator = np.random.default_rng(0)
    domains = dict.fromkeys("uvwx", range(3))
    for _ in range(10):
        factors: list[labelling.Factor[int]] = [
            labelling.Factor(tuple(scope), lambda *labels, costs=costs: int(costs[labels]))
            for scope, costs in zip(("uv", "vw", "wx", "xu"), generator.integers(0, 9, (4, 3, 3)), strict=True)
        ]
        everything = (dict(zip(domains, labels, strict=True)) for labels in itertools.product(*domains.values()))
        least = min(labelling.total_cost(labels, factors) for labels in everything)
        if labelling.total_cost(labelling.minimise(domains, factors), factors) > least:
            return "another labelling is cheaper"
    return None


@functools.cache
def packed_product() -> Captured:
    """The graph of a product of short rows with tables of its own."""

    def function(m: Any, x: torch.Tensor) -> torch.Tensor:
        layer = m.layer
        return STRUCTURED_LINEAR(x, layer.values, list(layer.topology), layer.bias, m.a, m.b, HIDDEN, ROWS.to_string()) * 2

    torch.manual_seed(0)
    net = Net(function, layer=sparse(WIDTH, HIDDEN, structure=ROWS), a=random_table(WIDTH), b=random_table(HIDDEN))
    with torch.no_grad():
        return capture(net.to(torch.bfloat16).eval(), features().to(torch.bfloat16))


def sparse_tensor_cores() -> str | None:
    """A product lowered to a packed weight, which needs neither a GPU nor a measurement."""
    before = packed_product()
    facts = before.context(inference=True)
    (product,) = facts.module.graph.find_nodes(op="call_function", target=STRUCTURED_LINEAR)
    choose_kernels._lower_to_two_of_four(choose_kernels._Call(product, facts))
    facts.module.recompile()
    with torch.no_grad():
        verdict = padst.verify(before.graph, facts.module, *before.inputs, seeds=(0,))
    return None if verdict else "computes something else"


@functools.cache
def unlike_blocks() -> tuple[Captured, Captured]:
    """Diagonals in classes, and blocks of which rows hold different numbers."""
    blocks = sparse(WIDTH, HIDDEN)
    assert len(set(blocks.row_pointers.diff().tolist())) > 1
    found = []
    for net, width in ((classes_net(), 32), (Net(lambda m, x: m.layer(x) * 2, layer=blocks), WIDTH)):
        torch.manual_seed(0)
        torch._dynamo.reset()
        with torch.no_grad():
            found.append(capture(net.float().eval(), features(5, width).float()))
    return found[0], found[1]


def blocks_on_triton() -> str | None:
    """Products of blocks lowered to the op for GPUs, which is not run."""
    if not triton_support.installed():
        return None
    told = []
    for before in unlike_blocks():
        facts = before.context(inference=True)
        with triton_support.interpreted(), torch.no_grad():
            Pipeline(kernels="sparse").run(facts)
            if not padst.verify(before.graph, facts.module, *before.inputs, seeds=(0,)):
                return "computes something else"
        told += [argument(node, "equal_rows") for node in facts.module.graph.nodes if is_native_linear(node)]
    return None if told == [True, False] else f"is told of equally many blocks in each row: {told}"


# Layers of short rows, whose kernel finds every input through an index; a name is followed by what the graph does with layouts.
_WRITES, _READS = "feature-major output", "feature-major input"
HANDED_OVER: dict[str, tuple[Callable[[Any, torch.Tensor], torch.Tensor], int, tuple[str, ...]]] = {
    "read twice": (lambda m, h: m.middle(h) * m.other(h), 16, (_WRITES, _READS, f"gate, {_READS}")),
    "read by another function": (lambda m, h: m.middle(h) - h, 16, ("", "")),
    "added to its reader": (lambda m, h: m.middle(h) + h, 16, ("", "residual")),
    "behind a sum": (lambda m, h: m.middle(h + m.one), 16, ("residual", "")),
    "gated by a product": (
        lambda m, h: m.other(h * F.silu(m.middle(m.one))),
        16,
        (_WRITES, f"activation, gate, {_WRITES}", _READS),
    ),
    "gated by a tensor": (lambda m, h: m.middle(h * m.one), 16, ("gate", "")),
    "gated by what it reads": (lambda m, h: m.other(m.middle(h) * h), 16, ("", "gate", "")),
    "tokens that do not align": (lambda m, h: m.middle(h), 15, ("", "")),
    "read by blocks": (lambda m, h: m.blocks(h), 16, ("", "")),
}


@functools.cache
def handing_over() -> dict[str, Captured]:
    """The graphs of `HANDED_OVER`."""
    found = {}
    for name, (meet, tokens, _) in HANDED_OVER.items():
        torch.manual_seed(0)
        torch._dynamo.reset()
        up, middle, other = (sparse(size, HIDDEN, structure=ROWS) for size in (WIDTH, HIDDEN, HIDDEN))
        parts = {"middle": middle, "other": other, "blocks": sparse(HIDDEN, HIDDEN), "one": torch.randn(tokens, HIDDEN)}
        net = Net(_behind_up(meet), up=up, **parts)
        with torch.no_grad():
            found[name] = capture(net.float().eval(), features(tokens, WIDTH).float())
    return found


def _behind_up(meet: Callable[[Any, torch.Tensor], torch.Tensor]) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    return lambda m, x: meet(m, m.up(x))


def layouts_on_triton() -> str | None:
    """Who leaves a result feature-major to whom, lowered to the ops for GPUs, which are not run."""
    if not triton_support.installed():
        return None
    for name, before in handing_over().items():
        facts = before.context(inference=True)
        with triton_support.interpreted(), torch.no_grad():
            Pipeline(kernels="sparse").run(facts)
            if not padst.verify(before.graph, facts.module, *before.inputs, seeds=(0,)):
                return f"{name}: computes something else"
        calls = [node for node in facts.module.graph.nodes if is_native_linear(node)]
        forms = sorted(", ".join((*epilogue(node), *layouts(node))) for node in calls)
        if forms != sorted(HANDED_OVER[name][2]):
            return f"{name}: {forms}"
    return None


BATTERY: dict[str, Callable[[], str | None]] = {
    **{name: functools.partial(graph_check, name) for name in GRAPHS},
    **{name: functools.partial(change_check, name) for name in CHANGES},
    "the algebra": algebra,
    "ragged kernels": ragged_kernels,
    "sparse tensor cores": sparse_tensor_cores,
    "blocks on Triton": blocks_on_triton,
    "layouts on Triton": layouts_on_triton,
    "the cheapest orders": cheapest_orders,
    "the cheapest labels": cheapest_labels,
}


def killer(first: str) -> str | None:
    """The check of the battery that fails and what it says; `first` is tried before the others."""
    for name in [first, *(name for name in BATTERY if name != first)]:
        try:
            wrong = BATTERY[name]()
        except Exception as error:  # a crash is noticed too
            wrong = f"raises {type(error).__name__}"
        if wrong is not None:
            return f"{name}: {wrong}"
    return None


# --- the variants ---


@dataclasses.dataclass(frozen=True)
class Variant:
    """One mistake.

    Args:
        function: where it is made.
        right: what the source reads; it occurs there once.
        wrong: what it reads instead.
        first: the check of the battery that is tried first.
    """

    function: Callable[..., Any]
    right: str
    wrong: str
    first: str


VARIANTS: Mapping[str, Variant] = {
    # the algebra
    "compose: the second first": Variant(
        permutation.compose, "first[second]", "second[first]", "the algebra"),
    "inverse: the permutation itself": Variant(
        permutation.inverse, "torch.zeros_like(permutation).scatter(0, permutation.long(), positions)", "permutation.clone()",
        "the algebra"),
    "identity: the first half alone": Variant(
        permutation.is_identity, "return torch.equal(permutation,",
        "half = permutation.numel() // 2\n"
        "    return torch.equal(permutation[:half], identity(half)) or torch.equal(permutation,",
        "a permutation of the second half"),
    "check: features may occur twice": Variant(
        permutation.check, "or not bool(seen.all())", "", "the algebra"),
    # nodes over tables
    "compose nodes: the second first": Variant(
        index_nodes.compose, "(first, 0, second)", "(second, 0, first)", "three permutations"),
    "select nodes: always rows": Variant(
        index_nodes.select, "(tensor, axis, indices)", "(tensor, 0, indices)", "an output table and a dense reader"),
    "invert nodes: argsort twice": Variant(
        index_nodes.invert, "(indices,)", "(graph.call_function(torch.ops.aten.argsort.default, (indices,)),)",
        "both tables, run dense"),
    # compose, cancel, fold into norms
    "ComposePermutations: the outer table first": Variant(
        compose_permutations.ComposePermutations.rewrite, "inner_indices, outer_indices))", "outer_indices, inner_indices))",
        "three permutations"),
    "ComposePermutations: drops the outer table": Variant(
        compose_permutations.ComposePermutations.rewrite, "facts.hoist(compose(node.graph, inner_indices, outer_indices))",
        "inner_indices", "three permutations"),
    "CancelPermutations: forgets what it assumed": Variant(
        cancel_permutations.CancelPermutations.rewrite, "facts.assume(indices)", "pass",
        "an identity that becomes another order"),
    "CancelPermutations: any table": Variant(
        cancel_permutations.CancelPermutations.why_not, "not is_identity(facts.value(indices))", "False",
        "a permutation of the second half"),
    "CancelPermutations: a copy that is written to": Variant(
        cancel_permutations.why_no_copy, "return None if obstacle is None else", "return None if True else",
        "a copy that is written to"),
    "FoldIntoNorm: the weight stays": Variant(
        fold_into_norm.FoldIntoNorm.rewrite, '("weight", "bias")', '("bias",)', "a norm between permutations"),
    "FoldIntoNorm: the bias stays": Variant(
        fold_into_norm.FoldIntoNorm.rewrite, '("weight", "bias")', '("weight",)', "a norm between permutations"),
    "FoldIntoNorm: the input stays": Variant(
        fold_into_norm.FoldIntoNorm.rewrite, 'arguments["input"] = moved', "pass", "a norm between permutations"),
    "obstacles: writes are overlooked": Variant(
        graph.obstacle_between, "if mutates(node):", "if False:", "a permuted tensor that is written to"),
    # fusion
    "FuseInput: drops the product's own table": Variant(
        fuse_input_permutation.FuseInputPermutation.rewrite, "if own is not None:", "if False:",
        "a product with tables of its own"),
    "FuseInput: the product's own table first": Variant(
        fuse_input_permutation.FuseInputPermutation.rewrite, "(node.graph, table, own)", "(node.graph, own, table)",
        "a product with tables of its own for training"),
    "FuseOutput: the bias stays": Variant(
        fuse_output_permutation.FuseOutputPermutation.rewrite, "facts.hoist(select(node.graph, bias, table))", "bias",
        "both tables and a bias"),
    "FuseOutput: drops the product's own table": Variant(
        fuse_output_permutation.FuseOutputPermutation.rewrite, "table if own is None else", "table if True else",
        "a product with tables of its own"),
    "FuseOutput: the later table first": Variant(
        fuse_output_permutation.FuseOutputPermutation.rewrite, "(node.graph, own, table)", "(node.graph, table, own)",
        "a product with tables of its own"),
    "AbsorbBias: reorders what is added to permuted outputs": Variant(
        absorb_bias.AbsorbBias.rewrite, "set_arguments(linear, bias=_uncast(addend))",
        "select, table = torch.ops.aten.index_select.default, argument(linear, 'output_permutation')\n"
        "    with node.graph.inserting_before(node):\n"
        "        moved = addend if table is None else node.graph.call_function(select, (addend, 0, table))\n"
        "    set_arguments(linear, bias=moved)", "a bias behind a store"),
    "AbsorbBias: other readers get the bias too": Variant(
        absorb_bias.AbsorbBias.why_not, "if len(linear.users) != 1:", "if False:", "a product that is read twice"),
    # kernels
    "dense lowering: forgets the inverse": Variant(
        choose_kernels._lower_to_dense, "call.facts.hoist(invert(graph, in_table))", "in_table", "both tables, run dense"),
    "dense lowering: inverts the rows": Variant(
        choose_kernels._lower_to_dense, "weight, out_table, axis=0",
        "weight, call.facts.hoist(invert(graph, out_table)), axis=0", "both tables, run dense"),
    "dense lowering: drops the bias": Variant(
        choose_kernels._lower_to_dense, "(x, weight, bias)", "(x, weight, None)", "both tables, run dense"),
    "2:4 lowering: inverts the rows": Variant(
        choose_kernels._lower_to_two_of_four, "weight, out_table, axis=0",
        "weight, call.facts.hoist(invert(graph, out_table)), axis=0", "sparse tensor cores"),
    "2:4 lowering: drops the bias": Variant(
        choose_kernels._lower_to_two_of_four, "(x, packed, bias, ", "(x, packed, None, ", "sparse tensor cores"),
    "2:4 lowering: forgets the order of the inputs": Variant(
        choose_kernels._lower_to_two_of_four, 'argument(node, "input_permutation")', "None", "sparse tensor cores"),
    "block kernel: the last block reads before its tile": Variant(
        block_aten._tiles, "(0, count * width - x.shape[1])", "(count * width - x.shape[1], 0)", "ragged kernels"),
    "block kernel: padding is kept, features are lost": Variant(
        block_aten._untile, "[:, :features]", "[:, -features:]", "ragged kernels"),
    "block kernel: the gradient of the values transposed": Variant(
        block_aten.BlockFormat.value_gradient, "inputs[columns[part]].transpose(1, 2) @ outputs[rows[part]]",
        "outputs[rows[part]].transpose(1, 2) @ inputs[columns[part]]", "ragged kernels"),
    "TanhGate: the gate is not doubled": Variant(
        tanh_gate._rewrite_product, "(tanh.args[0], 2.0)", "(tanh.args[0], 1.0)", "half a gate"),
    "TanhGate: another cubic term": Variant(
        tanh_gate._rewrite_gelu, "0.044715", "0.44715", "the tanh form of GELU"),
    "TanhGate: any factor is a half": Variant(
        tanh_gate._beside_number, "not isinstance(left, fx.Node) and left == number", "not isinstance(left, fx.Node)",
        "a gate of another height"),
    "UnfoldPatches: the kernel transposed": Variant(
        unfold_patches.UnfoldPatches.rewrite, "0, 2, 4, 1, 3, 5", "0, 2, 4, 1, 5, 3", "patches"),
    "UnfoldPatches: drops the bias": Variant(
        unfold_patches.UnfoldPatches.rewrite, '(flat, kernel, arguments["bias"])', "(flat, kernel, None)", "patches"),
    # native kernels
    "FuseActivation: other readers get it too": Variant(
        fuse_activation.FuseActivation.why_not, "if len(linear.users) != 1:", "if False:",
        "an activation of what another reads"),
    "FuseActivation: forgets the one before": Variant(
        fuse_activation.FuseActivation.why_not, "if before:", "if False:", "an activation of an activation"),
    "FuseActivation: one form of GELU": Variant(
        fuse_activation.activation_of, 'str(node.kwargs.get("approximate", "none"))', '"none"', "both forms of GELU"),
    "FuseOperand: other readers get the sum too": Variant(
        fuse_operand.FuseOperand.why_not, "if len(linear.users) != 1:", "if False:", "a sum of what another reads"),
    "FuseOperand: the terms may differ in shape": Variant(
        fuse_operand.alike, "result.shape == product.shape == other.shape", "True", "a sum with a vector"),
    "FuseResidual: forgets the term before": Variant(
        fuse_residual.FuseResidual.blocked, 'argument(linear, "residual") is None', "True", "a sum of three"),
    "FuseGate: forgets the factor before": Variant(
        fuse_gate.FuseGate.blocked, 'argument(linear, "gate") is not None', "False", "a product of three"),
    "SplitGates: other readers get a half": Variant(
        split_gates.SplitGates.why_not, "if len(linear.users) != 1:", "if False:",
        "two factors from one layer that is read again"),
    "SplitGates: the halves change places": Variant(
        split_gates.SplitGates.rewrite, "arguments, pieces, strict", "arguments, pieces[::-1], strict",
        "two factors from one layer"),
    "SplitGates: the first rows twice": Variant(
        split_gates._weights, "(group, 2 * group) if second else (0, group)", "(0, group)", "two factors from one layer"),
    "SplitGates: the blocks of the whole layer": Variant(
        split_gates._weights, ", middle, facts)", ", 0, facts)", "two factors from one block layer"),
    "SplitGates: the first biases twice": Variant(
        split_gates._outputs, "_cut(bias, first, last, facts)", "_cut(bias, 0, last - first, facts)",
        "two factors from one layer"),
    "SplitGates: the order counts from the first half": Variant(
        split_gates._outputs, "_cut(table, first, last, facts), first, facts)", "_cut(table, first, last, facts), 0, facts)",
        "two factors from one layer, reordered"),
    "SplitGates: forgets the order that it assumed": Variant(
        split_gates._outputs, "facts.assume(table)", "pass", "another order of two factors"),
    "SplitGates: an order may mix the halves": Variant(
        split_gates._why_order_stays, "bool((facts.value(table)[:half] < half).all())", "True",
        "two factors from one layer, mixed"),
    "SplitGates: rows that share a choice may part": Variant(
        split_gates._why_rows_stay, "if half % _row_group(linear, facts):", "if False:",
        "two factors whose rows share a choice"),
    "FuseMlp: others read the hidden features": Variant(
        fuse_mlp.FuseMlp.why_not, "len(first.users) != 1 or ", "", "two block layers and another reader"),
    "FuseMlp: the hidden features are added too": Variant(
        fuse_mlp.FuseMlp.why_not, "or any(", "or False and any(", "two block layers whose hidden features are added"),
    "FuseMlp: forgets the second activation": Variant(
        fuse_mlp.FuseMlp.why_not, 'or set(epilogue(node)) - {"residual"}', "", "two block layers and an activation behind"),
    "FuseMlp: forgets the first sum": Variant(
        fuse_mlp.FuseMlp.why_not, 'set(epilogue(first)) - {"activation"} or', "", "two block layers and a sum between"),
    "FuseMlp: forgets the first activation": Variant(
        fuse_mlp._arguments, 'argument(first, "activation")', '"none"', "two block layers"),
    "FuseMlp: forgets the second sum": Variant(
        fuse_mlp._arguments, 'argument(second, "residual")', "None", "two block layers"),
    "KeepFeatureMajor: others read panels too": Variant(
        keep_feature_major.KeepFeatureMajor.why_not, "if others:", "if False:",
        "short rows that a product and a function read"),
    "KeepFeatureMajor: adds tokens to panels": Variant(
        keep_feature_major.KeepFeatureMajor.why_not, 'argument(node, "residual") is not None', "False",
        "short rows behind a sum"),
    "KeepFeatureMajor: panels as a residual": Variant(
        native_calls.reads_as_input, '("residual", "gate")', '("gate",)', "short rows that are added to what reads them"),
    "KeepFeatureMajor: panels as a gate of what reads them": Variant(
        native_calls.reads_as_input, '("residual", "gate")', '("residual",)', "short rows gated by what they read"),
    "KeepFeatureMajor: tokens as a gate of panels": Variant(
        native_calls.gate_follows, "if gate is None:", "if True:", "short rows gated by a tensor"),
    "KeepFeatureMajor: the gate is not told": Variant(
        keep_feature_major.KeepFeatureMajor.rewrite, 'if argument(node, "gate") is not None:', "if False:",
        "short rows gated by short rows"),
    "KeepFeatureMajor: the gate is read as tokens too": Variant(
        native_calls.gate_follows, ' and argument(node, "x") is not gate', "", "short rows gated by what they read"),
    "KeepFeatureMajor: one reader is not told": Variant(
        keep_feature_major.KeepFeatureMajor.rewrite, "for user in list(node.users):", "for user in list(node.users)[:1]:",
        "short rows that two products read"),
    "KeepFeatureMajor: the producer is not told": Variant(
        keep_feature_major._leave_panels, "set_arguments(node, to_panels=True)", "pass", "a chain of short rows"),
    "KeepFeatureMajor: takes panels for tokens": Variant(
        keep_feature_major._token_sizes, 'if argument(node, "panels_of") is not None:', "if False:", "a chain of diagonals"),
    "KeepFeatureMajor: the tokens of one sequence": Variant(
        keep_feature_major._token_sizes, "enumerate(known.shape[:-1])", "enumerate(known.shape[1:-1])", "a chain of diagonals"),
    "HandOverFeatureMajor: others read the result": Variant(
        hand_over_feature_major.HandOverFeatureMajor.why_not, "if others:", "if False:", "layouts on Triton"),
    "HandOverFeatureMajor: adds what is token-major": Variant(
        hand_over_feature_major.HandOverFeatureMajor.why_not, 'argument(node, "residual") is not None', "False",
        "layouts on Triton"),
    "HandOverFeatureMajor: readers that gain nothing": Variant(
        triton_trial.why_token_major, "product.why_token_major(launch_of(node, facts, reads=True, writes=False))", "None",
        "layouts on Triton"),
    "HandOverFeatureMajor: any number of tokens": Variant(
        hand_over_feature_major._runs_align, "% _ALIGNED == 0", "% _ALIGNED >= 0", "layouts on Triton"),
    "HandOverFeatureMajor: the result as a residual": Variant(
        native_calls.reads_as_input, '("residual", "gate")', '("gate",)', "layouts on Triton"),
    "HandOverFeatureMajor: the result as a gate of its reader": Variant(
        native_calls.gate_follows, ' and argument(node, "x") is not gate', "", "layouts on Triton"),
    "HandOverFeatureMajor: gated by what is token-major": Variant(
        native_calls.gate_follows, "if gate is None:", "if True:", "layouts on Triton"),
    "HandOverFeatureMajor: the gate is not told": Variant(
        hand_over_feature_major.HandOverFeatureMajor.rewrite, 'for product in (node, argument(node, "gate")):',
        "for product in (node,):", "layouts on Triton"),
    "InterleaveBlocks: any dtype": Variant(
        interleave_blocks.InterleaveBlocks.matches, "native.interleaves(result.dtype)", "True", "blocks of float32"),
    "InterleaveBlocks: odd numbers of inputs": Variant(
        interleave_blocks.InterleaveBlocks.why_not, "if value.shape[1] % 2 else", "if False else",
        "16-bit blocks with odd numbers of inputs"),
    "InterleaveBlocks: arranges in each call": Variant(
        interleave_blocks.InterleaveBlocks.rewrite, "facts.hoist(arranged)", "arranged", "16-bit blocks"),
    "InterleaveBlocks: takes outputs for inputs": Variant(
        interleave_blocks.InterleaveBlocks.rewrite, "_in_features(node), argument", 'argument(node, "out_features"), argument',
        "16-bit blocks"),
    "WidenValues: any native product": Variant(
        widen_values.WidenValues.matches, "is_row_gather(node) and", "", "16-bit blocks"),
    "WidenValues: converts in each call": Variant(
        widen_values.WidenValues.rewrite, "facts.hoist(wide)", "wide", "16-bit diagonals"),
    "FoldDiagonals: the stride permutation before the table": Variant(
        fold_diagonals.multiply_blocks, "compose(graph, into, before)", "compose(graph, before, into)", "diagonals in classes"),
    "FoldDiagonals: the table before the stride permutation": Variant(
        fold_diagonals.multiply_blocks, "compose(graph, behind, out)", "compose(graph, out, behind)", "diagonals in classes"),
    "FoldDiagonals: drops the product's own table": Variant(
        fold_diagonals.multiply_blocks, "before if into is None else", "before if True else", "diagonals in classes"),
    "FoldDiagonals: values stay diagonals": Variant(
        fold_diagonals.multiply_blocks, "made(node, facts, _aten.index_select.default, flat, 0, entries)", "flat",
        "diagonals in classes"),
    "FoldDiagonals: blocks transposed": Variant(
        fold_diagonals.multiply_blocks, "[-1, blocks.columns, blocks.rows]", "[-1, blocks.rows, blocks.columns]",
        "diagonals in classes"),
    "FoldDiagonals: reads by the place in the class": Variant(
        diagonal_blocks._read_by_class, ".reshape(-1, stride).T", ".reshape(stride, -1).T", "diagonals in classes"),
    "FoldDiagonals: entries do not wrap": Variant(
        diagonal_blocks._entries, "(p - q - borrow) % turns", "(p - q) % turns", "diagonals in classes"),
    "FoldDiagonals: rows of blocks are not known to be equal": Variant(
        fold_diagonals.FoldDiagonals.rewrite, 'node.meta[_EQUAL_ROWS] = argument(node, "topology")[0].name', "pass",
        "blocks on Triton"),
    "ChooseKernels: rows of all blocks are equal": Variant(
        fold_diagonals.has_equal_rows, 'node.meta.get(_EQUAL_ROWS) == argument(node, "topology")[0].name', "True",
        "blocks on Triton"),
    "FoldBands: offsets are not watched": Variant(
        fold_bands.FoldBands.rewrite, "facts.assume(offsets)", "pass", "other offsets of diagonals in a run"),
    "FoldBands: tables change sides": Variant(
        fold_bands.FoldBands.rewrite, "reads=reads, writes=writes", "reads=writes, writes=reads", "diagonals in a run"),
    "FoldBands: the last value stands for zeros": Variant(
        diagonal_bands.band_tables, "width,), row.numel()", "width,), row.numel() - 1", "diagonals in a run"),
    "FoldBands: blocks transposed": Variant(
        diagonal_bands.band_tables, "* width + column % width) * height + row % height",
        "* height + row % height) * width + column % width", "diagonals in a run"),
    "FoldBands: columns of the whole grid": Variant(
        diagonal_bands.band_tables, "occupied % block_columns", "occupied", "diagonals in a run"),
    "FoldBands: inputs are read the other way": Variant(
        diagonal_bands.band_tables, "inverse(at_input), at_output", "at_input, at_output", "diagonals in a run"),
    # constants
    "constants: not made anew": Variant(Program.refresh, "old.copy_(new)", "pass", "another dense weight"),
    "constants: their sources are not watched": Variant(
        backend._specialize, "{*split.sources, *split.relied_sources}", "{*split.relied_sources}", "another dense weight"),
    "constants: what was assumed is not compared": Variant(
        Program.refresh, "if not all(torch.equal(now, then)", "if not all(True", "another order after compilation"),
    "constants: what was assumed is not extracted": Variant(
        hoist_constants.hoist_constants, "_extract(module, list(facts.assumed))", "_extract(module, [])",
        "another order after compilation"),
    "context: an assumption holds the tensor itself": Variant(
        context.Context.assume, "value.clone()", "value", "another order after compilation"),
    # tracing
    "trace: the graph's results are free": Variant(
        trace._Run.step, 'self._pin(fx.map_arg(node.args, self._read), "the graph returns it")',
        "fx.map_arg(node.args, self._read)", "a bias behind a store"),
    "trace: the graph's inputs are free": Variant(
        trace._Run.step, 'self._pin(self._values[node], "it is an input of the graph")',
        "self._tracer.define(self._values[node], [axis_of_size(size) for size in self._values[node].shape])",
        "the graph's input"),
    "trace: unknown operators pin nothing": Variant(
        trace.Tracer.__torch_dispatch__, 'call.pin_all(f"no rule knows {func}")',
        "[call.define(r, call.axes(call.tensors[0])) for r in call.results]", "an unknown operator"),
    "trace: a table for each row of a parameter": Variant(
        trace._Run._read, ", separate=True)", ")", "a scale for each channel of each group"),
    # rules about axes
    "softmax: its axis is not recorded as mixed": Variant(
        norms.softmax, 'call.graph.mixed.append(axes[call.argument("dim")])', "pass", "softmax over groups"),
    "norm: weights are left out": Variant(
        norms.layer_norm, "broadcast(call.axes(parameter), normalised)", "pass", "a norm of the hidden layer"),
    "pointwise: broadcasts from the first axis": Variant(
        pointwise.broadcast, "reversed(operand), reversed(result)", "operand, result", "a gate and a scale"),
    "pointwise: one operand is left out": Variant(
        pointwise.pointwise, "for tensor in call.tensors:", "for tensor in call.tensors[:1]:", "a gate and a scale"),
    "linear: its bias is left out": Variant(
        contractions.multiply_add, 'broadcast(call.axes(call.argument("self")), axes)', "pass",
        "a dense producer in two dimensions"),
    "linear: the summed axes are not tied": Variant(
        contractions.product, "unify(summed, other_summed)", "pass", "an output table and a dense reader"),
    "structured product: its bias is left out": Variant(
        structured.structured_linear, "unify(call.axes(bias)[0], outputs)", "pass", "both tables between dense layers"),
    "attention: heads of keys are not tied": Variant(
        attention.scaled_dot_product, "unify(query, key)", "pass", "whole heads"),
    "attention: heads of values are not tied": Variant(
        attention.scaled_dot_product, "unify(query, value)", "pass", "whole heads"),
    "attention: channels of queries and values are tied": Variant(
        attention.scaled_dot_product, "unify(queries[-1], keys[-1])",
        "unify(queries[-1], keys[-1]); unify(queries[-1], values[-1])", "channels of heads from one layer"),
    "cat: pieces share one order": Variant(
        pieces.cat, "axes[dim] = sum_of(",
        "[unify(call.axes(tensor)[dim], call.axes(tensors[0])[dim]) for tensor in tensors]\n    axes[dim] = sum_of(",
        "joined tensors"),
    "cat: the result is free": Variant(
        pieces.cat, "axes[dim] = sum_of(call.axes(tensor)[dim] for tensor in tensors)", "pass", "joined tensors, mixed"),
    "slice: begins at the first index": Variant(
        pieces.slice_, "(first, size, whole - first - size))[1]", "(size, whole - size))[0]",
        "a slice from the middle"),
    "split: a piece shares the order of the one before": Variant(
        pieces.split, "for result, piece in zip(call.results, pieces, strict=True):",
        "for result, piece in zip(call.results, pieces[-1:] * len(pieces), strict=True):", "two halves of one layer"),
    "select: no instances": Variant(
        pieces.select, "for axis in others] if few else others", "for axis in others] if False else others",
        "channels of heads from one layer"),
    "select: the instance of the next index": Variant(
        pieces.select, "(chosen, first, first + 1)", "(chosen, first + 1, first + 2)", "channels of heads from one layer"),
    "view: minor axes first": Variant(
        reshapes.view, 'align(call.axes(call.argument("self")), axes)',
        'align(call.axes(call.argument("self"))[::-1], axes[::-1])', "groups divided unevenly"),
    "transpose: axes stay in place": Variant(
        reshapes.transpose, "axes[first], axes[second] = axes[second], axes[first]", "pass", "channels within heads"),
    "expand: copies keep their order": Variant(
        reshapes.expand, "new = [axis_of_size(size) for size in result.shape]",
        "new = [axis_of_size(size, 'repeated') for size in result.shape]", "copies in another order"),
    "expand: copies share the order of what is repeated": Variant(
        reshapes.expand, 'axes = call.axes(call.argument("self"))',
        "axes = [axis_of_size(size) for size in call.tensors[0].shape]", "features repeated"),
    "repeat: the copy is the minor axis": Variant(
        reshapes.repeat, "align([axis_of_size(count), axis], [whole])", "align([axis, axis_of_size(count)], [whole])",
        "copies one after the other"),
    "convolution: positions are free": Variant(
        convolutions.convolution, 'axis.pin("a convolution goes along it")', "pass", "positions of a convolution"),
    "convolution: channels are not tied to the kernel": Variant(
        convolutions.convolution, "unify(channels, kernel[1])", "pass", "channels into a convolution"),
    "convolution: its bias is left out": Variant(
        convolutions.convolution, "unify(call.axes(bias)[0], outputs)", "pass", "channels of a convolution"),
    "running sum: its axis is free": Variant(
        reductions.accumulate, 'axis.pin("a running sum goes along it")', "pass", "a running sum"),
    "reduction: another axis vanishes": Variant(
        reductions._remaining, "if position not in reduced]", "if position - 1 not in reduced]", "groups summed"),
    "embedding: entries are free": Variant(
        indexing.embedding, "entries.pin(_REASON)", "pass", "entries of an embedding"),
    "index: the axis that is looked up along is free": Variant(
        indexing.index, "axes[position].pin(_REASON)", "pass", "outputs at some places"),
    # axes and their orders
    "unify: sizes alone": Variant(axis._replace, "a._parent = b", "pass", "a dense producer"),
    "unify: a pin is lost": Variant(axis._replace, "b.pin(reason)", "pass", "a function of the graph's input"),
    "pin: parts stay free": Variant(
        axis.Axis.pin, "stack += [*axis.parts, *axis.instances.values()]", "pass", "groups that the graph returns"),
    "cut: instances of the next head": Variant(
        axis._cut_product, "part.instance(major, first, last)", "part.instance(major, first + 1, last + 1)",
        "groups, then their halves"),
    "cut: the remainder of a part is dropped": Variant(
        axis._cut_sum, "terms.appendleft(halves[1])", "pass", "slices that begin at different places"),
    "freedom: depends on what is not seen": Variant(
        orders.Freedom._dependencies, "axis in together.get(leaf, ()) and axis not in mixed", "axis not in mixed",
        "groups summed"),
    "freedom: depends on mixed axes": Variant(
        orders.Freedom._dependencies, " and axis not in mixed", "", "softmax over groups"),
    "assemble: channels of the next head": Variant(
        orders.Freedom._assemble, "_places(head, int(index))", "_places(head, (int(index) + 1) % len(own))",
        "channels within heads"),
    "assemble: channels by the new place of the head": Variant(
        orders.Freedom._assemble, "_places(head, int(index))}) for index in own]",
        "_places(head, place)}) for place, index in enumerate(own)]", "heads and their channels"),
    "assemble: pieces without offsets": Variant(
        orders._concatenate, "order + offset for", "order for", "unequal pieces"),
    "decompose: crosses the borders of pieces": Variant(
        orders._Decomposition._visit_sum, "if piece.size and not (piece.min() >= 0 and piece.max() < last - first):",
        "if False:", "joined tensors, mixed"),
    "decompose: heads may break up": Variant(
        orders._Decomposition.visit, "if not np.array_equal(rows // inner, np.broadcast_to(own[:, None], rows.shape)):",
        "if False:", "channels across heads"),
    "decompose: contradictions are overlooked": Variant(
        orders._Decomposition._visit_one, "if row[0] >= 0 and not np.array_equal(row, order):", "if False:",
        "copies in orders of their own"),
    # placing
    "place: invert does nothing": Variant(
        place_permutations.invert, "np.argsort(order).astype(np.int32)", "order", "an output table and a dense reader"),
    "place: identity by the first half": Variant(
        place_permutations.is_identity, "np.array_equal(order, np.arange(order.size))",
        "np.array_equal(order[: order.size // 2], np.arange(order.size // 2))", "a dense producer, half of it"),
    "place: outputs demand their own table": Variant(
        Placement._sites, 'order if side == "input" else invert(order)', "order", "an output table and a dense reader"),
    "place: outputs get the table L[q]": Variant(
        _Rewriting._rewrite_site, "else (site.table, order)", "else (order, site.table)", "outputs of several sparse layers"),
    "place: inputs read p[L]": Variant(
        _Rewriting._rewrite_site, "invert(placed)[own]", "own[placed]", "siblings that disagree"),
    "place: inputs get the table p[L⁻¹]": Variant(
        _Rewriting._rewrite_site, "(invert(order), site.table) if", "(site.table, invert(order)) if", "siblings that disagree"),
    "place: inputs get the table L[p]": Variant(
        _Rewriting._rewrite_site, "(invert(order), site.table) if", "(order, site.table) if", "siblings that disagree"),
    "place: a permutation between orders read as L[p]": Variant(
        _Rewriting._rewrite_link, "own if outputs is None else own[outputs]", "own if outputs is None else outputs[own]",
        "a permutation that a demand lies beyond"),
    "place: a permutation's table without the order before it": Variant(
        _Rewriting._rewrite_link, "None if inputs is None else invert(inputs), table", "None, table",
        "two permutations of one tensor that must agree"),
    "place: a permuted copy that is written to": Variant(
        _Rewriting._rewrite_link, "is_identity(residual) and why_no_copy(link.node) is None", "is_identity(residual)",
        "a permuted copy that is written to"),
    "place: demands go through permutations backwards": Variant(
        Placement._transport, "back = invert(table)", "back = table", "a permutation that a demand lies before"),
    "place: parameters are reordered along the first axis": Variant(
        _Rewriting._rewrite_static, "self._constant(order), position)", "self._constant(order), 0)",
        "an output table and a dense reader"),
    "place: one parameter is missed": Variant(
        _Rewriting.apply, "for use in self._problem.graph.statics]", "for use in self._problem.graph.statics[1:]]",
        "a dense producer"),
    "place: one sibling is missed": Variant(
        _Rewriting.apply, "for site in self._problem.sites]", "for site in self._problem.sites[1:]]", "siblings that agree"),
    "place: an order is forgotten where it was assumed": Variant(
        _Rewriting._rewrite_site, "self._facts.assume(site.table)", "pass", "another order after compilation"),
    "place: a permutation is forgotten where it was assumed": Variant(
        _Rewriting._rewrite_link, "self._facts.assume(table)", "pass", "another order between dense layers"),
    "place: one wish does not count": Variant(
        Placement._factors, "for site in self.sites if", "for site in self.sites[1:] if", "a dense producer"),
    "place: permutations cost nothing": Variant(
        Placement._link_factor, "table[outputs]) else price", "table[outputs]) else 0", "a permutation between dense layers"),
    "labelling: ignores a factor": Variant(
        labelling.minimise, "for factor in shared]", "for factor in shared[1:]]", "the cheapest labels"),
    "labelling: takes the dearest label": Variant(
        labelling._eliminate, "total.values.argmin(axis=0)", "total.values.argmax(axis=0)", "the cheapest labels"),
    "labelling: hands on the dearest cost": Variant(
        labelling._eliminate, "total.values.min(axis=0)", "total.values.max(axis=0)", "the cheapest labels"),
}  # fmt: skip


def prepare(check: str) -> None:
    """Capture what a check rewrites, before anything is wrong."""
    if check == "the cheapest orders":
        contradictions()
    elif check == "sparse tensor cores":
        packed_product()
    elif check == "layouts on Triton":
        handing_over()
    elif check in GRAPHS or check in CHANGES:
        captured(CHANGES[check][0] if check in CHANGES else check)


@pytest.fixture(scope="module", autouse=True)
def _forget_the_captured_graphs() -> Iterator[None]:
    yield
    captured.cache_clear()
    contradictions.cache_clear()
    packed_product.cache_clear()
    handing_over.cache_clear()


@pytest.mark.parametrize("check", BATTERY)
def test_the_battery_passes_on_the_code_as_it_is(check: str) -> None:
    assert BATTERY[check]() is None


@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if variant.first in BATTERY])
def test_a_wrong_variant_is_noticed(name: str, record_property: Callable[[str, object], None]) -> None:
    variant = VARIANTS[name]
    prepare(variant.first)
    with edited(variant.function, variant.right, variant.wrong) as calls:
        killed_by = killer(variant.first)
    record_property("wrong_variant", (name, killed_by))
    assert calls, "the battery never calls what the variant changes"
    assert killed_by is not None, "the battery is too weak, or what the variant changes has no effect"


def test_an_edit_holds_everywhere_and_is_undone() -> None:
    table = torch.tensor([1, 2, 0])
    with edited(permutation.compose, "first[second]", "second") as calls:
        assert permutation.compose(table, table) is table
    assert (len(calls), permutation.compose(table, table).tolist()) == (1, [2, 0, 1])


def test_an_edit_of_what_is_not_there_is_refused() -> None:
    with pytest.raises(LookupError, match=r"compose has 0 places that read 'third'"), edited(permutation.compose, "third", ""):
        pass
