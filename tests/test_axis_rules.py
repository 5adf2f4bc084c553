"""Every rule about axes, against the operator itself: whatever orders the rules leave free must pass through unharmed.

Each case runs a function on small tensors of whole numbers. All axes of its inputs that the rules leave free are reordered at
random; its outputs must come out in the orders that the rules then say, bit for bit. A second table says which freedom must
be left, so that a rule that pins everything does not pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from padst_compile.passes.axes import rules
from padst_compile.passes.axes.axis import Axis
from padst_compile.passes.axes.orders import Freedom
from padst_compile.passes.axes.registry import rule_for
from padst_compile.passes.axes.trace import Tracer, axis_of_size

assert rules.__all__  # importing it registers the rules

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Traced:
    """A function's tensors with their axes."""

    inputs: list[tuple[torch.Tensor, list[Axis]]]
    outputs: list[tuple[torch.Tensor, list[Axis]]]
    freedom: Freedom
    unknown: dict[str, str]


def tensor(*sizes: int, seed: int = 0) -> torch.Tensor:
    """Whole numbers in float64, so that sums are exact in any order."""
    return torch.randint(-4, 5, sizes, generator=torch.Generator().manual_seed(seed + sum(sizes))).double()


def run_traced(function: Callable[..., Any], inputs: list[torch.Tensor]) -> Traced:
    mode = FakeTensorMode()
    tracer = Tracer(rule_for)
    fakes = [mode.from_tensor(value, static_shapes=True) for value in inputs]
    for value in fakes:
        tracer.define(value, [axis_of_size(size) for size in value.shape], separate=True)
    with torch.no_grad(), mode, tracer:
        result = function(*fakes)
    outputs = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
    for output in outputs:
        tracer.axes.seen += [(axis,) for axis in tracer.axes_of(output)]
    freedom = Freedom(tracer.axes.seen, tracer.axes.mixed)
    return Traced(
        [(value, tracer.axes_of(fake)) for value, fake in zip(inputs, fakes, strict=True)],
        [(output, tracer.axes_of(output)) for output in outputs],
        freedom,
        tracer.axes.unknown,
    )


def random_labels(traced: Traced, seed: int) -> dict[Axis, bytes]:
    """A random order for every free leaf, another at each index of what it may depend on."""
    generator = np.random.default_rng(seed)
    axes = [axis for _, axes in (*traced.inputs, *traced.outputs) for axis in axes]
    labels = {}
    for leaf in dict.fromkeys(leaf for axis in axes for leaf in traced.freedom.leaves(axis)):
        if leaf.pinned is None:
            sizes = [int(axis.size) for axis in traced.freedom.depends(leaf)]
            table = np.empty((*sizes, int(leaf.size)), dtype=np.int32)
            for index in np.ndindex(*sizes):
                table[index] = generator.permutation(int(leaf.size))
            labels[leaf] = table.tobytes()
    return labels


def reordered(value: torch.Tensor, axes: list[Axis], traced: Traced, labels: dict[Axis, bytes]) -> torch.Tensor:
    for dim, axis in enumerate(axes):
        if value.shape[dim] > 1:
            value = value.index_select(dim, torch.tensor(traced.freedom.assemble(axis, labels)))
    return value


def rotate_half(x: torch.Tensor, cos: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1)


def rotate_pairs(x: torch.Tensor) -> torch.Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).reshape(x.shape)


def heads(x: torch.Tensor) -> torch.Tensor:
    return x.view(2, 5, 3, 4).transpose(1, 2)


