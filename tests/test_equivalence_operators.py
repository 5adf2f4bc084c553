"""Operators on residues: exact ones against PyTorch on whole numbers, the others by the laws that they must keep."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import padst_compile as padst
from padst_compile.equivalence.field import from_floats
from padst_compile.equivalence.registry import DEFINITIONS, PRIMITIVES
from padst_compile.errors import DataDependentError, RandomOperationError, UnsupportedOperationError
from padst_compile.kernels import dispatch
from padst_compile.structures import NM, Block, Diagonal, Shape, Structure

Function = Callable[..., Any]


class Wrapped(nn.Module):
    """A function as a module."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


def same(one: Function, other: Function, *inputs: Any) -> padst.Verification:
    return padst.verify(Wrapped(one), Wrapped(other), *inputs, seeds=(0,))


def whole(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).double()


def exact(function: Function, *tensors: torch.Tensor) -> bool:
    """Whether a function of whole numbers has the residues of what PyTorch computes."""
    expected = function(*tensors)

    def on_residues(any_number: torch.Tensor) -> Any:
        return function(*(tensor + 0 * any_number for tensor in tensors))

    return bool(same(on_residues, lambda _: expected, torch.zeros((), dtype=torch.float64)))


# --- exact operators ---

EXACT: dict[str, tuple[Function, list[tuple[int, ...]]]] = {
    "add with alpha": (lambda x, y: torch.add(x, y, alpha=3), [(3, 4), (4,)]),
    "sub and rsub": (lambda x, y: 7 - torch.sub(x, y, alpha=2), [(3, 4), (3, 1)]),
    "mul, neg and square": (lambda x, y: -(x * y).square(), [(3, 4), (4,)]),
    "powers": (lambda x: x**3 + x**2 + x.pow(5) + x**0, [(3, 4)]),
    "division by a power of two": (lambda x: x / 8 + x / torch.tensor(0.5), [(3, 4)]),
    "sum": (lambda x: (x.sum(), x.sum(1), x.sum((0, -1), keepdim=True)), [(2, 3, 4)]),
    "mean": (lambda x: (x.mean(), x.mean(1), x.mean((0, 2), keepdim=True)), [(2, 4, 8)]),
    "cumsum": (lambda x: x.cumsum(1), [(3, 5)]),
    "var": (lambda x: (x.var(1, correction=0), x.var((0, 1), correction=16), torch.var_mean(x, 0, correction=2)), [(4, 8)]),
    "mm": (lambda x, y: x @ y, [(3, 4), (4, 5)]),
    "bmm": (torch.bmm, [(2, 3, 4), (2, 4, 5)]),
    "matmul with a broadcast batch": (torch.matmul, [(2, 1, 3, 4), (5, 4, 2)]),
    "mv and dot": (lambda x, y: x.mv(y).sum() + y.dot(y), [(3, 4), (4,)]),
    "addmm": (lambda b, x, y: torch.addmm(b, x, y, beta=2, alpha=3), [(5,), (3, 4), (4, 5)]),
    "baddbmm": (torch.baddbmm, [(2, 3, 5), (2, 3, 4), (2, 4, 5)]),
    "einsum": (lambda x, y: torch.einsum("bij,bjk->bki", x, y), [(2, 3, 4), (2, 4, 5)]),
    "linear": (F.linear, [(2, 3, 4), (5, 4), (5,)]),
    "bilinear forms": (lambda x, y: torch.addcmul(x, x, y, value=2) + torch.lerp(x, y, 0.5), [(3, 4), (3, 4)]),
    "conv2d": (lambda x, w, b: F.conv2d(x, w, b, stride=2, padding=1), [(2, 4, 6, 6), (8, 4, 3, 3), (8,)]),
    "depthwise conv2d": (lambda x, w: F.conv2d(x, w, groups=4, padding="same"), [(2, 4, 6, 6), (4, 1, 3, 3)]),
    "conv1d": (lambda x, w: F.conv1d(x, w, dilation=2), [(2, 4, 9), (3, 4, 3)]),
    "average pooling": (lambda x: F.avg_pool2d(x, 2) + F.adaptive_avg_pool2d(x, 2), [(2, 3, 4, 4)]),
    "adaptive pooling to one": (lambda x: F.adaptive_avg_pool2d(x, 1) + F.adaptive_avg_pool1d(x[0], 1), [(2, 3, 4, 4)]),
}  # fmt: skip

