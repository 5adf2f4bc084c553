"""permute(permute(x, p), q)  ==  permute(x, p[q])"""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

from padst_compile.passes.compose_permutations import ComposePermutations
from padst_compile.passes.context import Context
from padst_compile.passes.graph import PERMUTE


def chain(x: Any, *tables: Any) -> Any:
    for table in tables:
        x = PERMUTE(x, table)
    return x


def three(x: Any, p: Any, q: Any, r: Any) -> Any:
    return chain(x, p, q, r)


def shared(x: Any, p: Any, q: Any) -> Any:
    inner = PERMUTE(x, p)
    return PERMUTE(inner, q), inner


def one(x: Any, p: Any) -> Any:
    return PERMUTE(x + 1, p)


def facts_of(function: Any) -> Context:
    return Context(fx.symbolic_trace(function), {}, inference=False)


def count(facts: Context) -> int:
    return len(facts.module.graph.find_nodes(op="call_function", target=PERMUTE))


@given(tables=st.lists(st.permutations(range(7)).map(torch.tensor), min_size=3, max_size=3))
def test_a_chain_becomes_one(tables: list[torch.Tensor]) -> None:
    x = torch.arange(21, dtype=torch.float64).reshape(3, 7)
    facts = facts_of(three)
    report = ComposePermutations().run(facts)
    facts.module.recompile()
    assert (report.rewritten, count(facts)) == (2, 1)
    assert torch.equal(facts.module(x, *tables), chain(x, *tables))


def test_a_shared_inner_result_is_refused() -> None:
    facts = facts_of(shared)
    report = ComposePermutations().run(facts)
    assert (report.rewritten, count(facts)) == (0, 2)
    assert report.refusals[0].reason == "permute_default has 2 readers: composing would add a gather, not save one"


def test_a_single_permutation_is_no_match() -> None:
    report = ComposePermutations().run(facts_of(one))
    assert (report.rewritten, report.refusals) == (0, [])
