"""row_gather(x, V, …)  ==  row_gather(x, float(V), …)"""

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
from padst_compile.passes.native_calls import is_row_gather
from padst_compile.testing.new_weights import assert_new_weights_are_followed

pytestmark = pytest.mark.skipif(not native.load(), reason=f"no native kernels: {native.unavailable_reason()}")

STRUCTURES = ["nm:1:4", "nm:1:4:2", "diagonal"]


class Product(nn.Module):
    """One layer."""

    def __init__(self, structure: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        dense = nn.Sequential(nn.Linear(32, 24))
        self.layer = padst.sparsify(dense, padst.SparsitySpec(structure, 0.75, permutation="random"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)  # type: ignore[no-any-return]  # a Sequential


def apply(model: nn.Module, x: torch.Tensor) -> tuple[RuleReport, torch.dtype, torch.Tensor]:
    """What the pass reports, the dtype of the values that the product then takes, and the result; every pass is verified."""
    reports: list[RuleReport] = []
    dtypes: list[torch.dtype] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        def compiler(module: fx.GraphModule, inputs: list[Any]) -> Any:
            fakes = dict(zip((node for node in module.graph.nodes if node.op == "placeholder"), inputs, strict=True))
            (product,) = (node for node in module.graph.nodes if is_row_gather(node) or "structured" in str(node.target))
            dtypes.append(fakes[argument(product, "values")].dtype)
            return module

        program, compilation = compile_graph(gm, inputs, Options(kernels="sparse", verify=True), compiler)
        reports.extend(report for report in compilation.report.rules if report.rule == "WidenValues")
        return program

    result = torch.compile(model, backend=backend, fullgraph=True)(x)
    return reports[0], dtypes[0], result


@pytest.mark.parametrize("tokens", [1, 5, 70])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_weights_are_converted_once_and_nothing_changes(structure: str, dtype: torch.dtype, tokens: int) -> None:
    model, x = Product(structure).to(dtype), torch.randn(tokens, 32).to(dtype)
    with torch.no_grad():
        report, values, result = apply(model, x)
        torch.testing.assert_close(result, model(x), rtol=0, atol=0)
    assert (report.rewritten, values) == (1, torch.float32)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_new_weights_are_converted_again(structure: str) -> None:
    assert_new_weights_are_followed(Product(structure).bfloat16(), torch.randn(5, 32).bfloat16())


def test_weights_that_autocast_rounds_stay_rounded() -> None:
    model, x = Product("nm:1:4"), torch.randn(5, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        report, values, result = apply(model, x)
        torch.testing.assert_close(result, model(x), rtol=0, atol=0)
    assert (report.rewritten, values) == (1, torch.float32)


def test_float32_is_left_alone() -> None:
    with torch.no_grad():
        report, values, _ = apply(Product("nm:1:4"), torch.randn(5, 32))
    assert (report.rewritten, report.refusals, values) == (0, [], torch.float32)


def test_training_keeps_the_weights_as_they_are() -> None:
    report, values, _ = apply(Product("nm:1:4").bfloat16(), torch.randn(5, 32).bfloat16())
    assert (report.rewritten, report.refusals, values) == (0, [], torch.bfloat16)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_operators_take_float32_weights_and_no_others(structure: str) -> None:
    layer: Any = Product(structure).layer[0]
    x = torch.randn(3, 32).bfloat16()
    sizes = (1, 4) if structure.startswith("nm") else ()
    op = getattr(torch.ops.padst_native, "nm_linear" if sizes else "diagonal_linear")
    values = layer.values.detach().bfloat16()
    around = (*layer.topology, None, None, None, 24, *sizes)
    assert torch.equal(op(x, values.float(), *around), op(x, values, *around))
    for x_dtype, dtype in ((torch.bfloat16, torch.float16), (torch.float32, torch.bfloat16)):
        with pytest.raises(RuntimeError, match="but values are"):
            op(x.to(x_dtype), values.to(dtype), *around)