MOVING: dict[str, tuple[Function, list[tuple[int, ...]]]] = {
    "view and reshape": (lambda x: x.view(4, 6).reshape(2, -1).flatten().unflatten(0, (3, 8)), [(2, 3, 4)]),
    "transpose, permute and movedim": (lambda x: x.transpose(0, 1).permute(2, 0, 1).movedim(0, 2).mT.contiguous(), [(2, 3, 4)]),
    "slice, select and narrow": (lambda x: x[:, 1:, ::2][0] + x.narrow(2, 0, 2)[1, :2] + x[..., -1:][0, 1], [(2, 3, 4)]),
    "expand and repeat": (lambda x: x.expand(5, 3, 4).repeat(1, 2, 1).repeat_interleave(2, 0), [(1, 3, 4)]),
    "cat, stack and chunk": (lambda x: torch.cat([*torch.stack([x, x + 1]).chunk(2)], -1), [(2, 3, 4)]),
    "split and unbind": (lambda x: (*x.split(2, -1), *x.split([1, 2], 1), *x.unbind(0)), [(2, 3, 4)]),
    "roll, flip and rot90": (lambda x: x.roll((1, 2), (1, 2)).flip(0).rot90(1, (1, 2)), [(2, 3, 4)]),
    "index": (lambda x: x[:, torch.tensor([2, 0]), torch.tensor([[1], [3]])], [(2, 3, 4)]),
    "mask by constants": (lambda x: x[torch.tensor([True, False])], [(2, 3, 4)]),
    "index_select and gather": (
        lambda x: x.index_select(1, torch.tensor([2, 2])).gather(2, torch.ones(2, 2, 3).long()),
        [(2, 3, 4)],
    ),
    "embedding": (lambda w: F.embedding(torch.tensor([[1, 0], [2, 2]]), w), [(3, 4)]),
    "where": (
        lambda x, y: torch.where(torch.tensor([True, False, True, False]), x, y) + torch.where(torch.eq(x, x), 1.0, 2),
        [(3, 4), (3, 4)],
    ),
    "masked_fill": (lambda x: x.masked_fill(torch.eye(3).bool(), -2.5), [(3, 3)]),
    "pad": (lambda x: F.pad(x, (1, 2, 0, 1), value=3.0), [(2, 3)]),
    "tril and triu": (lambda x: x.tril() - x.triu(1) + x.diagonal().diag_embed(), [(3, 3)]),
    "unfold": (lambda x: x.unfold(1, 3, 2), [(2, 9)]),
    "scatter": (
        lambda x, y: x.scatter(1, torch.tensor([[2, 0], [1, 2]]), y).scatter(0, torch.zeros(1, 2).long(), 1.5),
        [(2, 3), (2, 2)],
    ),
    "pixel shuffle": (lambda x: F.pixel_shuffle(x, 2), [(1, 8, 3, 3)]),
    "squeeze": (lambda x: x.unsqueeze(1).squeeze(1).squeeze(), [(1, 3, 4)]),
    "like": (lambda x: torch.ones_like(x) + x.new_full((3, 4), 2.5) - torch.full_like(x, 0.5) + torch.zeros_like(x), [(3, 4)]),
    "logic": (lambda x: torch.where((torch.eq(x, x) & ~torch.ne(x, x)).all(), x, -x), [(3, 4)]),
}


