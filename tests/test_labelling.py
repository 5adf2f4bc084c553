"""Exact minimisation over labels, against trying everything; and which labels are worth trying."""

from __future__ import annotations

import functools
import io
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeAlias

import hypothesis.strategies as st
import networkx as nx
import pytest
from hypothesis import given

import padst_compile
from padst_compile.passes.elimination_order import elimination_order
from padst_compile.passes.label_candidates import Link, candidates
from padst_compile.passes.labelling import Factor, LabellingTooLargeError, NoLabellingError, draw, minimise, total_cost

ROOT = Path(padst_compile.__file__).parent.parent
Domains: TypeAlias = dict[str, list[str]]
Permutation: TypeAlias = tuple[int, ...]

COSTS = st.sampled_from([0, 1, 2, 5, -3, Fraction(1, 3), 0.5, math.inf])


def everything(domains: Mapping[Hashable, Sequence[Any]]) -> Iterator[dict[Hashable, Any]]:
    """All labellings."""
    return (dict(zip(domains, labels, strict=True)) for labels in itertools.product(*domains.values()))


def least_cost(domains: Mapping[Hashable, Sequence[Any]], factors: Sequence[Factor[Any]]) -> Any:
    return min(total_cost(labelling, factors) for labelling in everything(domains))


def tabulated(variables: Sequence[str], table: dict[tuple[str, ...], Any]) -> Factor[str]:
    return Factor(tuple(variables), lambda *labels: table[labels], "+".join(variables))


def differ(a: str, b: str, cost: Any = 1) -> Factor[str]:
    """Costs something unless the labels agree."""
    return Factor((a, b), lambda x, y: 0 if x == y else cost, f"{a}={b}")


def want(variable: str, label: Any, cost: Any = 1) -> Factor[Any]:
    """Costs something unless the variable has the label."""
    return Factor((variable,), lambda x: 0 if x == label else cost, f"{variable}:{label}")


@st.composite
def problems(draw: st.DrawFn, costs: st.SearchStrategy[Any] = COSTS) -> tuple[Domains, list[Factor[str]]]:
    """Cycles, isolated variables, repeated labels and variables, single labels, forbidden combinations."""
    names = draw(st.lists(st.sampled_from("uvwxyz"), min_size=1, max_size=5, unique=True))
    domains = {name: draw(st.lists(st.sampled_from("abc"), min_size=1, max_size=3)) for name in names}
    scopes = draw(st.lists(st.lists(st.sampled_from(names), max_size=3), max_size=7))
    factors = []
    for scope in scopes:
        combinations = sorted(set(itertools.product(*(domains[name] for name in scope))))
        factors.append(tabulated(scope, {labels: draw(costs) for labels in combinations}))
    return domains, factors


# --- the optimum ---


@given(problems())
def test_the_cost_is_that_of_the_best_of_all_labellings(problem: tuple[Domains, list[Factor[str]]]) -> None:
    domains, factors = problem
    best = least_cost(domains, factors)
    if best == math.inf:
        with pytest.raises(NoLabellingError):
            minimise(domains, factors)
        return
    found = minimise(domains, factors)
    assert list(found) == list(domains)
    assert all(label in domains[variable] for variable, label in found.items())
    assert total_cost(found, factors) == pytest.approx(float(best))


@given(problems(st.sampled_from([0, 1, Fraction(1, 3), Fraction(2, 7), 10**20, 10**20 + 1])))
def test_ints_and_fractions_stay_exact(problem: tuple[Domains, list[Factor[str]]]) -> None:
    assert total_cost(minimise(*problem), problem[1]) == least_cost(*problem)


@given(problems(st.integers(0, 2)))
def test_no_variable_can_move_to_an_earlier_label_for_free(problem: tuple[Domains, list[Factor[str]]]) -> None:
    domains, factors = problem
    found = minimise(domains, factors)
    for variable, labels in domains.items():
        for earlier in labels[: labels.index(found[variable])]:
            assert total_cost({**found, variable: earlier}, factors) > total_cost(found, factors)


def test_the_first_label_wins_where_nothing_else_counts() -> None:
    domains = {"x": ["b", "a"], "y": ["b", "a"], "alone": ["c", "a"]}
    assert minimise(domains, [differ("x", "y")]) == {"x": "b", "y": "b", "alone": "c"}


def test_nothing_to_label_costs_nothing() -> None:
    assert minimise({}, []) == {}
    assert total_cost({}, []) == 0


def test_a_variable_may_be_its_own_neighbour() -> None:
    shifted: Factor[int] = Factor(("x", "x"), lambda a, b: 0 if a == (b + 1) % 3 else 1)
    assert total_cost(minimise({"x": [0, 1, 2]}, [shifted]), [shifted]) == 1


