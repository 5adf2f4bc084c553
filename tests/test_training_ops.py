"""What training adds to the operators: soft permutations, and listeners that get dense gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import padst_compile as padst
from padst_compile import permutation
from padst_compile.backend import padst as backend
from padst_compile.kernels import gradient_tap
from padst_compile.kernels.soft_permute import HARD, SOFT, soft_permute
from padst_compile.layers import LayerConfig, PermutedSparseLinear, SoftPermutation
from padst_compile.structures import Block, Shape, Unstructured, parse
from padst_compile.testing.training import STRUCTURES, batch, layers_of, loss_at, small_model
from padst_compile.training.collector import DenseGradient
from padst_compile.training.unit_scores import SampledScores, UnitScores

TURN = torch.tensor([2, 0, 1, 5, 3, 4, 6], dtype=torch.int32)  # its inverse is another permutation; odd in number
SIDES = ("input", "output")


def integers(*shape: int, seed: int = 0) -> torch.Tensor:
    """Whole numbers, whose sums and products are exact in float64 and, being few, in float32."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).double()


def flag(value: int) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.uint8)


def matrix_of(indices: torch.Tensor) -> torch.Tensor:
    return torch.eye(indices.numel())[indices.long()]


class Heard:
    """Adds up the gradients that a listener gets, in the dtype that they come in."""

    def __init__(self) -> None:
        self.total: torch.Tensor | None = None
        self.calls = 0

    def products(
        self, grad: torch.Tensor, x: torch.Tensor, rows: torch.Tensor | None = None, columns: torch.Tensor | None = None
    ) -> None:
        dense = grad.T @ x
        dense = dense if rows is None else dense[rows.long()]
        self.weight(dense if columns is None else dense[:, columns.long()])

    def weight(self, gradient: torch.Tensor) -> None:
        self.calls += 1
        self.total = gradient.clone() if self.total is None else self.total + gradient


# Soft permutations


@pytest.mark.parametrize("state", [SOFT, HARD])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_soft_permute_is_a_sound_operator(state: int, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 7, dtype=dtype, requires_grad=True)
    soft = torch.softmax(torch.randn(7, 7), 1)
    torch.library.opcheck(torch.ops.padst.soft_permute.default, (x, TURN, soft, flag(state)))
    torch.library.opcheck(torch.ops.padst.soft_permute_gradient.default, (x.detach(), x.detach(), TURN, soft, flag(state)))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("leading", [(5,), (2, 3), (0,), (2, 0), ()], ids=str)