@pytest.mark.parametrize("name", [*EXACT, *MOVING])
def test_whole_numbers_have_the_residues_of_what_pytorch_computes(name: str) -> None:
    function, shapes = {**EXACT, **MOVING}[name]
    assert exact(function, *(whole(*shape, seed=number) for number, shape in enumerate(shapes)))


def written_by_slices(x: torch.Tensor) -> torch.Tensor:
    y = x.new_zeros(3, 4)
    y[:, 1:] = x[:, :3]
    y[1] += x[0]
    y.select(1, 0).fill_(2.0)
    y[:, torch.tensor([3])] = -1.0
    y.view(-1)[5:7].mul_(3).add_(1, alpha=2)
    return y.copy_(y.flip(0)).masked_fill_(torch.eye(3, 4).bool(), 5.0)


def test_writes_in_place_reach_what_they_should() -> None:
    assert exact(written_by_slices, whole(3, 4))


# --- laws ---

X = torch.empty(3, 8)
ROOT = math.sqrt(2 / math.pi)


def by_hand_attention(q: Any, k: Any, v: Any) -> Any:
    scores = (q * 8**-0.5) @ k.mT + torch.full((4, 4), -math.inf).triu(1)
    return scores.softmax(-1) @ v


def norm_by_hand(x: Any) -> Any:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()


