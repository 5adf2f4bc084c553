"""What is kept of index tensors between calls, and when it is made anew."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from padst_compile import permutation
from padst_compile.kernels import dispatch, remembered
from padst_compile.kernels.structured_linear import structured_linear
from padst_compile.structures import NM, Block, Diagonal, Shape, Structure

CASES = (
    (Block(16), Shape(48, 32), 5),
    (NM(1, 4), Shape(33, 40), 5),
    (NM(1, 4, vector=16), Shape(32, 40), 5),
    (Diagonal(), Shape(24, 33), 5),
    (Diagonal(group=16), Shape(64, 32), 512),  # enough tokens to run as blocks
)
INDEX_WORK = {"aten::arange", "aten::argsort", "aten::repeat_interleave", "aten::searchsorted", "aten::sort"}


class Counted:
    """Makes a sum of tensors, and counts how often."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self.made, self.tensors = 0, tensors

    def make(self) -> torch.Tensor:
        self.made += 1
        return torch.stack(self.tensors).sum(0)

    def ask(self) -> torch.Tensor:
        result = remembered.remembered("sum", self.tensors, self.make)
        assert torch.equal(result, torch.stack(self.tensors).sum(0))
        return result


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def in_place(index: torch.Tensor) -> None:
    index.copy_(index.flip(0))


def one_entry(index: torch.Tensor) -> None:
    index[0] = 7


def in_inference_mode(index: torch.Tensor) -> None:
    with torch.inference_mode():
        index.add_(1)


def through_a_view(index: torch.Tensor) -> None:
    index.view(-1)[1:].mul_(2)


def other_memory(index: torch.Tensor) -> None:
    index.data = index.data + 1


# --- when something is kept ---


@pytest.mark.usefixtures("triton_device")
def test_a_result_is_made_once() -> None:
    counted = Counted(torch.arange(4), torch.arange(4))
    assert counted.ask() is counted.ask()
    assert counted.made == 1


@pytest.mark.usefixtures("triton_device")
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("change", [in_place, one_entry, in_inference_mode, through_a_view, other_memory])
def test_a_changed_tensor_has_it_made_anew(change: Callable[[torch.Tensor], None], number: int) -> None:
    counted = Counted(torch.arange(4), torch.arange(4) + 1)
    for made in (1, 2, 3):
        counted.ask()
        counted.ask()
        assert counted.made == made
        change(counted.tensors[number])


@pytest.mark.usefixtures("triton_device")
def test_other_tensors_and_other_questions_are_told_apart() -> None:
    first = torch.arange(4)
    for other in (torch.arange(4), torch.ones(4).long()):
        assert torch.equal(Counted(first, other).ask(), first + other)
    assert remembered.remembered("product", (first, first), lambda: first * 3) is not Counted(first, first).ask()


@pytest.mark.usefixtures("triton_device")
def test_a_copy_is_a_tensor_of_its_own() -> None:
    counted = Counted(torch.arange(4))
    counted.ask()
    twin = copy.deepcopy(counted)
    assert twin.tensors[0] is not counted.tensors[0]
    in_place(twin.tensors[0])
    twin.ask()
    counted.ask()
    assert (counted.made, twin.made) == (1, 2)


@pytest.mark.usefixtures("triton_device")
def test_nothing_outlives_its_tensor() -> None:
    gc.collect()
    before, table = len(remembered._kept), torch.randperm(5).int()
    remembered.compose(table, remembered.inverse(table))
    assert len(remembered._kept) == before + 1
    del table
    gc.collect()
    assert len(remembered._kept) == before


def test_nothing_is_kept_where_triton_does_not_run() -> None:
    """C++ kernels read index tensors live, also what was written through `data`."""
    table = torch.tensor([1, 2, 0], dtype=torch.int32)
    remembered.inverse(table)
    table.data.copy_(torch.tensor([0, 2, 1]))
    assert remembered.inverse(table).tolist() == [0, 2, 1]


@pytest.mark.usefixtures("triton_device")
def test_tensors_of_inference_mode_count_no_changes() -> None:
    with torch.inference_mode():
        table = torch.tensor([1, 2, 0], dtype=torch.int32)
        remembered.inverse(table)
        table.copy_(torch.tensor([0, 2, 1]))
        assert remembered.inverse(table).tolist() == [0, 2, 1]


