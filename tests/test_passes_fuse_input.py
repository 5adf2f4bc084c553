"""linear(permute(x, p), S, input_permutation=q)  ==  linear(x, S, input_permutation=p[q])"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn

from padst_compile.passes.context import Context
from padst_compile.passes.fuse_input_permutation import FuseInputPermutation
from padst_compile.passes.graph import PERMUTE, STRUCTURED_LINEAR, argument
from padst_compile.structures import Structure, parse

STRUCTURES = ("block:4", "nm:1:4", "nm:2:4:4", "diagonal", "diagonal:4", "unstructured")


class Product(nn.Module):
    """A structured product 16 -> 8 of whole numbers with a table of its own, if it has one."""

    def __init__(self, structure: str = "block:4", *, own: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        parsed: Structure = parse(structure)
        weight = torch.randint(-4, 5, (8, 16), generator=generator).double()
        topology = parsed.choose(weight.abs(), parsed.natural_sparsity() or 0.5)
        self.structure, self.count = parsed.to_string(), len(topology)
        self.values = nn.Parameter(parsed.pack(weight, topology))
        for number, index in enumerate(topology):
            self.register_buffer(f"index{number}", index)
        self.register_buffer("p", torch.randperm(16, generator=generator).int())
        self.register_buffer("q", torch.randperm(16, generator=generator).int())
        self.own = own

    def product(self, x: Any) -> Any:
        topology = [getattr(self, f"index{number}") for number in range(self.count)]
        own = self.q if self.own else None
        return STRUCTURED_LINEAR(x, self.values, topology, None, own, None, 8, self.structure)

    def forward(self, x: Any) -> Any:
        return self.product(PERMUTE(x, self.p))


def run(model: nn.Module) -> Any:
    facts = Context(fx.symbolic_trace(model), {}, inference=False)
    report = FuseInputPermutation().run(facts)
    facts.module.graph.lint()
    facts.module.recompile()
    return facts.module, report


def sample() -> torch.Tensor:
    return torch.arange(48).reshape(3, 16).double() - 20


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_table_moves_into_the_product(structure: str, own: bool) -> None:
    model = Product(structure, own=own)
    module, report = run(model)
    assert report.rewritten == 1
    assert module.graph.find_nodes(op="call_function", target=PERMUTE) == []
    assert torch.equal(module(sample()), model(sample()))


def test_one_permutation_read_by_two_products_goes_into_both() -> None:
    class Two(Product):
        def forward(self, x: Any) -> Any:
            x = PERMUTE(x, self.p)
            return self.product(x) + self.product(x)

    module, report = run(Two())
    assert (report.rewritten, module.graph.find_nodes(op="call_function", target=PERMUTE)) == (2, [])
    assert torch.equal(module(sample()), Two()(sample()))


def test_a_permutation_with_another_reader_stays_for_both() -> None:
    class Also(Product):
        def forward(self, x: Any) -> Any:
            x = PERMUTE(x, self.p)
            return self.product(x).sum() + x

    module, report = run(Also())
    (permute,) = module.graph.find_nodes(op="call_function", target=PERMUTE)
    assert (report.rewritten, len(permute.users)) == (0, 2)
    assert report.refusals[0].reason == "permute_default is read by add too, so it stays and the product reads its result"
    assert torch.equal(module(sample()), Also()(sample()))


def test_anything_between_the_two_is_no_match() -> None:
    class Between(Product):
        def forward(self, x: Any) -> Any:
            return self.product(PERMUTE(x, self.p) * 2)

    module, report = run(Between())
    (product,) = module.graph.find_nodes(op="call_function", target=STRUCTURED_LINEAR)
    assert (report.rewritten, report.refusals, argument(product, "input_permutation")) == (0, [], None)