EQUAL: dict[str, tuple[Function, Function, list[torch.Tensor]]] = {
    "tanh gate": (lambda x: 0.5 * x * (1 + torch.tanh(x)), lambda x: x * torch.sigmoid(2 * x), [X]),
    "gelu_new": (
        lambda x: 0.5 * x * (1 + torch.tanh(ROOT * (x + 0.044715 * x.pow(3.0)))),
        lambda x: F.gelu(x, approximate="tanh"),
        [X],
    ),
    "gelu_fast": (
        lambda x: 0.5 * x * (1 + torch.tanh(x * 0.7978845608 * (1 + 0.044715 * x * x))),
        lambda x: F.gelu(x, approximate="tanh"),
        [X],
    ),
    "gelu": (lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2.0))), F.gelu, [X]),
    "gelu is odd up to the identity": (lambda x: F.gelu(x) - F.gelu(-x), lambda x: x, [X]),
    "silu": (lambda x: x * x.sigmoid(), F.silu, [X]),
    "sigmoid of the opposite": (lambda x: 1 - x.sigmoid(), lambda x: (-x).sigmoid(), [X]),
    "tanh of the opposite": (lambda x: -x.tanh(), lambda x: (-x).tanh(), [X]),
    "relu": (lambda x: x.clamp(min=0), F.relu, [X]),
    "relu of the opposite": (lambda x: x.relu() - (-x).relu(), lambda x: x, [X]),
    "relu6": (F.relu6, lambda x: x.clamp(0, 6), [X]),
    "leaky relu": (lambda x: x.relu() - 0.25 * (-x).relu(), lambda x: F.leaky_relu(x, 0.25), [X]),
    "hardswish": (lambda x: x * F.relu6(x + 3) / 6, F.hardswish, [X]),
    "maximum": (lambda x: torch.maximum(x, x[0]), lambda x: torch.maximum(x[0], x), [X]),
    "order": (lambda x: (x > x[0]) & (x[0] > x), lambda x: torch.ne(x, x), [X]),
    "glu": (lambda x: x[:, :4] * x[:, 4:].sigmoid(), F.glu, [X]),
    "softmax": (lambda x: x.exp() / x.exp().sum(-1, keepdim=True), lambda x: x.softmax(-1), [X]),
    "log softmax": (lambda x: x - x.logsumexp(-1, keepdim=True), lambda x: x.log_softmax(-1), [X]),
    "root": (lambda x: 1 / x.sqrt() + x**1.5, lambda x: x.rsqrt() + x.sqrt() ** 3, [X]),
    "layer norm": (norm_by_hand, lambda x: F.layer_norm(x, (8,)), [X]),
    "native layer norm": (lambda x: torch.native_layer_norm(x, (8,), None, None, 1e-5)[0], norm_by_hand, [X]),
    "rms norm": (
        lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
        lambda x: F.rms_norm(x, (8,), eps=1e-6),
        [X],
    ),
    "group norm": (lambda x: F.layer_norm(x.view(3, 2, 4), (4,)).view(3, 8), lambda x: F.group_norm(x, 2), [X]),
    "batch norm": (lambda x: (x - x[0]) / (x[1] + 1e-5).sqrt(), lambda x: F.batch_norm(x, x[0], x[1]), [X]),
    "normalize": (lambda x: x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12), lambda x: F.normalize(x, dim=-1), [X]),
    "attention": (
        by_hand_attention,
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        [torch.empty(2, 4, 8)] * 3,
    ),
    "attention with a mask": (
        lambda q: F.scaled_dot_product_attention(q, q, q, torch.ones(4, 4).tril().bool()),
        lambda q: F.scaled_dot_product_attention(
            q, q, q, torch.zeros(4, 4).masked_fill(torch.ones(4, 4).triu(1).bool(), -math.inf)
        ),
        [torch.empty(2, 4, 8)],
    ),
    "grouped queries": (
        lambda q, k: F.scaled_dot_product_attention(q, k, k, enable_gqa=True),
        lambda q, k: F.scaled_dot_product_attention(q, k[:, [0, 0, 1, 1]], k[:, [0, 0, 1, 1]]),
        [torch.empty(1, 4, 3, 8), torch.empty(1, 2, 3, 8)],
    ),
    "masked scores weigh nothing": (
        lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True)[:, :2],
        lambda q: F.scaled_dot_product_attention(q[:, :2], q[:, :2], q[:, :2], is_causal=True),
        [torch.empty(2, 4, 8)],
    ),
    "max pooling ignores order": (
        lambda x: F.max_pool2d(x, 2),
        lambda x: F.max_pool2d(x.flip(2, 3), 2).flip(2, 3),
        [torch.empty(1, 2, 4, 4)],
    ),
    "patches": (
        lambda x, w: F.conv2d(x, w, stride=4),
        lambda x, w: F.linear(x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3), w.flatten(1)).permute(
            0, 3, 1, 2
        ),
        [torch.empty(2, 3, 8, 8), torch.empty(5, 3, 4, 4)],
    ),
    "dropout at rest": (lambda x: F.dropout(x, 0.5, training=False), lambda x: F.dropout(x, 0.0), [X]),
    "casts": (lambda x: x.double().half().float(), lambda x: x, [X]),
    "position tables": (lambda x: x + torch.arange(8).float().cos(), lambda x: torch.arange(8).float().cos() + x, [X]),
}


@pytest.mark.parametrize("name", EQUAL)
def test_two_ways_to_write_a_function_are_equal(name: str) -> None:
    one, other, inputs = EQUAL[name]
    same(one, other, *inputs).raise_if_different()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.exp, torch.erf),
        (torch.sigmoid, torch.tanh),
        (F.gelu, lambda x: F.gelu(x, approximate="tanh")),
        (F.silu, lambda x: x * torch.sigmoid(1.702 * x)),
        (lambda x: F.leaky_relu(x, 0.1), lambda x: F.leaky_relu(x, 0.2)),
        (lambda x: x.clamp(-1, 1), lambda x: x.clamp(-1, 2)),
        (lambda x: x.softmax(0), lambda x: x.softmax(1)),
        (lambda x: F.layer_norm(x, (8,), eps=1e-5), lambda x: F.layer_norm(x, (8,), eps=1e-6)),
        (lambda x: F.layer_norm(x, (8,)), lambda x: F.rms_norm(x, (8,))),
        (lambda x: x**1.25, lambda x: x**1.75),
        (lambda x: x / 3, lambda x: x * 0.33),
        (lambda x: x * 0.1, lambda x: x * 0.1000001),
        (lambda x: x / 0, lambda x: 2 * x / 0),
        (lambda x: x > 0, lambda x: x < 0),
        (lambda x: x.amax(1), lambda x: x[:, 1:].amax(1)),
        (lambda x: x.amax(1), lambda x: x.amin(1)),
        (lambda x: F.max_pool2d(x[None], 3, 1, 1), lambda x: F.max_pool2d(F.pad(x[None], (1, 1, 1, 1)), 3, 1)),
        (lambda x: x.float(), lambda x: x.double()),
        (lambda x: x, lambda x: x.unsqueeze(0)),
    ],
)
def test_different_functions_differ(one: Function, other: Function) -> None:
    assert not same(one, other, X)


