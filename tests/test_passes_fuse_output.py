"""permute(linear(x, S, b, output_permutation=p), q)  ==  linear(x, S, b[q], output_permutation=p[q])"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn

from padst_compile.passes.context import Context
from padst_compile.passes.fuse_output_permutation import FuseOutputPermutation
from padst_compile.passes.graph import PERMUTE, STRUCTURED_LINEAR, argument
from padst_compile.structures import Structure, parse

STRUCTURES = ("block:4", "nm:1:4", "nm:2:4:4", "diagonal", "diagonal:4", "unstructured")


class Product(nn.Module):
    """A structured product 8 -> 16 of whole numbers, with bias and a table of its own where asked for."""

    def __init__(self, structure: str = "block:4", *, own: bool = False, bias: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        parsed: Structure = parse(structure)
        weight = torch.randint(-4, 5, (16, 8), generator=generator).double()
        topology = parsed.choose(weight.abs(), parsed.natural_sparsity() or 0.5)
        self.structure, self.count = parsed.to_string(), len(topology)
        self.values = nn.Parameter(parsed.pack(weight, topology))
        for number, index in enumerate(topology):
            self.register_buffer(f"index{number}", index)
        self.register_buffer("p", torch.randperm(16, generator=generator).int())
        self.register_buffer("q", torch.randperm(16, generator=generator).int())
        self.register_parameter("bias", nn.Parameter(torch.arange(16).double()) if bias else None)
        self.own = own

    def product(self, x: Any) -> Any:
        topology = [getattr(self, f"index{number}") for number in range(self.count)]
        own = self.q if self.own else None
        return STRUCTURED_LINEAR(x, self.values, topology, self.bias, None, own, 16, self.structure)

    def forward(self, x: Any) -> Any:
        return PERMUTE(self.product(x), self.p)


def run(model: nn.Module) -> Any:
    facts = Context(fx.symbolic_trace(model), {}, inference=False)
    report = FuseOutputPermutation().run(facts)
    facts.module.graph.lint()
    facts.module.recompile()
    return facts.module, report


def sample() -> torch.Tensor:
    return torch.arange(24).reshape(3, 8).double() - 9


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_table_moves_into_the_product(structure: str, own: bool, bias: bool) -> None:
    model = Product(structure, own=own, bias=bias)
    module, report = run(model)
    assert report.rewritten == 1
    assert module.graph.find_nodes(op="call_function", target=PERMUTE) == []
    assert torch.equal(module(sample()), model(sample()))


def test_a_product_with_another_reader_is_refused() -> None:
    class Also(Product):
        def forward(self, x: Any) -> Any:
            y = self.product(x)
            return PERMUTE(y, self.p) + y

    module, report = run(Also())
    assert [r.reason for r in report.refusals] == ["structured_linear_default has 2 readers"]
    assert torch.equal(module(sample()), Also()(sample()))


def test_anything_between_the_two_is_no_match() -> None:
    class Between(Product):
        def forward(self, x: Any) -> Any:
            return PERMUTE(self.product(x).relu(), self.p)

    module, report = run(Between())
    (product,) = module.graph.find_nodes(op="call_function", target=STRUCTURED_LINEAR)
    assert (report.rewritten, report.refusals, argument(product, "output_permutation")) == (0, [], None)
