"""block_linear(x, B, …)  ==  block_linear(x, interleave(B), …)"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn

import padst_compile as padst
from padst_compile.backend import compile_graph
from padst_compile.kernels import native
from padst_compile.options import Options
from padst_compile.passes.base import RuleReport
from padst_compile.passes.graph import argument
from padst_compile.testing.new_weights import assert_new_weights_are_followed

pytestmark = pytest.mark.skipif(
    not (native.load() and native.interleaves(torch.bfloat16)), reason="no micro-kernel that reads pairs of bfloat16"
)


class Product(nn.Module):
    """A block layer, and what capture makes of it."""

    def __init__(self, structure: str, in_features: int = 32, out_features: int = 24) -> None:
        super().__init__()
        torch.manual_seed(0)
        dense = nn.Sequential(nn.Linear(in_features, out_features))
        self.layer = padst.sparsify(dense, padst.SparsitySpec(structure, 0.5, permutation="random")).bfloat16()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)  # type: ignore[no-any-return]  # a Sequential


def apply(model: nn.Module, x: torch.Tensor, **options: Any) -> tuple[RuleReport | None, list[int], torch.Tensor]:
    """What the pass reports, the dimensions of the values that the products then take, and the result."""
    reports: list[RuleReport] = []
    dimensions: list[int] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        def compiler(module: fx.GraphModule, inputs: list[Any]) -> Any:
            fakes = dict(zip((node for node in module.graph.nodes if node.op == "placeholder"), inputs, strict=True))
            products = [node for node in module.graph.nodes if "block_linear" in str(node.target)]
            dimensions.extend(fakes[argument(node, "values")].dim() for node in products)
            return module

        program, compilation = compile_graph(gm, inputs, Options(kernels="sparse", verify=True, **options), compiler)
        reports.extend(report for report in compilation.report.rules if report.rule == "InterleaveBlocks")
        return program

    result = torch.compile(model, backend=backend, fullgraph=True)(x)
    return (reports[0] if reports else None), dimensions, result


@pytest.mark.parametrize("structure", ["block:16", "block:8x6", "block:1x2"])
@pytest.mark.parametrize("in_features", [32, 33, 37])
def test_blocks_are_arranged_once_and_nothing_changes(structure: str, in_features: int) -> None:
    model, x = Product(structure, in_features), torch.randn(5, in_features).bfloat16()
    with torch.no_grad():
        report, dimensions, result = apply(model, x)
        torch.testing.assert_close(result, model(x), rtol=0, atol=0)
    assert report is not None
    assert report.rewritten == 1
    assert dimensions == [4]


def test_new_weights_are_arranged_again() -> None:
    assert_new_weights_are_followed(Product("block:16"), torch.randn(5, 32).bfloat16())


def test_autocast_products_are_arranged() -> None:
    model, x = Product("block:16").float(), torch.randn(5, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        report, dimensions, result = apply(model, x)
        torch.testing.assert_close(result, model(x), rtol=0, atol=0)
    assert report is not None
    assert report.rewritten == 1
    assert dimensions == [4]


def test_float32_is_left_alone() -> None:
    with torch.no_grad():
        report, dimensions, _ = apply(Product("block:16").float(), torch.randn(5, 32))
    assert report is not None
    assert (report.rewritten, dimensions) == (0, [3])


def test_an_odd_number_of_inputs_is_refused() -> None:
    with torch.no_grad():
        report, dimensions, _ = apply(Product("block:8x5"), torch.randn(5, 32).bfloat16())
    assert report is not None
    assert [refusal.reason for refusal in report.refusals] == ["a block has an odd number of inputs"]
    assert dimensions == [3]


def test_training_keeps_the_blocks_as_they_are() -> None:
    report, dimensions, _ = apply(Product("block:16"), torch.randn(5, 32).bfloat16())
    assert report is not None
    assert (report.rewritten, report.refusals, dimensions) == (0, [], [])


def test_the_operator_refuses_what_it_cannot_arrange() -> None:
    pointers, columns = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0], dtype=torch.int32)
    for values in (torch.randn(1, 4, 4), torch.randn(1, 3, 4).bfloat16()):
        with pytest.raises(RuntimeError, match=r"no interleaving|an even number"):
            torch.ops.padst_native.interleave_blocks(values, pointers, columns, 4, 4)


def test_padding_of_ragged_blocks_never_counts() -> None:
    """Weights of inputs that do not exist are ignored, even NaN."""
    pointers, columns = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0], dtype=torch.int32)
    values = torch.ones(1, 4, 4).bfloat16()
    values[:, 3:] = float("nan")
    x = torch.ones(2, 3).bfloat16()
    arranged = torch.ops.padst_native.interleave_blocks(values, pointers, columns, 3, 4)
    result = torch.ops.padst_native.block_linear(x, arranged, pointers, columns, None, None, None, 4)
    assert torch.equal(result, torch.full((2, 4), 3.0).bfloat16())
    torch.library.opcheck(torch.ops.padst_native.interleave_blocks.default, (values.nan_to_num(), pointers, columns, 3, 4))