@pytest.mark.parametrize("function", [F.layer_norm, F.rms_norm])
def test_norms_commute_with_permutations(function: Function) -> None:
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    one = lambda x: function(x, (8,))[:, order]  # noqa: E731
    assert same(one, lambda x: function(x[:, order], (8,)), X)


def test_every_registered_operator_exists() -> None:
    for name in [*PRIMITIVES, *DEFINITIONS]:
        namespace, _, operator = name.partition("::")
        if namespace == "aten":
            packet = getattr(torch.ops.aten, operator.partition(".")[0])
            assert not operator.partition(".")[2] or operator.partition(".")[2] in packet.overloads()


# --- our own operators ---


@pytest.mark.parametrize("structure", [Block((4, 2)), NM(2, 4, 2), Diagonal()])
def test_our_operators_follow_their_definition(structure: Structure) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = whole(12, 8)
    topology = structure.choose(weight.abs(), structure.natural_sparsity() or 0.5)
    values, bias = structure.pack(weight, topology), whole(12, seed=1)
    tables = [torch.randperm(size, generator=generator).int() for size in (8, 12)]
    name, shape = structure.to_string(), Shape(12, 8)

    def sparse(x: Any) -> Any:
        return torch.ops.padst.structured_linear(x, values, list(topology), bias, *tables, 12, name)

    def dense(x: Any) -> Any:
        product = F.linear(torch.ops.padst.permute(x, tables[0]), structure.unpack(values, topology, shape))
        return torch.ops.padst.permute(product, tables[1]) + bias

    x = torch.empty(5, 8, dtype=torch.float64)
    assert same(sparse, dense, x)
    assert not same(sparse, lambda x: dense(x.flip(-1)), x)


@pytest.mark.parametrize("structure", [Block((4, 2)), NM(2, 4, 2), Diagonal()])
def test_native_operators_follow_their_definition(structure: Structure) -> None:
    if not dispatch.has_native_kernel(structure, torch.device("cpu"), torch.float32):
        pytest.skip("no native kernels: no compiler, or another processor")
    weight = whole(12, 8).float()
    topology = structure.choose(weight.abs(), structure.natural_sparsity() or 0.5)
    values, bias = structure.pack(weight, topology), whole(12, seed=1).float()
    table = torch.randperm(8, generator=torch.Generator().manual_seed(0)).int()
    native, sizes = dispatch.native_op(structure), dispatch.native_sizes(structure)
    sparse = torch.ops.padst.structured_linear

    one = lambda x: native(x, values, *topology, bias, table, None, 12, *sizes)  # noqa: E731
    assert same(one, lambda x: sparse(x, values, list(topology), bias, table, None, 12, structure.to_string()), X)