@pytest.mark.usefixtures("triton_device")
def test_tracing_records_the_work() -> None:
    table = torch.tensor([1, 2, 0], dtype=torch.int32)
    remembered.inverse(table)
    traced = make_fx(remembered.inverse)(table)
    table.copy_(torch.tensor([0, 2, 1]))
    assert traced(table).tolist() == [0, 2, 1]
    with FakeTensorMode() as mode:
        assert remembered.inverse(mode.from_tensor(table)).shape == (3,)


def test_cuda_streams_besides_the_default_one_keep_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: 0)
    for current, expected in ((0, True), (1, False)):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device, stream=current: stream)
        assert remembered._on_default_stream(torch.device("cuda")) is expected


# --- products ---


class Layer:
    """A layer on Triton with both tables, whose values are small integers, so that every sum is exact."""

    def __init__(self, structure: Structure, shape: Shape, device: torch.device) -> None:
        self.structure, self.shape, self.device = structure, shape, device
        self.topology = self.choose()
        ones = structure.pack(torch.ones(shape.out_features, shape.in_features, device=device), self.topology)
        self.values = torch.randint_like(ones, -3, 4).requires_grad_()
        self.into = torch.randperm(shape.in_features, device=device).int()
        self.out = torch.randperm(shape.out_features, device=device).int()

    def choose(self) -> tuple[torch.Tensor, ...]:
        scores = torch.rand(self.shape.out_features, self.shape.in_features, device=self.device)
        return self.structure.choose(scores, 0.5)

    def call(self, x: torch.Tensor) -> torch.Tensor:
        tables = None, self.into, self.out
        result: torch.Tensor = structured_linear(
            x, self.values, list(self.topology), *tables, self.shape.out_features, self.structure.to_string()
        )
        return result

    def dense(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.structure.unpack(self.values, self.topology, self.shape)
        return (x[:, self.into.long()] @ weight.T)[:, self.out.long()]

    def change(self) -> None:
        """Another topology and other permutations, in place."""
        for index, new in zip(self.topology, self.choose(), strict=True):
            index.copy_(new)
        for table in (self.into, self.out):
            table.copy_(torch.randperm(table.numel()))

    def both_ways(self, product: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> list[torch.Tensor]:
        y = product(x)
        weights = torch.arange(y.shape[1], device=self.device).remainder(5).float()
        return [y, *torch.autograd.grad((y * weights).sum(), (x, self.values))]


def padded_away(layer: Layer, results: list[torch.Tensor]) -> list[torch.Tensor]:
    """Results with the gradient of the values as a dense weight: padding of blocks and groups has no say in it."""
    *others, gradient = results
    return [*others, layer.structure.unpack(gradient, layer.topology, layer.shape)]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("structure", "shape", "tokens"), CASES, ids=str)
def test_products_follow_index_tensors_that_change_in_place(
    structure: Structure, shape: Shape, tokens: int, compiled: bool, triton_device: torch.device
) -> None:
    layer = Layer(structure, shape, triton_device)
    product = torch.compile(layer.call, backend="aot_eager") if compiled else layer.call
    x = torch.randint(-3, 4, (tokens, shape.in_features), device=triton_device).float().requires_grad_()
    for _ in range(3):
        found, exact = (padded_away(layer, layer.both_ways(by, x)) for by in (product, layer.dense))
        for one, other in zip(found, exact, strict=True):
            assert torch.equal(one, other)
        layer.change()


@pytest.mark.parametrize(("structure", "shape", "tokens"), CASES, ids=str)
def test_a_step_does_no_index_work_unless_something_changed(
    structure: Structure, shape: Shape, tokens: int, triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "check_indices", lambda *args: None)  # which does nothing on a GPU
    layer = Layer(structure, shape, triton_device)
    x = torch.ones(tokens, shape.in_features, device=triton_device, requires_grad=True)
    done = []
    for _ in range(3):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            layer.call(x).sum().backward()
        done.append(INDEX_WORK & {event.key for event in profile.key_averages()})
        if len(done) == 2:
            layer.change()
    assert not done[1]
    assert done[0] == done[2]
    assert "aten::arange" in done[0]


def test_permutations_are_inverted_once(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.Tensor] = []
    inverse = permutation.inverse
    monkeypatch.setattr(permutation, "inverse", lambda indices: made.append(indices) or inverse(indices))
    x = torch.arange(6.0, device=triton_device, requires_grad=True)
    table = torch.randperm(6, device=triton_device).int()
    for _ in range(3):
        torch.ops.padst.permute(x, table).sum().backward()
    assert len(made) == 1