def test_soft_permute_multiplies_by_the_matrix(leading: tuple[int, ...]) -> None:
    """`y[..., i] = Σ M[i, j] x[..., j]`, with the gradients of x and M that follow from it."""
    soft, x, cotangent = integers(7, 7), integers(*leading, 7, seed=1).requires_grad_(), integers(*leading, 7, seed=2)
    state, heard = flag(SOFT), Heard()
    gradient_tap.listen(state, heard)
    y = soft_permute(x, TURN, soft, state)
    (grad,) = torch.autograd.grad(y, x, cotangent)
    gradient_tap.forget(state)
    assert torch.equal(y, torch.einsum("ij,...j->...i", soft, x))
    assert torch.equal(grad, torch.einsum("ij,...i->...j", soft, cotangent))
    assert heard.total is not None
    assert torch.equal(heard.total, torch.einsum("ni,nj->ij", cotangent.reshape(-1, 7), x.detach().reshape(-1, 7)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_soft_and_hard_agree_exactly(dtype: torch.dtype) -> None:
    """Also on inputs that are not contiguous, and with a hard matrix that nobody may read any more."""
    x, cotangent = integers(7, 5).to(dtype).T, integers(7, 5, seed=1).to(dtype).T
    freed = torch.zeros(7, 7)
    freed.untyped_storage().resize_(0)
    results = []
    for soft, state in ((matrix_of(TURN), SOFT), (freed, HARD)):
        inputs = x.detach().requires_grad_()
        y = soft_permute(inputs, TURN, soft, flag(state))
        assert y.is_contiguous()
        results.append((y, *torch.autograd.grad(y, inputs, cotangent)))
    for soft_one, hard_one in zip(*results, strict=True):
        assert torch.equal(soft_one, hard_one)
    assert torch.equal(results[0][0], x[:, TURN.long()])


def test_a_hard_permutation_tells_listeners_nothing() -> None:
    state, heard = flag(HARD), Heard()
    gradient_tap.listen(state, heard)
    soft_permute(torch.ones(2, 7, requires_grad=True), TURN, torch.zeros(7, 7), state).sum().backward()
    gradient_tap.forget(state)
    assert heard.calls == 0


@pytest.mark.parametrize("side", SIDES)
def test_layers_with_soft_permutations_under_autocast(side: str) -> None:
    """The output has the autocast dtype and is as accurate as that allows; gradients arrive in float32."""
    layer = permuted_layer("block:4", side, torch.float32)
    assert layer.permutation is not None
    size = layer.permutation.numel()
    layer.soft = SoftPermutation(torch.softmax(torch.randn(size, size), 1), flag(SOFT))
    x = torch.randn(9, layer.in_features)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    exact = layer(x)
    assert (y - exact).abs().max() <= 8 * torch.finfo(torch.bfloat16).eps * exact.abs().max()
    y.float().sum().backward()
    assert layer.values.grad is not None
    assert layer.values.grad.dtype == torch.float32


@pytest.mark.parametrize("side", SIDES)
def test_hardening_compiles_nothing(side: str) -> None:
    layer = permuted_layer("block:4", side)
    assert layer.permutation is not None
    matrix = matrix_of(layer.permutation.long().argsort())  # not what the permutation says, so that the two can be told apart
    layer.soft = SoftPermutation(matrix, flag(SOFT))
    compiled = torch.compile(layer, backend=backend)
    x = integers(6, layer.in_features)
    counters.clear()
    soft = compiled(x)
    soft.sum().backward()
    programs = counters["stats"]["unique_graphs"]
    assert programs == 1
    assert torch.equal(soft, layer(x))
    layer.soft.state.fill_(HARD)
    matrix.untyped_storage().resize_(0)
    hard = compiled(x)
    hard.sum().backward()
    assert counters["stats"]["unique_graphs"] == programs
    assert torch.equal(hard, layer(x))
    layer.soft = None
    assert torch.equal(hard, layer(x))
    assert not torch.equal(hard, soft)


# Listeners


def permuted_layer(structure: str, side: str | None, dtype: torch.dtype = torch.float64) -> PermutedSparseLinear:
    """A layer of 24 inputs and 16 outputs with weights of whole numbers."""
    family, shape = parse(structure), Shape(16, 24)
    if structure == "diagonal:4":
        shape = Shape(12, 24)
    natural = family.natural_sparsity()
    topology = family.choose(integers(shape.out_features, shape.in_features).abs(), 0.5 if natural is None else natural)
    values = nn.Parameter(family.pack(integers(shape.out_features, shape.in_features, seed=1).to(dtype), topology))
    table = None
    if side is not None:
        size = shape.in_features if side == "input" else shape.out_features
        table = torch.arange(size, dtype=torch.int32).roll(5)
        table[[0, 1]] = table[[1, 0]]
        assert not torch.equal(table, permutation.inverse(table))
    bias = nn.Parameter(integers(shape.out_features, seed=2).to(dtype))
    return PermutedSparseLinear(LayerConfig(shape, family, side), values, topology, table, bias)  # type: ignore[arg-type]  # a side


def dense_gradient(layer: PermutedSparseLinear, x: torch.Tensor, cotangent: torch.Tensor) -> torch.Tensor:
    """Of S, active or not, by autograd of `y = S Π x + b` or `y = Π S x + b` with dense matrices."""
    weight = layer.config.structure.unpack(layer.values.detach(), layer.topology, layer.config.shape).requires_grad_()
    matrix = None if layer.permutation is None else matrix_of(layer.permutation).to(x.dtype)
    side = layer.config.permuted
    y = F.linear(x if side != "input" else x @ matrix.T, weight)  # type: ignore[union-attr]  # there is one
    y = y if side != "output" else y @ matrix.T  # type: ignore[union-attr]  # there is one
    (gradient,) = torch.autograd.grad(y, weight, cotangent)
    return gradient


def programs(layer: nn.Module) -> dict[str, Callable[[torch.Tensor], Any]]:
    """Ways to run a layer."""
    ways: dict[str, Callable[[torch.Tensor], Any]] = {"eager": layer}
    for kernels in ("sparse", "dense"):
        torch._dynamo.reset()
        ways[kernels] = torch.compile(layer, backend=backend, options={"kernels": kernels})
    return ways


@pytest.mark.parametrize("side", [None, *SIDES], ids=str)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_listeners_get_the_dense_gradient_of_s(structure: str, side: str | None) -> None:
    """In eager and compiled programs, those that run the layer dense too, whether compiled before or after; exactly."""
    layer = permuted_layer(structure, side)
    x, cotangent = integers(2, 3, layer.in_features, seed=3), integers(2, 3, layer.out_features, seed=4)
    exact = dense_gradient(layer, x, cotangent)
    active = layer.config.structure.pack(exact, layer.topology)
    for way, program in programs(layer).items():
        program(x.clone().requires_grad_()).backward(cotangent)  # compiled before anyone listens
        heard = Heard()
        gradient_tap.listen(layer.topology[0], heard)
        layer.zero_grad()
        program(x.clone().requires_grad_()).backward(cotangent)
        gradient_tap.forget(layer.topology[0])
        assert heard.total is not None, way
        assert torch.equal(heard.total, exact), way
        assert heard.calls == 1
        assert torch.equal(layer.values.grad, active), way  # type: ignore[arg-type]  # a tensor after backward
        program(x.clone().requires_grad_()).backward(cotangent)
        assert heard.calls == 1, f"{way}: told after it was forgotten"


def test_listeners_hear_only_of_their_own_layer() -> None:
    first, second = permuted_layer("block:4", None), permuted_layer("block:4", None)
    heard = Heard()
    gradient_tap.listen(first.topology[0], heard)
    second(integers(3, 24)).sum().backward()
    assert heard.calls == 0
    gradient_tap.forget(first.topology[0])
    gradient_tap.forget(first.topology[0])  # twice does no harm


def test_a_listener_hears_each_backward_pass_and_each_use() -> None:
    layer, heard = permuted_layer("nm:1:4", "input"), Heard()
    x, cotangent = integers(3, 24), integers(3, 16, seed=1)
    gradient_tap.listen(layer.topology[0], heard)
    for _ in range(2):
        layer(x).backward(cotangent)
    (layer(x) + layer(2 * x)).backward(cotangent)
    gradient_tap.forget(layer.topology[0])
    assert torch.equal(heard.total, 5 * dense_gradient(layer, x, cotangent))  # type: ignore[arg-type]  # heard


@pytest.mark.parametrize("structure", STRUCTURES)
def test_listeners_get_zeros_of_no_tokens(structure: str) -> None:
    layer, heard = permuted_layer(structure, "output"), Heard()
    gradient_tap.listen(layer.topology[0], heard)
    layer(torch.zeros(0, layer.in_features, dtype=torch.float64)).sum().backward()
    gradient_tap.forget(layer.topology[0])
    assert torch.equal(heard.total, torch.zeros(layer.out_features, layer.in_features, dtype=torch.float64))  # type: ignore[arg-type]  # heard


def test_listeners_under_autocast_get_gradients_in_its_dtype() -> None:
    layer = permuted_layer("block:4", "input", torch.float32)
    heard = Heard()
    x, cotangent = integers(3, 24).float(), integers(3, 16, seed=1).bfloat16()
    gradient_tap.listen(layer.topology[0], heard)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.backward(cotangent)
    gradient_tap.forget(layer.topology[0])
    assert heard.total is not None
    assert heard.total.dtype == torch.bfloat16
    # sums of three products of whole numbers below 16 are exact in bfloat16
    assert torch.equal(heard.total.double(), dense_gradient(layer, x, cotangent.float()).double())


def test_frozen_values_tell_nothing() -> None:
    layer, heard = permuted_layer("block:4", None), Heard()
    layer.values.requires_grad_(False)
    gradient_tap.listen(layer.topology[0], heard)
    layer(integers(3, 24).requires_grad_()).sum().backward()
    gradient_tap.forget(layer.topology[0])
    assert heard.calls == 0


# What the runtime listens to


class Keep:
    """A reducer that keeps the parts of one gradient, which come in order."""

    def __init__(self) -> None:
        self.parts: list[torch.Tensor] = []
        self.whole: torch.Tensor | None = None

    def add(self, part: torch.Tensor, begin: int) -> None:
        assert begin == sum(map(len, self.parts))
        self.parts.append(part.clone())

    def end(self) -> None:
        self.whole, self.parts = torch.cat(self.parts), []

    def clear(self) -> None:
        self.whole, self.parts = None, []

    def to(self, device: torch.device) -> None:
        """Stays."""


@pytest.mark.parametrize("permuted", [False, True])
def test_reducers_get_the_gradient_and_its_magnitudes_in_parts(permuted: bool) -> None:
    magnitude, signed = Keep(), Keep()
    grad, x = integers(5, 100), integers(5, 24, seed=1)
    around = (torch.randperm(100), torch.randperm(24)) if permuted else (None, None)
    listener = DenseGradient((magnitude,), (signed,))
    listener.products(grad, x, *around)
    exact = (grad.T @ x).float()
    exact = exact[around[0]][:, around[1]] if permuted else exact
    assert signed.whole is not None
    assert magnitude.whole is not None
    assert torch.equal(signed.whole, exact)
    assert torch.equal(magnitude.whole, exact.abs())
    given = integers(100, 24, seed=2).float()
    untouched = given.clone()
    listener.weight(given)
    assert torch.equal(given, untouched)  # the op that hands it on goes on using it
    assert torch.equal(magnitude.whole, untouched.abs())
    assert not listener.poisoned


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("listens", ["the sample alone", "others, too"])
def test_a_sample_takes_its_rows_and_others_all_of_the_gradient(permuted: bool, listens: str) -> None:
    keep, rows, shape = Keep(), torch.tensor([1, 4, 15]), Shape(16, 24)
    grad, x = integers(5, 16), integers(5, 24, seed=1)
    around = (torch.randperm(16), torch.randperm(24)) if permuted else (None, None)
    sample = SampledScores(Unstructured(), "l1", shape, rows)
    listener = DenseGradient((), (keep,) if listens == "others, too" else (), sample)
    listener.products(grad, x, *around)
    whole = (grad.T @ x).float()
    whole = whole if around[0] is None else whole[around[0]][:, around[1]]
    expected = whole[rows].abs()
    assert sample.total is not None
    assert torch.equal(sample.total, expected)
    assert listens == "the sample alone" or (keep.whole is not None and torch.equal(keep.whole, whole))
    listener.clear()
    listener.weight(whole)  # of a layer that runs dense
    assert torch.equal(sample.total, expected)


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("tokens", [0, 1000])
@pytest.mark.usefixtures("poisoned_memory")
def test_a_permuted_gradient_takes_no_permuted_copy_of_what_it_is_made_of(tokens: int, rows: bool, columns: bool) -> None:
    operands = integers(tokens, 300), integers(tokens, 200, seed=1)
    grad, x = (operand.float() for operand in operands)
    places = {operand.untyped_storage().data_ptr() for operand in (grad, x)}

    class Largest(TorchDispatchMode):
        nbytes = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in places:
                self.nbytes = max(self.nbytes, result.nbytes)
            return result

    order, other = torch.randperm(300), torch.randperm(200)
    with Largest() as largest:
        got = gradient_tap.product(grad, x, order.int() if rows else None, other.int() if columns else None)
    exact = operands[0].T @ operands[1]
    exact = exact[order] if rows else exact
    assert torch.equal(got.double(), exact[:, other] if columns else exact)
    assert got.dtype == torch.float32
    assert largest.nbytes <= max(got.nbytes, 32 * 4 * tokens if rows else 0)


@pytest.mark.parametrize("rows", [None, torch.arange(64).flip(0)], ids=["as it is", "permuted"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_nothing_is_left_of_gradients_if_one_is_not_finite(poison: float, rows: torch.Tensor | None) -> None:
    """Wherever the entry lies, however much was added up before, and whatever comes until that is known to be in vain."""
    keep, sums = Keep(), UnitScores(Block(8), "l2", Shape(64, 4))
    sample = SampledScores(Block(8), "l1", Shape(64, 4), torch.arange(8))
    listener = DenseGradient((sums,), (keep,), sample)
    good, x = torch.ones(2, 64), torch.ones(2, 4)
    bad = good.clone()
    bad[0, 40] = poison
    listener.products(good, x, rows)
    assert not listener.poisoned
    assert all(each is not None for each in (keep.whole, sums.total, sample.total))
    for grad in (bad, good):
        listener.products(grad, x, rows)
        assert listener.poisoned
        assert all(each is None for each in (keep.whole, sums.total, sample.total))
    listener.clear()
    listener.products(good, x, rows)
    assert not listener.poisoned
    assert keep.whole is not None


@pytest.mark.parametrize("method", ["rigl", "set"])
def test_the_runtime_listens_before_updates_that_need_it_alone(method: str) -> None:
    """And never after `finalize`."""
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    padst.attach(model, optimizer, padst.DSTConfig(method=method, interval=4, total_steps=20, end=0.5))
    listened = []
    for step in range(1, 13):
        listened.append([gradient_tap.listener_of(layer.topology) is not None for layer in layers_of(model)])
        loss_at(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    due = [step in (4, 8) and method == "rigl" for step in range(1, 13)]
    assert listened == [[now, now] for now in due]


@pytest.mark.parametrize("learned", ["autoshuffle", "sinkhorn_ste", "regroup"])
def test_nobody_listens_after_finalize(learned: str) -> None:
    before = len(gradient_tap._listeners)
    model = small_model(permutation="learned")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    learning = padst.LearnedPermutation(method=learned, interval=1, deadline=1.0)
    padst.attach(model, optimizer, padst.DSTConfig(interval=2, total_steps=20, permutation=learning))
    assert len(gradient_tap._listeners) > before
    padst.finalize(model)
    assert len(gradient_tap._listeners) == before
    assert all(layer.soft is None for layer in layers_of(model))
    x, _ = batch(0)
    model(x).sum().backward()
    optimizer.step()  # no hook is left
    assert len(gradient_tap._listeners) == before