def fused_attention(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    q, k, v = F.linear(x, w, b).reshape(2, 5, 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
    scores = q @ k.transpose(-2, -1)
    return F.linear((scores * scores @ v).transpose(1, 2).reshape(2, 5, 12), out)


def grouped_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    def repeated(x: torch.Tensor) -> torch.Tensor:
        x = x.view(2, 5, 2, 3).transpose(1, 2)
        return x[:, :, None].expand(2, 2, 2, 5, 3).reshape(2, 4, 5, 3)

    q = q.view(2, 5, 4, 3).transpose(1, 2)
    return (q @ repeated(k).transpose(-1, -2) @ repeated(v)).transpose(1, 2).reshape(2, 5, 12)


def patches(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return F.conv2d(x, w, stride=2).flatten(2).transpose(1, 2)


def merged_patches(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(2, 2, 2, 2, 2, 3).permute(0, 1, 3, 4, 2, 5).flatten(3)


def in_place(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    z = x.clone()
    z.add_(y).mul_(2)
    z[:, 1:3] = 0
    return z


def class_token(x: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    x = torch.cat((token.expand(2, 1, 6), x), dim=1)
    return x[:, 0] + x[:, 1:].sum(1)


def bool_mask(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.where(mask > 0, x, torch.zeros(()).double())


CASES: dict[str, tuple[Callable[..., Any], list[torch.Tensor]]] = {
    "add broadcast": (torch.add, [tensor(2, 5, 6), tensor(6)]),
    "multiply broadcast middle": (torch.mul, [tensor(2, 5, 6), tensor(5, 1)]),
    "gate": (lambda x, w, v: F.relu(x @ w) * (x @ v), [tensor(3, 4), tensor(4, 6), tensor(4, 6, seed=1)]),
    "gate from chunks": (lambda x: F.relu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1], [tensor(3, 8)]),
    "scalar": (lambda x: 2 * x + 1, [tensor(3, 4)]),
    "where": (bool_mask, [tensor(3, 4), tensor(4)]),
    "clamp and abs": (lambda x: x.clamp(-1, 2).abs(), [tensor(3, 4)]),
    "masked fill": (lambda x, m: x.masked_fill(m > 0, 7.0), [tensor(2, 3, 4), tensor(3, 4)]),
    "in place": (in_place, [tensor(2, 5, 6), tensor(6)]),
    "zeros like": (lambda x: x + torch.zeros_like(x), [tensor(3, 4)]),
    "arange": (lambda x: x + torch.arange(4), [tensor(3, 4)]),
    "linear": (F.linear, [tensor(2, 5, 6), tensor(4, 6), tensor(4)]),
    "two linears": (lambda x, w, v: F.linear(F.relu(F.linear(x, w)), v), [tensor(5, 6), tensor(8, 6), tensor(3, 8)]),
    "conv1d of transformers": (lambda x, w, b: torch.addmm(b, x.view(-1, 6), w), [tensor(2, 5, 6), tensor(6, 4), tensor(4)]),
    "matmul": (torch.matmul, [tensor(2, 3, 5, 4), tensor(2, 3, 4, 6)]),
    "matmul with a matrix": (torch.matmul, [tensor(2, 3, 5, 4), tensor(4, 6)]),
    "baddbmm": (torch.baddbmm, [tensor(3, 5, 6), tensor(3, 5, 4), tensor(3, 4, 6)]),
    "matrix vector": (torch.mv, [tensor(3, 4), tensor(4)]),
    "dot": (torch.dot, [tensor(4), tensor(4, seed=1)]),
    "einsum": (lambda x, y: torch.einsum("bthd,bshd->bhts", x, y), [tensor(2, 3, 4, 5), tensor(2, 6, 4, 5)]),
    "heads": (heads, [tensor(2, 5, 12)]),
    "heads and back": (lambda x: heads(x).transpose(1, 2).reshape(2, 5, 12), [tensor(2, 5, 12)]),
    "fused attention": (fused_attention, [tensor(2, 5, 12), tensor(36, 12), tensor(36), tensor(12, 12)]),
    "grouped attention": (grouped_attention, [tensor(2, 5, 12), tensor(2, 5, 6), tensor(2, 5, 6, seed=1)]),
    "rotary halves": (lambda x, c: rotate_half(heads(x), c), [tensor(2, 5, 12), tensor(5, 4)]),
    "rotary pairs": (lambda x: rotate_pairs(heads(x)), [tensor(2, 5, 12)]),
    "split": (lambda x: torch.split(x, [2, 3, 4], dim=1), [tensor(2, 9, 5)]),
    "unequal cuts": (lambda x: (x[:, :4] + x[:, 5:], x[:, 2:6] * 2), [tensor(3, 9)]),
    "cat": (lambda x, y, w: F.linear(torch.cat((x, y), -1), w), [tensor(3, 4), tensor(3, 5), tensor(6, 9)]),
    "cat then split elsewhere": (lambda x, y: torch.cat((x, y), 0).split(3), [tensor(4, 2), tensor(5, 2)]),
    "stack": (lambda x, y: torch.stack((x, y), 1), [tensor(3, 4), tensor(3, 4, seed=1)]),
    "unbind": (lambda x: x.view(4, 3, 5).unbind(1), [tensor(4, 15)]),
    "select": (lambda x: x.view(4, 3, 5)[:, 1] + x.view(4, 3, 5)[:, 2], [tensor(4, 15)]),
    "select of many": (lambda x: x[:, 3], [tensor(3, 40, 5)]),
    "negative slices": (lambda x: x[:, -3:] * x[:, :-4], [tensor(3, 7)]),
    "steps": (lambda x: x[:, ::3] + x[:, 2::3], [tensor(3, 9)]),
    "ragged steps": (lambda x: x[:, ::2], [tensor(3, 7)]),
    "class token": (class_token, [tensor(2, 5, 6), tensor(1, 1, 6)]),
    "pad": (lambda x: F.pad(x, (0, 0, 1, 2)), [tensor(2, 5, 6)]),
    "roll": (lambda x: torch.roll(x, (1, 2), (1, 2)), [tensor(2, 4, 4, 3)]),
    "flip": (lambda x: x.flip(1), [tensor(2, 5, 6)]),
    "squeeze": (lambda x: x.unsqueeze(1).squeeze(1).unsqueeze(-1).squeeze(), [tensor(3, 4)]),
    "expand": (lambda x: x[:, None].expand(3, 5, 4).reshape(15, 4), [tensor(3, 4)]),
    "repeat": (lambda x: x.repeat(2, 3), [tensor(3, 4)]),
    "repeat interleave": (lambda x: x.repeat_interleave(2, 1), [tensor(3, 4, 5)]),
    "movedim": (lambda x: x.movedim(0, 2).mT, [tensor(3, 4, 5)]),
    "merged patches": (merged_patches, [tensor(2, 4, 4, 3)]),
    "windows": (lambda x: x.view(2, 2, 2, 2, 2, 3).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 3), [tensor(2, 4, 4, 3)]),
    "two divisions": (lambda x: (x.view(2, 3, 4).sum(1), x.view(2, 4, 3).sum(1)), [tensor(2, 12)]),
    "a division of a division": (lambda x: (x.view(2, 4, 6).sum(1), x.view(2, 2, 2, 6).sum(2)), [tensor(2, 24)]),
    "sum": (lambda x: x.sum(1), [tensor(2, 5, 6)]),
    "sum of all": (lambda x: x.sum(), [tensor(2, 5, 6)]),
    "amax": (lambda x: x.amax((0, 2), keepdim=True), [tensor(2, 5, 6)]),
    "heads summed": (lambda x: heads(x).sum(1), [tensor(2, 5, 12)]),
    "cumsum": (lambda x: x.cumsum(1), [tensor(2, 5, 6)]),
    "argmax": (lambda x: x.argmax(-1), [tensor(5, 6)]),
    "sort": (lambda x: x.sort(-1).values, [tensor(5, 6)]),
    "embedding": (lambda w: F.embedding(torch.tensor([[1, 0], [3, 1]]), w), [tensor(4, 6)]),
    "index": (lambda x: x[:, torch.tensor([2, 0, 0])], [tensor(3, 4, 5)]),
    "index two": (lambda x: x[torch.tensor([[2, 0]]), :, torch.tensor([[1], [3]])], [tensor(3, 4, 5)]),
    "index by a mask": (lambda x: x.index_select(1, torch.tensor([1, 1, 0])), [tensor(3, 4, 5)]),
    "conv2d": (lambda x, w, b: F.conv2d(x, w, b, padding=1), [tensor(2, 4, 5, 5), tensor(6, 4, 3, 3), tensor(6)]),
    "depthwise": (lambda x, w: F.conv2d(x, w, groups=4), [tensor(2, 4, 5, 5), tensor(4, 1, 3, 3)]),
    "grouped": (lambda x, w: F.conv2d(x, w, groups=2), [tensor(2, 4, 5, 5), tensor(6, 2, 3, 3)]),
    "patches": (patches, [tensor(2, 3, 4, 4), tensor(5, 3, 2, 2)]),
    "max pool": (lambda x: F.max_pool2d(x, 2), [tensor(2, 3, 4, 4)]),
    "tied twice": (lambda x, w: F.linear(F.linear(x, w), w.t()), [tensor(3, 4), tensor(5, 4)]),
    "a square tied to itself": (lambda x, w: F.linear(F.linear(x, w), w), [tensor(3, 4), tensor(4, 4)]),
    "outer residual": (lambda x, w: x + F.linear(x, w), [tensor(3, 4), tensor(4, 4)]),
    "mixer": (lambda x, w: x + F.linear(x.transpose(1, 2), w).transpose(1, 2), [tensor(2, 5, 6), tensor(5, 5)]),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", CASES)
def test_free_orders_pass_through(name: str, seed: int) -> None:
    function, inputs = CASES[name]
    traced = run_traced(function, inputs)
    labels = random_labels(traced, seed)
    moved = [reordered(value, axes, traced, labels) for value, axes in traced.inputs]
    expected = [leaf for leaf in pytree.tree_leaves(function(*inputs)) if isinstance(leaf, torch.Tensor)]
    actual = [leaf for leaf in pytree.tree_leaves(function(*moved)) if isinstance(leaf, torch.Tensor)]
    assert len(actual) == len(expected) == len(traced.outputs)
    for got, plain, (_, axes) in zip(actual, expected, traced.outputs, strict=True):
        assert torch.equal(got, reordered(plain, axes, traced, labels))


def test_all_operators_of_the_cases_are_known() -> None:
    unknown = {name: traced.unknown for name, (f, inputs) in CASES.items() if (traced := run_traced(f, inputs)).unknown}
    assert unknown == {}