def test_labels_need_not_be_hashable() -> None:
    assert minimise({"x": [[0], [1]]}, [want("x", [1])]) == {"x": [1]}


@pytest.mark.parametrize("one", [1.0, 1, 2**60])
def test_large_sums_of_ints_are_compared_exactly(one: float) -> None:
    domains = {"x": ["a", "b"], "y": ["a", "b"]}
    factors = [want("x", "b", one), want("x", "a", one - 1 if one == 2**60 else 0), differ("x", "y", one)]
    assert minimise(domains, factors) == {"x": "b", "y": "b"}


def test_a_forbidden_labelling_is_said_to_be_one() -> None:
    with pytest.raises(NoLabellingError, match="no label of x"):
        minimise({"x": ["a"], "y": []}, [want("x", "b", math.inf)])
    with pytest.raises(NoLabellingError, match="every combination"):
        minimise({"x": ["a"], "y": ["b", "c"]}, [differ("x", "y", math.inf)])


def test_another_hash_seed_changes_nothing() -> None:
    code = """
import random
from padst_compile.passes.labelling import Factor, minimise
names = [f"v{i}" for i in range(12)]
pick = random.Random(0)
pairs = [tuple(pick.sample(names, 2)) for _ in range(16)]
factors = [Factor(pair, lambda a, b: int(a == b)) for pair in pairs]
print(minimise({name: ["a", "b", "c"] for name in names}, factors))
"""
    results = set()
    for seed in ("0", "1"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        run = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        results.add(run.stdout)
    assert len(results) == 1


# --- the work ---


class Counted:
    """Cost functions, and how often they were called."""

    def __init__(self) -> None:
        self.calls = 0

    def factor(self, variables: tuple[Hashable, ...], cost: Callable[..., float]) -> Factor[Any]:
        @functools.wraps(cost)
        def counted(*labels: Any) -> float:
            self.calls += 1
            return cost(*labels)

        return Factor(variables, counted)


@pytest.mark.parametrize("depth", [10, 100, 400])
def test_the_work_on_a_chain_grows_with_its_depth(depth: int) -> None:
    labels, counted = range(4), Counted()
    links = [counted.factor((i, i + 1), lambda a, b: float(a != b)) for i in range(depth - 1)]
    minimise(dict.fromkeys(range(depth), labels), links, limit=4**2)  # no table but those of the links
    assert counted.calls == (depth - 1) * (4**2 + 1)  # every combination, and the result


def test_the_work_on_a_cycle_needs_one_variable_more() -> None:
    domains = {i: range(3) for i in range(50)}
    links: list[Factor[int]] = [Factor((i, (i + 1) % 50), lambda a, b: a == b) for i in range(50)]
    assert total_cost(minimise(domains, links, limit=3**3), links) == 0
    with pytest.raises(LabellingTooLargeError):
        minimise(domains, links, limit=3**3 - 1)


def test_a_variable_with_many_readers_stays_small() -> None:
    counted = Counted()
    readers = [counted.factor(("stream",), lambda label, i=i: float(label != i % 7)) for i in range(100)]
    assert minimise({"stream": range(30)}, readers, limit=30) == {"stream": 0}
    assert counted.calls == 100 * (30 + 1)


def test_pinned_variables_cost_no_table() -> None:
    """A factor over eight variables of ten labels is nothing, once six of them are pinned."""
    domains = {i: range(10) for i in range(8)}
    pins = [want(i, 3, math.inf) for i in range(6)]
    joint: Factor[int] = Factor(tuple(range(8)), lambda *labels: len(set(labels)))
    assert minimise(domains, [*pins, joint], limit=100) == dict.fromkeys(range(8), 3)


def test_too_large_a_problem_is_refused_before_it_is_evaluated() -> None:
    counted = Counted()
    factor = counted.factor(("p", "q", "r"), lambda *_: 0.0)
    with pytest.raises(LabellingTooLargeError, match="p, q, r would have 125 entries; the limit is 124"):
        minimise(dict.fromkeys("pqr", range(5)), [factor], limit=124)
    assert counted.calls == 0


@given(st.data())
def test_each_variable_is_eliminated_once_and_no_table_is_larger_than_announced(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(2, 4), min_size=1, max_size=8))
    variables = st.integers(0, len(sizes) - 1)
    scopes = data.draw(st.lists(st.sets(variables, max_size=3), max_size=10))
    order = elimination_order(sizes, scopes)
    assert sorted(order.variables) == list(range(len(sizes)))
    entries = math.prod(sizes[variable] for variable in order.largest)
    tables = [set(scope) for scope in scopes]
    for variable in order.variables:
        joined = set().union({variable}, *(table for table in tables if variable in table))
        assert math.prod(sizes[member] for member in joined) <= entries
        tables = [table for table in tables if variable not in table] + [joined - {variable}]


# --- the picture ---


