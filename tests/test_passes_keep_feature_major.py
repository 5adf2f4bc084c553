"""row_gather(row_gather(x, S), T)  ==  row_gather(row_gather(x, S, to_panels), T, panels_of=sizes of x)"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import fx, nn

import padst_compile as padst
from padst_compile.backend import compile_graph
from padst_compile.kernels import native
from padst_compile.options import Options
from padst_compile.passes.graph import argument
from padst_compile.passes.native_calls import is_row_gather, layouts

pytestmark = pytest.mark.skipif(not native.load(), reason=f"no native kernels: {native.unavailable_reason()}")

STRUCTURES = ["nm:1:4", "nm:1:4:2", "diagonal"]


class Model(nn.Module):
    """Layers that meet in the way that `forward` of a subclass says."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.middle, self.down = nn.Linear(16, 24), nn.Linear(24, 24), nn.Linear(24, 16)


class Chain(Model):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.middle(nn.functional.gelu(self.up(x)))))


class Siblings(Model):
    """Two products read one result."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.up(x)
        return self.down(hidden) + self.middle(hidden)[..., :16]


class AnotherReader(Model):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.up(x)
        return self.down(hidden) + hidden.mean()


class Returned(Model):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.up(x)
        return self.down(hidden), hidden


class OwnResidual(Model):
    """One product reads another one both as activations and as what it adds."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.up(x)
        return self.middle(hidden) + hidden


class AddedBefore(Model):
    """What the second product reads has a residual of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = torch.cat([x, x[..., :8]], -1)
        return self.down(self.up(x) + wide)


class Reshaped(Model):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).flip(0))


@dataclasses.dataclass
class Outcome:
    """What a compilation did."""

    rewritten: int
    reasons: list[str]
    layouts: list[tuple[str, ...]]


def apply(model: nn.Module, x: torch.Tensor, **options: Any) -> tuple[Outcome, Any]:
    """Compile with every pass verified, and run."""
    outcomes: list[Outcome] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        chosen = Options(kernels="sparse", verify=True, **options)
        program, compilation = compile_graph(gm, inputs, chosen, lambda module, _: module)
        (report,) = (report for report in compilation.report.rules if report.rule == "KeepFeatureMajor")
        reasons = [refusal.reason for refusal in report.refusals]
        calls = [node for node in compilation.graph.graph.nodes if is_row_gather(node)]
        outcomes.append(Outcome(report.rewritten, reasons, [layouts(node) for node in calls]))
        return program

    result = torch.compile(model, backend=backend, fullgraph=True)(x)
    return outcomes[0], result


def sparse(kind: type[Model], structure: str) -> nn.Module:
    torch.manual_seed(0)
    sparsity = 0.75
    return padst.sparsify(kind(), padst.SparsitySpec(structure, sparsity, permutation="random")).eval()


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("sizes", [(7,), (3, 70), (2, 1, 4)], ids=str)
def test_a_chain_stays_feature_major(structure: str, sizes: tuple[int, ...]) -> None:
    model, x = sparse(Chain, structure), torch.randn(*sizes, 16)
    with torch.no_grad():
        outcome, result = apply(model, x)
        torch.testing.assert_close(result, model(x), rtol=1e-5, atol=1e-5)
    assert outcome.rewritten == 2
    assert outcome.layouts == [
        ("feature-major output",),
        ("feature-major input", "feature-major output"),
        ("feature-major input",),
    ]


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_result_that_two_products_read_stays_feature_major(structure: str) -> None:
    model, x = sparse(Siblings, structure), torch.randn(3, 70, 16)
    with torch.no_grad():
        outcome, result = apply(model, x)
        torch.testing.assert_close(result, model(x), rtol=1e-5, atol=1e-5)
    assert outcome.rewritten == 1
    assert outcome.layouts.count(("feature-major input",)) == 2


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (AnotherReader, "reads the result too"),
        (Returned, "reads the result too"),
        (AddedBefore, "the kernel adds a residual, which is token-major"),
    ],
)
def test_what_must_stay_token_major_does(kind: type[Model], reason: str) -> None:
    model, x = sparse(kind, "nm:1:4"), torch.randn(70, 16)
    with torch.no_grad():
        outcome, result = apply(model, x)
        torch.testing.assert_close(result, model(x), rtol=1e-5, atol=1e-5)
    assert outcome.rewritten == 0
    assert len(outcome.reasons) == 1
    assert reason in outcome.reasons[0]
    assert set(outcome.layouts) == {()}


@pytest.mark.parametrize("kind", [Reshaped, OwnResidual])
def test_products_that_do_not_feed_each_other_alone_are_no_match(kind: type[Model]) -> None:
    model, x = sparse(kind, "nm:1:4"), torch.randn(70, 16)
    with torch.no_grad():
        outcome, result = apply(model, x)
        torch.testing.assert_close(result, model(x), rtol=1e-5, atol=1e-5)
    assert (outcome.rewritten, outcome.reasons) == (0, [])


def test_open_sizes_compile_once() -> None:
    model = sparse(Chain, "diagonal")
    compilations: list[list[Any]] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        program, compilation = compile_graph(gm, inputs, Options(kernels="sparse"), lambda module, _: module)
        calls = [node for node in compilation.graph.graph.nodes if is_row_gather(node)]
        compilations.append([argument(node, "panels_of") for node in calls])
        return program

    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for tokens in (5, 70, 129):
            x = torch.randn(2, tokens, 16)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    assert len(compilations) == 1
    assert any(isinstance(size, fx.Node) for size in compilations[0][1])


def test_inductor_compiles_open_sizes_twice_at_most() -> None:
    """Once for tokens that fill one panel or less, once for more: PyTorch treats a size of one apart."""
    model = sparse(Chain, "nm:1:4")
    compiled = torch.compile(model, backend=padst.backend.padst, options={"kernels": "sparse"}, dynamic=True, fullgraph=True)
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        for tokens in (5, 70, 129, 9, 300):
            x = torch.randn(2, tokens, 16)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize("sizes", [(), (0,), (6,), (2, 3)], ids=str)
def test_a_handful_of_tokens_is_left_alone(sizes: tuple[int, ...]) -> None:
    model, x = sparse(Chain, "nm:1:4"), torch.randn(*sizes, 16)
    with torch.no_grad():
        outcome, _ = apply(model, x)
    assert outcome.rewritten == 0


def test_training_is_left_alone() -> None:
    model, x = sparse(Chain, "nm:1:4"), torch.randn(5, 16)
    outcome, _ = apply(model, x)
    assert (outcome.rewritten, outcome.layouts) == (0, [])


def test_blocks_are_left_alone() -> None:
    model, x = sparse(Chain, "block:4"), torch.randn(5, 16)
    with torch.no_grad():
        outcome, _ = apply(model, x)
    assert (outcome.rewritten, outcome.layouts) == (0, [])
