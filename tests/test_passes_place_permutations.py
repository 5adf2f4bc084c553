"""Σ gathers that remain → min: permutations vanish where a neighbour can take them, and the function stays the same."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import padst_compile as padst
from padst_compile.backend import padst as backend
from padst_compile.errors import InvalidPermutationError
from padst_compile.layers import PermutedSparseLinear
from padst_compile.passes.base import RuleReport
from padst_compile.passes.context import Context
from padst_compile.passes.graph import PERMUTE
from padst_compile.passes.pipeline import Pipeline
from padst_compile.passes.place_permutations import Placement
from padst_compile.permutation import inverse
from padst_compile.testing.capture import capture
from padst_compile.testing.small_models import (
    HIDDEN,
    MLP,
    WIDTH,
    Attention,
    FusedAttention,
    FusedGate,
    Gated,
    Mixer,
    Stream,
    ids,
    tables,
    whole_heads,
    within_heads,
    x,
)

BLOCK = padst.Block(4)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def sparse(model: nn.Module, *targets: str, structure: Any = BLOCK, **fields: Any) -> nn.Module:
    """`model` in float64 with whole numbers as weights, its targets sparse and randomly permuted."""
    for parameter in model.parameters():
        parameter.copy_(torch.randint(-4, 5, parameter.shape))
    return padst.sparsify(
        model.double().eval(), padst.SparsitySpec(structure, 0.5, permutation="random", targets=targets, ignore=(), **fields)
    )


def placed(model: nn.Module, *inputs: torch.Tensor) -> tuple[Context, RuleReport]:
    """The graph after all passes but the choice of kernels, checked against the model, and what the pass reported."""
    captured = capture(model, *inputs)
    facts = captured.context(inference=True)
    report = Pipeline(kernels=None).run(facts)
    actual = facts.module(*captured.inputs)[0]
    torch.testing.assert_close(actual, model(*inputs), rtol=1e-12, atol=1e-10)
    return facts, next(rule for rule in report.rules if rule.rule == "PlacePermutations")


def layer(model: nn.Module, name: str) -> PermutedSparseLinear:
    found = model.get_submodule(name)
    assert isinstance(found, PermutedSparseLinear)
    return found


def set_permutation(model: nn.Module, name: str, order: Any) -> None:
    layer(model, name).permutation.copy_(torch.as_tensor(np.asarray(order)))  # type: ignore[union-attr]  # it has one


VANISHES: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...], Callable[[], torch.Tensor]]] = {
    "a dense producer": (MLP, ("fc2",), lambda: x(2, 5, WIDTH)),
    "a dense producer behind a sigmoid gate": (lambda: MLP(lambda v: v * v.sigmoid() + 1), ("fc2",), lambda: x(2, 5, WIDTH)),
    "two dense producers of a gate": (Gated, ("down",), lambda: x(2, 5, WIDTH)),
    "a gate from one dense producer": (FusedGate, ("down",), lambda: x(3, WIDTH)),
    "a residual stream with one reader": (Stream, ("blocks.0.fc1",), ids),
    "a whole mixer, channels": (Mixer, ("channels1",), lambda: x(2, 8, WIDTH)),
    "a mixer's hidden tokens": (Mixer, ("tokens2",), lambda: x(2, 8, WIDTH)),
}


@pytest.mark.parametrize("case", VANISHES)
def test_a_permutation_vanishes_into(case: str) -> None:
    build, targets, inputs = VANISHES[case]
    facts, report = placed(sparse(build(), *targets), inputs())
    assert tables(facts) == 0
    assert report.tables_removed == 1


REMAINS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...], Callable[[], torch.Tensor], str]] = {
    "the graph's input": (MLP, ("fc1",), lambda: x(2, 5, WIDTH), "it is an input of the graph"),
    "a channel order that splits heads": (Attention, ("proj",), lambda: x(2, 5, WIDTH), "the graph divides its inputs as"),
    "a sparse producer": (MLP, ("fc1", "fc2"), lambda: x(2, 5, WIDTH), "costs more elsewhere"),
    "the graph's result": (lambda: nn.Sequential(nn.Linear(8, WIDTH)), ("0",), lambda: x(3, 8), "the graph returns it"),
}


@pytest.mark.parametrize("case", REMAINS)
def test_a_permutation_remains_because_of(case: str) -> None:
    build, targets, inputs, reason = REMAINS[case]
    side = "output" if case == "the graph's result" else "input"
    facts, report = placed(sparse(build(), *targets, permutation_side=side), inputs())
    assert tables(facts) >= 1
    assert any(reason in refusal.reason for refusal in report.refusals), report.refusals


@pytest.mark.parametrize("attention", [Attention, FusedAttention, lambda: Attention(2), lambda: Attention(rotary=True)])
def test_orders_within_heads_fold_into_the_values(attention: Callable[[], nn.Module]) -> None:
    model = sparse(attention(), "proj")
    order = within_heads()
    if isinstance(model, Attention) and model.kv_heads == 2:  # both heads of a group read the same values
        order = np.concatenate([order[:4], order[:4] + 4, order[8:12], order[8:12] + 4])
    set_permutation(model, "proj", order)
    facts, _ = placed(model, x(2, 5, WIDTH))
    assert tables(facts) == 0


def test_another_order_for_each_head_of_a_group_stays() -> None:
    model = sparse(Attention(2), "proj")
    set_permutation(model, "proj", within_heads())
    facts, _ = placed(model, x(2, 5, WIDTH))
    assert tables(facts) == 1


@pytest.mark.parametrize(("attention", "order"), [
    (Attention, (2, 0, 3, 1)), (FusedAttention, (3, 2, 1, 0)), (lambda: Attention(rotary=True), (1, 0, 2, 3)),
    (lambda: Attention(2), (3, 2, 0, 1)),  # groups change places, and heads within a group
])  # fmt: skip
def test_whole_heads_fold_into_queries_keys_and_values(attention: Callable[[], nn.Module], order: tuple[int, ...]) -> None:
    model = sparse(attention(), "proj")
    set_permutation(model, "proj", whole_heads(*order))
    facts, _ = placed(model, x(2, 5, WIDTH))
    assert tables(facts) == 0


def test_heads_do_not_leave_their_group() -> None:
    model = sparse(Attention(2), "proj")
    set_permutation(model, "proj", whole_heads(0, 2, 1, 3))
    facts, _ = placed(model, x(2, 5, WIDTH))
    assert tables(facts) == 1


def test_siblings_that_agree_both_vanish() -> None:
    model = sparse(Gated(), "gate", "up")
    head = nn.Sequential(nn.Linear(6, WIDTH).double(), model)
    set_permutation(model, "up", layer(model, "gate").permutation)
    facts, report = placed(head, x(2, 6))
    assert tables(facts) == 0
    assert report.tables_removed == 2


def test_of_siblings_that_disagree_the_majority_wins() -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, WIDTH)
            self.a, self.b, self.c = (nn.Linear(WIDTH, 8) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            return self.a(x) + self.b(x) + self.c(x)

    model = sparse(Three(), "a", "b", "c")
    set_permutation(model, "c", layer(model, "a").permutation)
    facts, report = placed(model, x(3, 6))
    assert (tables(facts), report.tables_removed) == (1, 2)
    assert [refusal.layer for refusal in report.refusals] == ["b"]


def test_an_output_permutation_meets_its_inverse() -> None:
    model = sparse(MLP(), "fc1", permutation_side="output")
    facts, _ = placed(model, x(2, 5, WIDTH))
    assert tables(facts) == 0  # fc2 is dense and takes it on


def test_two_sparse_layers_whose_tables_cancel() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(8, HIDDEN), nn.Linear(HIDDEN, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc2(F.relu(self.fc1(x)))

    plain = Two()
    spec = padst.SparsitySpec(BLOCK, 0.5, permutation="random", targets=("fc*",), ignore=())
    for parameter in plain.parameters():
        parameter.copy_(torch.randint(-4, 5, parameter.shape))
    model = padst.sparsify(
        plain.double(), {"fc1": padst.SparsitySpec(BLOCK, 0.5, permutation="random", permutation_side="output"), "fc2": spec}
    )
    set_permutation(model, "fc2", inverse(layer(model, "fc1").permutation))  # type: ignore[arg-type]  # it has one
    facts, report = placed(model, x(3, 8))
    assert (tables(facts), report.tables_removed) == (0, 2)


def test_a_permutation_between_unknown_layers_vanishes() -> None:
    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 6)
            self.register_buffer("p", torch.randperm(8).int())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(F.relu(PERMUTE(self.a(x), self.p) + 1))

    facts, _ = placed(Between().double(), x(3, 6))
    assert tables(facts) == 0


def test_a_user_operator_is_a_border() -> None:
    class Custom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc2(torch.ops.padst_test.reverse(self.fc1(x)))

    with torch.library._scoped_library("padst_test", "FRAGMENT") as library:
        library.define("reverse(Tensor x) -> Tensor")
        library.impl("reverse", lambda x: x.flip(-1), "CompositeExplicitAutograd")
        library.impl("reverse", torch.empty_like, "Meta")
        facts, report = placed(sparse(Custom(), "fc2"), x(3, WIDTH))
    assert tables(facts) == 1
    assert any("no rule knows padst_test.reverse" in refusal.reason for refusal in report.refusals)


@pytest.mark.parametrize("write", [lambda h: h.mul_(2), lambda h: h[:, :3].zero_(), lambda h: F.relu(h, inplace=True)])
def test_a_write_in_place_follows_the_order(write: Callable[[torch.Tensor], Any]) -> None:
    class Writing(MLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.fc1(self.norm(x))
            write(hidden)
            return self.fc2(hidden)

    placed(sparse(Writing(), "fc2"), x(5, WIDTH))


def test_dynamic_sizes() -> None:
    model = sparse(Stream(), "blocks.*.fc2", "blocks.0.fc1")

    def changed(ids: torch.Tensor) -> torch.Tensor:
        return model(ids) * 2  # type: ignore[no-any-return]

    torch._dynamo.reset()
    compiled = torch.compile(changed, backend=backend, dynamic=True, options={"kernels": "sparse"})
    for batch in (2, 3, 7):
        values = torch.randint(0, 10, (batch, 5))
        torch.testing.assert_close(compiled(values), changed(values), rtol=1e-12, atol=1e-10)


def test_what_is_joined_to_a_tensor_of_dynamic_size_and_returned_keeps_its_order() -> None:
    model = sparse(nn.Sequential(nn.Linear(8, WIDTH)), "0", permutation_side="output")

    def joined(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.cat((model(x).mT, y), 0)

    inputs, dynamic = x(3, 8), x(5, 3)
    torch._dynamo.mark_dynamic(dynamic, 0)
    compiled = torch.compile(joined, backend=backend, options={"kernels": "sparse"})
    torch.testing.assert_close(compiled(inputs, dynamic), joined(inputs, dynamic), rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("change", ["permutation", "weight", "values"])
def test_a_change_after_compilation_shows(change: str) -> None:
    model = sparse(MLP(), "fc2")
    inputs = x(2, 5, WIDTH)
    compiled = torch.compile(model, backend=backend, options={"kernels": "sparse"})
    torch.testing.assert_close(compiled(inputs), model(inputs), rtol=1e-12, atol=1e-10)
    if change == "permutation":
        set_permutation(model, "fc2", np.roll(np.arange(HIDDEN), 3))
    elif change == "weight":
        model.fc1.weight.mul_(2)  # type: ignore[union-attr,operator]
        model.fc1.bias.add_(1)  # type: ignore[union-attr,operator]
    else:
        layer(model, "fc2").values.neg_()
    torch.testing.assert_close(compiled(inputs), model(inputs), rtol=1e-12, atol=1e-10)


def test_a_buffer_that_is_no_permutation_is_an_error() -> None:
    model = sparse(MLP(), "fc2")
    set_permutation(model, "fc2", np.zeros(HIDDEN))
    captured = capture(model, x(3, WIDTH))
    with pytest.raises(InvalidPermutationError, match="fc2"):
        Pipeline(kernels=None).run(captured.context(inference=True))


def test_training_graphs_are_left_alone() -> None:
    captured = capture(sparse(MLP(), "fc2"), x(3, WIDTH))
    report = Pipeline(kernels=None).run(captured.context(inference=False))
    assert next(rule for rule in report.rules if rule.rule == "PlacePermutations").rewritten == 0


def test_a_second_run_changes_nothing() -> None:
    captured = capture(sparse(Stream(), "blocks.*"), ids())
    facts = captured.context(inference=True)
    Pipeline(kernels=None).run(facts)
    code = facts.module.code
    Pipeline(kernels=None).run(facts)
    assert facts.module.code == code


@pytest.mark.parametrize("seed", range(12))
def test_the_result_is_the_cheapest_of_all_orders(seed: int) -> None:
    """Against every combination of orders of three small axes, on a net in which demands contradict each other."""

    class Tangle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
            self.register_buffer("p", torch.randperm(3).int())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.a(x)
            return self.d(self.c(x) * PERMUTE(self.b(x), self.p))

    torch.manual_seed(seed)
    model = sparse(Tangle(), *(["b", "c", "d"][: 1 + seed % 3]), structure=padst.Block(1))
    choices = [np.random.default_rng(seed).permutation(3) for _ in range(2)]
    for number, name in enumerate("bcd"[: 1 + seed % 3]):
        set_permutation(model, name, choices[(seed >> number) % 2])
    problem = Placement(capture(model, x(2, 2)).context(inference=True))
    assert problem.worth_while
    cost = problem.objective()
    best = cost(problem.solve())
    orders = [np.array(order, dtype=np.int32) for order in itertools.permutations(range(3))]
    leaves = problem.free_leaves()
    assert [leaf.size for leaf in leaves] == [3] * len(leaves)
    for combination in itertools.product(orders, repeat=len(leaves)):
        assert cost({leaf: problem.freedom.label(leaf, order) for leaf, order in zip(leaves, combination, strict=True)}) >= best
