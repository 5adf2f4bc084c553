"""When constants made from parameters are made anew, and when a program is given up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from padst_compile.specialization import Program, Specialization


class Doubling:
    """A program with one constant, twice its first argument; it relies on the second argument, where there is one."""

    def __init__(self, *args: torch.Tensor, attributes: tuple[torch.Tensor, ...] = ()) -> None:
        self.prepared = self.generalized = 0
        constants, expected = self.prepare(args), self.relied_on(args)
        watched = tuple(range(len(args)))
        expected = [tensor.clone() for tensor in expected]
        program = Program(self.compiled, watched, self.prepare, constants, self.relied_on, expected, attributes)
        self.attributes = attributes
        self.run = Specialization(program, args, self.general)

    def prepare(self, args: Sequence[Any]) -> list[torch.Tensor]:
        self.prepared = getattr(self, "prepared", 0) + 1
        source = args[0] if args else self.attributes[0]
        return [source.detach() * 2]

    def relied_on(self, args: Sequence[Any]) -> list[torch.Tensor]:
        return [tensor.detach() for tensor in args[1:]]

    def compiled(self, *args: Any) -> torch.Tensor:
        return args[-1].clone()

    def general(self) -> Callable[..., torch.Tensor]:
        self.generalized += 1
        return lambda *args: args[0].detach() * 2


def test_nothing_is_made_anew_while_nothing_changes() -> None:
    weight = nn.Parameter(torch.ones(3))
    doubling = Doubling(weight)
    for _ in range(3):
        assert torch.equal(doubling.run(weight), torch.full((3,), 2.0))
    assert doubling.prepared == 1


def in_place(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.mul_(3)


def in_inference_mode(weight: nn.Parameter) -> None:
    with torch.inference_mode():
        weight.mul_(3)


def other_data(weight: nn.Parameter) -> None:
    weight.data = weight.data * 3


def other_data_twice(weight: nn.Parameter) -> None:
    """The second new memory is likely to be where the first was."""
    for factor in (2.0, 1.5):
        weight.data = (weight.data * factor).clone()


@pytest.mark.parametrize("change", [in_place, in_inference_mode, other_data, other_data_twice])
def test_a_change_is_seen(change: Callable[[nn.Parameter], None]) -> None:
    weight = nn.Parameter(torch.ones(1000))
    doubling = Doubling(weight)
    for power in (1, 2, 3):
        change(weight)
        assert torch.equal(doubling.run(weight), torch.full((1000,), 2.0 * 3**power))


def test_memory_that_is_freed_and_taken_again_is_told_apart() -> None:
    weight = nn.Parameter(torch.ones(1000))
    doubling = Doubling(weight)
    address = weight.data_ptr()
    for _ in range(200):
        weight.data = torch.zeros(0)
        weight.data = torch.full((1000,), 3.0)
        if weight.data_ptr() == address:
            break
    assert torch.equal(doubling.run(weight), torch.full((1000,), 6.0))


class Calls(TorchDispatchMode):
    """The names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("device", "comparisons"), [("cpu", 3), ("meta", 0)])
def test_content_is_compared_on_a_cpu_alone(device: str, comparisons: int) -> None:
    """On a GPU the host would wait for each comparison, and a CUDA graph could not be captured."""
    weight, table = nn.Parameter(torch.ones(3, device=device)), torch.arange(3, device=device)
    doubling = Doubling(weight, attributes=(table, torch.ones(2, device=device)))
    with Calls() as calls:
        doubling.run(weight)
    assert calls.names == comparisons * ["aten::equal"] + ["aten::clone"]


def test_a_change_is_seen_where_content_is_not_compared() -> None:
    weight = nn.Parameter(torch.ones(3, device="meta"))
    doubling = Doubling(weight)
    for number, change in enumerate((in_place, in_inference_mode, other_data), start=2):
        change(weight)
        for _ in range(2):
            doubling.run(weight)
        assert doubling.prepared == number


def test_a_replaced_tensor_is_seen() -> None:
    doubling = Doubling(nn.Parameter(torch.ones(3)))
    assert torch.equal(doubling.run(nn.Parameter(torch.full((3,), 5.0))), torch.full((3,), 10.0))


def test_tensors_of_inference_mode_count_no_writes_so_they_are_never_trusted() -> None:
    doubling = Doubling(nn.Parameter(torch.ones(3)))
    with torch.inference_mode():
        weight = torch.ones(3)
        for value in (1.0, 4.0):
            weight.fill_(value)
            assert torch.equal(doubling.run(weight), torch.full((3,), 2 * value))


def test_constants_keep_their_memory() -> None:
    weight = nn.Parameter(torch.ones(3))
    addresses = []
    doubling = Doubling(weight)
    doubling.run._program.compiled = lambda *args: addresses.append(args[-1].data_ptr())  # type: ignore[union-attr]  # just made
    for _ in range(3):
        in_place(weight)
        doubling.run(weight)
    assert len(set(addresses)) == 1


@pytest.mark.parametrize("changed", [torch.ones(4), torch.ones(3, dtype=torch.float64)])
def test_another_shape_or_dtype_gives_the_program_up(changed: torch.Tensor) -> None:
    doubling = Doubling(nn.Parameter(torch.ones(3)))
    for _ in range(2):
        assert torch.equal(doubling.run(nn.Parameter(changed)), changed * 2)
    assert doubling.generalized == 1


def test_a_changed_assumption_gives_the_program_up_for_good() -> None:
    weight, table = nn.Parameter(torch.ones(3)), torch.arange(3)
    doubling = Doubling(weight, table)
    doubling.run(weight, table)
    table.copy_(table.flip(0))
    for _ in range(3):
        doubling.run(weight, table)
    table.copy_(table.flip(0))
    doubling.run(weight, table)
    assert doubling.generalized == 1


def test_an_assumption_that_holds_after_a_write_is_kept() -> None:
    weight, table = nn.Parameter(torch.ones(3)), torch.arange(3)
    doubling = Doubling(weight, table)
    table.copy_(torch.arange(3))
    doubling.run(weight, table)
    assert doubling.generalized == 0


def test_tensors_that_the_graph_holds_are_watched_too() -> None:
    weight = nn.Parameter(torch.ones(3))
    doubling = Doubling.__new__(Doubling)
    doubling.attributes = (weight,)
    Doubling.__init__(doubling, attributes=(weight,))
    in_place(weight)
    assert torch.equal(doubling.run(), torch.full((3,), 6.0))