def test_a_drawing_says_what_is_asked_of_each_variable() -> None:
    graph = draw({"x": ["p", "q"], "y": ["p"]}, [want("x", "q", 2), want("x", "p"), differ("x", "y", 5)])
    assert graph.nodes["x"] == {"labels": "p, q", "factors": "x:q; x:p", "costs": "2, 0; 0, 1"}
    assert graph.nodes["y"] == {"labels": "p", "factors": "", "costs": ""}
    assert graph.edges["x", "y"] == {"factors": "x=y", "costs": "0 … 5"}


def test_a_drawing_can_be_written_and_read() -> None:
    wide: Factor[int] = Factor(tuple(range(6)), lambda *_: 0.0)
    graph = draw(dict.fromkeys(range(6), range(30)), [wide])
    file = io.BytesIO()
    nx.write_graphml(graph, file)
    file.seek(0)
    assert nx.read_graphml(file).edges["0", "1"] == {"factors": "unnamed", "costs": "…"}


# --- permutations as labels ---


def compose(first: Permutation, second: Permutation) -> Permutation:
    return tuple(first[i] for i in second)


def inverse(p: Permutation) -> Permutation:
    return tuple(sorted(range(len(p)), key=p.__getitem__))


def reorders(target: Hashable, source: Hashable, p: Permutation) -> Link[Permutation]:
    """`label(target) == compose(p, label(source))`."""
    return Link(target, source, functools.partial(compose, p), functools.partial(compose, inverse(p)))


def linked(link: Link[Permutation], cost: Any) -> Factor[Permutation]:
    return Factor((link.target, link.source), lambda target, source: 0 if link.holds(target, source) else cost)


@st.composite
def placements(
    draw: st.DrawFn,
) -> tuple[int, dict[str, list[Permutation]], list[Link[Permutation]], list[Factor[Permutation]]]:
    """Demands, links and pins on a few variables: the size, what each variable asks for, the links, and all factors."""
    n = draw(st.sampled_from([3, 4]))
    names = "xyz"[: draw(st.integers(1, 3 if n == 3 else 2))]
    labels, costs = st.permutations(range(n)).map(tuple), st.integers(1, 4)
    demands: dict[str, list[Permutation]] = {name: draw(st.lists(labels, max_size=3)) for name in names}
    factors = [want(name, label, draw(costs)) for name in names for label in demands[name]]
    for name in draw(st.sets(st.sampled_from(names), max_size=1)):
        demands[name].append(tuple(range(n)))
        factors.append(want(name, tuple(range(n)), math.inf))
    pairs = draw(st.lists(st.tuples(st.sampled_from(names), st.sampled_from(names)), max_size=4))
    links = [reorders(target, source, draw(labels)) for target, source in pairs]
    return n, demands, links, factors + [linked(link, draw(costs)) for link in links]


@given(placements())
def test_transported_demands_are_all_the_labels_worth_trying(problem: Any) -> None:
    n, demands, links, factors = problem
    every = list(itertools.permutations(range(n)))
    few = candidates(demands, links, default=every[0], cap=len(every))
    assert total_cost(minimise(few, factors), factors) == least_cost(dict.fromkeys(demands, every), factors)


@given(placements())
def test_candidates_are_closed_under_the_links(problem: Any) -> None:
    n, demands, links, _ = problem
    found = candidates(demands, links, default=tuple(range(n)), cap=math.factorial(n))
    for link in links:
        assert {link.forward(label) for label in found[link.source]} == set(found[link.target])
        assert all(link.backward(link.forward(label)) == label for label in found[link.source])


def test_own_demands_come_first_then_the_nearest() -> None:
    shift, far, near = (1, 2, 0), (2, 1, 0), (0, 2, 1)
    links = [reorders("x", "y", shift), reorders("y", "z", shift)]
    demands = {"x": [near], "y": [], "z": [far]}
    found = candidates(demands, links, default=(0, 1, 2))
    assert found["x"] == (near, compose(shift, compose(shift, far)))
    assert found["y"] == (compose(inverse(shift), near), compose(shift, far))


def test_a_cap_keeps_what_is_demanded_and_near() -> None:
    shift = (1, 2, 3, 4, 5, 0)
    around = [reorders("x", "x", shift)]  # any number of shifts
    start = tuple(range(6))
    found = candidates({"x": [start]}, around, default=start, cap=3)["x"]
    assert found == (start, shift, inverse(shift))
    assert len(candidates({"x": [start]}, around, default=start)["x"]) == 6


def test_what_no_demand_reaches_has_the_default() -> None:
    links = [reorders("x", "y", (1, 0))]
    assert candidates({"x": [], "y": [], "z": []}, links, default=(0, 1)) == {
        "x": ((0, 1),),
        "y": ((1, 0),),
        "z": ((0, 1),),
    }