@pytest.mark.parametrize(
    ("activation", "function"),
    [("none", lambda y: y), ("relu", F.relu), ("gelu", F.gelu), ("silu", F.silu),
     ("gelu_tanh", lambda y: F.gelu(y, approximate="tanh"))],
)  # fmt: skip
def test_an_epilogue_is_an_activation_a_gate_and_a_residual(activation: str, function: Function) -> None:
    structure, weight, bias = NM(2, 4), whole(12, 8).float(), whole(12, seed=1).float()
    topology = structure.choose(weight.abs(), 0.5)
    values = structure.pack(weight, topology)
    definition = DEFINITIONS["padst_native::nm_linear"]

    def fused(x: Any, y: Any, gate: Any) -> Any:
        return definition(x, values, *topology, bias, None, None, 12, 2, 4, activation, y, gate)

    def apart(x: Any, y: Any, gate: Any) -> Any:
        return y + function(F.linear(x, structure.unpack(values, topology, Shape(12, 8)), bias)) * gate

    others = (torch.empty(3, 12), torch.empty(3, 12))
    assert same(fused, apart, X, *others)
    assert not same(lambda x, y, gate: fused(x, None, gate), apart, X, *others)
    assert not same(lambda x, y, gate: fused(x, y, None), apart, X, *others)


# --- what is refused ---


@pytest.mark.parametrize(
    ("function", "error", "operator"),
    [
        (lambda x: x.topk(2).values, DataDependentError, "aten::topk"),
        (lambda x: x.sort().values, DataDependentError, "aten::sort"),
        (lambda x: x.argmax(-1), DataDependentError, "aten::argmax"),
        (lambda x: x * x.sum().item(), DataDependentError, "aten::(item|_local_scalar_dense)"),
        (lambda x: x if x.sum() > 0 else -x, DataDependentError, "aten::"),
        (lambda x: x[x > 0], UnsupportedOperationError, "aten::index"),
        (lambda x: x.long(), DataDependentError, "aten::_to_copy to torch.int64"),
        (F.dropout, RandomOperationError, "aten::dropout"),
        (lambda x: x + torch.rand(8), RandomOperationError, "aten::rand"),
        (lambda x: torch.rand_like(x) + x, RandomOperationError, "aten::rand_like"),
        (lambda x: x + x.new_empty(8).normal_(), RandomOperationError, "aten::normal_"),
        (lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.1), UnsupportedOperationError, "scaled_dot_product"),
        (lambda x: F.batch_norm(x, None, None, training=True), UnsupportedOperationError, "aten::batch_norm"),
        (lambda x: F.conv_transpose1d(x[None], x[None, :3].mT.new_ones(3, 2, 2)), UnsupportedOperationError, "transposed"),
        (lambda x: torch.linalg.inv(x[:, :3]), UnsupportedOperationError, "aten::linalg_inv"),
        (torch.fft.fft, UnsupportedOperationError, "aten::_fft"),
        (lambda x: torch.zeros(3, 8).copy_(x), UnsupportedOperationError, "aten::copy_"),
        (lambda x: F.avg_pool2d(x[None], 2, divisor_override=3), UnsupportedOperationError, "fewer entries"),
        (lambda x: F.avg_pool2d(x[None], 2, padding=1, count_include_pad=False), UnsupportedOperationError, "fewer entries"),
        (lambda x: x.round(decimals=2), UnsupportedOperationError, "aten::round"),
        (lambda x: x.prod(), UnsupportedOperationError, "aten::prod"),
        (lambda x: torch.div(x, 3, rounding_mode="floor"), UnsupportedOperationError, "rounding_mode='floor'"),
    ],
)  # fmt: skip
def test_what_residues_cannot_tell_is_refused_by_name(function: Function, error: type[Exception], operator: str) -> None:
    with pytest.raises(error, match=operator):
        same(function, function, X)


def test_values_outside_of_a_verification_are_of_no_use() -> None:
    kept: list[torch.Tensor] = []
    same(lambda x: kept.append(x) or x, lambda x: x, X)  # type: ignore[func-returns-value]  # keeps what it sees
    with pytest.raises(RuntimeError, match="outside an Evaluator"):
        kept[0] + 1


def test_residues_of_plain_tensors_are_exact() -> None:
    table = torch.randn(8)
    assert same(lambda x: x * 0 + table, lambda x: table + 0 * x, X)
    assert from_floats(table).shape == table.shape
