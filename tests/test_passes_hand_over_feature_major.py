"""triton_linear(triton_linear(x, S), T)  ==  triton_linear(triton_linear(x, S, feature_major), T)"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import padst_compile as padst
from padst_compile.autotune import lookup
from padst_compile.autotune.entry import Entry, Timing
from padst_compile.autotune.space import Candidate
from padst_compile.autotune.tiles import find, launch_key, recorded
from padst_compile.backend import compile_graph
from padst_compile.kernels import dispatch, triton_support
from padst_compile.kernels.launch import Problem
from padst_compile.options import Options
from padst_compile.passes.choose_kernels import ChooseKernels
from padst_compile.passes.context import Context
from padst_compile.passes.fuse_activation import FuseActivation
from padst_compile.passes.fuse_gate import FuseGate
from padst_compile.passes.fuse_input_permutation import FuseInputPermutation
from padst_compile.passes.graph import set_arguments
from padst_compile.passes.hand_over_feature_major import HandOverFeatureMajor
from padst_compile.passes.native_calls import is_triton_linear, layouts
from padst_compile.structures import NM, Block, Diagonal, Structure, parse
from padst_compile.testing.capture import capture

READS, WRITES = "feature-major input", "feature-major output"
TOKENS = 32
GAINING = ["nm:1:4", "nm:1:4:16", "diagonal"]


class Model(nn.Module):
    """Layers that meet in the way that `forward` of a subclass says; whole numbers, so that results are exact."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.middle, self.down = nn.Linear(32, 48), nn.Linear(48, 48), nn.Linear(48, 32)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -2, 2)
            parameter.data.round_()


class Chain(Model):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.middle(torch.relu(self.up(x)))))


class Siblings(Model):
    """Two products read one result."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.up(x)
        return self.down(hidden) + self.middle(hidden)[..., :32]


class Gated(Model):
    """The product that the others gate is computed from the same inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(32, 48)
        nn.init.uniform_(self.gate.weight, -2, 2).data.round_()
        nn.init.zeros_(self.gate.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.gate(x)) * self.up(x))


class GatedByInput(Model):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x) * torch.cat([x, x[..., :16]], -1))


class GatedByItsInput(Model):
    """What gates the second product is also what it reads."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.up(x)
        return self.down(self.middle(hidden) * hidden)


class AnotherReader(Model):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.up(x)
        return self.down(hidden) + hidden.sum()


class Returned(Model):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.up(x)
        return self.down(hidden), hidden


class AddedBefore(Model):
    """What the second product reads has a residual of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x) + torch.cat([x, x[..., :16]], -1))


class OwnResidual(Model):
    """One product reads another one both as activations and as what it adds."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.up(x)
        return self.middle(hidden) + hidden


class DenseReader(Model):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.up(x)
        return F.linear(hidden, torch.ones(32, 48, dtype=x.dtype, device=x.device)) + self.down(hidden)


@dataclasses.dataclass
class Outcome:
    """What a compilation did."""

    rewritten: int
    reasons: list[str]
    layouts: list[tuple[str, ...]]
    launches: list[str]


def apply(model: nn.Module, x: torch.Tensor, **options: Any) -> tuple[Outcome, Any]:
    """Compile with every pass verified, and run."""
    outcomes: list[Outcome] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        chosen = Options(kernels="sparse", verify=True)
        program, compilation = compile_graph(gm, inputs, chosen, lambda module, _: module)
        (report,) = (report for report in compilation.report.rules if report.rule == "HandOverFeatureMajor")
        reasons = [refusal.reason for refusal in report.refusals]
        calls = [node for node in compilation.graph.graph.nodes if is_triton_linear(node)]
        outcomes.append(Outcome(report.rewritten, reasons, [layouts(node) for node in calls], []))
        return program

    compiled = torch.compile(model, backend=backend, fullgraph=True, **options)
    compiled(x)
    with recorded() as problems:
        result = compiled(x)
    outcomes[0].launches = [problem.layout for problem in problems]
    return outcomes[0], result


def sparse(kind: type[Model], structure: str, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    return padst.sparsify(kind(), padst.SparsitySpec(structure, 0.75, permutation="random")).eval().to(device)


def whole(*sizes: int, device: torch.device) -> torch.Tensor:
    return torch.randint(-1, 2, sizes, device=device).float()


def assert_exact(model: nn.Module, x: torch.Tensor, result: Any) -> None:
    """Sums of whole numbers are the same in any order."""
    expected = padst.densify(copy.deepcopy(model)).double()(x.double())
    for found, exact in zip(*(item if isinstance(item, tuple) else (item,) for item in (result, expected)), strict=True):
        assert torch.equal(found.double(), exact)


@pytest.mark.parametrize("structure", GAINING)
@pytest.mark.parametrize("sizes", [(16,), (2, 40)], ids=str)
def test_a_chain_stays_feature_major(structure: str, sizes: tuple[int, ...], triton_device: torch.device) -> None:
    model, x = sparse(Chain, structure, triton_device), whole(*sizes, 32, device=triton_device)
    with torch.no_grad():
        outcome, result = apply(model, x)
        assert_exact(model, x, result)
    assert outcome.rewritten == 2
    assert outcome.layouts == [(WRITES,), (READS, WRITES), (READS,)]
    assert outcome.launches == ["token/feature", "feature/feature", "feature/token"]


@pytest.mark.parametrize("structure", GAINING)
def test_a_result_that_two_products_read(structure: str, triton_device: torch.device) -> None:
    model, x = sparse(Siblings, structure, triton_device), whole(TOKENS, 32, device=triton_device)
    with torch.no_grad():
        outcome, result = apply(model, x)
        assert_exact(model, x, result)
    assert outcome.rewritten == 1 and outcome.layouts.count((READS,)) == 2


@pytest.mark.parametrize("structure", GAINING)
def test_a_gate_is_left_feature_major_too(structure: str, triton_device: torch.device) -> None:
    model, x = sparse(Gated, structure, triton_device), whole(TOKENS, 32, device=triton_device)
    with torch.no_grad():
        outcome, result = apply(model, x)
        assert_exact(model, x, result)
    assert outcome.rewritten == 1
    assert outcome.layouts == [(WRITES,), (WRITES,), (READS,)]
    assert outcome.launches == ["token/feature", "token/feature", "feature/token"]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (AnotherReader, "reads the result too"),
        (Returned, "reads the result too"),
        (DenseReader, "reads the result too"),
        (AddedBefore, "the kernel adds a residual, which is token-major"),
        (GatedByInput, "the kernel reads a gate, which is token-major"),
        (GatedByItsInput, "the kernel reads a gate, which is token-major"),
    ],
)
def test_what_must_stay_token_major_does(kind: type[Model], reason: str, triton_device: torch.device) -> None:
    model, x = sparse(kind, "nm:1:4", triton_device), whole(TOKENS, 32, device=triton_device)
    with torch.no_grad():
        outcome, result = apply(model, x)
        assert_exact(model, x, result)
    assert outcome.rewritten == 0 and set(outcome.layouts) == {()}
    assert any(reason in found for found in outcome.reasons)


def test_what_is_added_to_its_own_reader_is_no_match(triton_device: torch.device) -> None:
    model, x = sparse(OwnResidual, "nm:1:4", triton_device), whole(TOKENS, 32, device=triton_device)
    with torch.no_grad():
        outcome, result = apply(model, x)
        assert_exact(model, x, result)
    assert (outcome.rewritten, outcome.reasons) == (0, [])


@pytest.mark.parametrize("sizes", [(), (3, 5), (2, 12)], ids=str)
def test_runs_of_tokens_that_no_16_bytes_align_with(sizes: tuple[int, ...], triton_device: torch.device) -> None:
    model, x = sparse(Chain, "nm:1:4", triton_device), whole(*sizes, 32, device=triton_device)
    with torch.no_grad():
        outcome, result = apply(model, x)
        assert_exact(model, x, result)
    assert outcome.rewritten == 0
    assert outcome.reasons == ["the number of tokens is not known to be a multiple of 16"] * 2


def test_no_tokens(triton_device: torch.device) -> None:
    model, x = sparse(Chain, "nm:1:4", triton_device), whole(0, 16, 32, device=triton_device)
    with torch.no_grad():
        _, result = apply(model, x)
    assert result.shape == x.shape


@pytest.mark.parametrize(("first", "second"), [("nm:1:4", "block:16"), ("block:16", "block:16"), ("block:16", "nm:1:4:16")])
@pytest.mark.parametrize("permuted", [True, False])
def test_what_blocks_read_feature_by_feature(first: str, second: str, permuted: bool, triton_device: torch.device) -> None:
    """Through a table; without one they read runs of features, and a result that others read as well stays token-major."""
    torch.manual_seed(0)
    model = Siblings()
    for name, structure in (("up", first), ("middle", second), ("down", second)):
        sparsity = parse(structure).natural_sparsity() or 0.5
        spec = padst.SparsitySpec(structure, sparsity, permutation="random" if permuted else "none")
        setattr(model, name, padst.sparsify(nn.Sequential(getattr(model, name)), spec)[0])
    model, x = model.eval().to(triton_device), whole(TOKENS, 32, device=triton_device)
    with torch.no_grad():
        facts = capture(model, x).context(inference=True)
        for rule in (FuseInputPermutation(), ChooseKernels("sparse")):
            rule.run(facts)
        report = HandOverFeatureMajor().run(facts)
        facts.module.recompile()
        result = torch.compile(model, backend=lambda graph, inputs: facts.module.forward)(x)
        assert_exact(model, x, result)
    gains = permuted or second != "block:16"
    calls = [layouts(node) for node in facts.module.graph.nodes if is_triton_linear(node)]
    assert calls == ([(WRITES,), (READS,), (READS,)] if gains else [()] * 3)
    assert gains or "gains nothing: it reads runs of features" in report.refusals[0].reason


DEVICES = {name: f"{name} {capability}" for name, capability in (("A100", "(8.0)"), ("H200", "(9.0)"), ("B200", "(10.0)"))}


@pytest.mark.parametrize(
    ("structure", "problem", "reason"),
    [
        (Block(64), {"permuted": "in"}, None),
        (Block(64), {"permuted": "in+out", "dtype": "float32"}, None),
        (Block(16), {"permuted": "in"}, None),
        (Block(64), {"permuted": "out"}, "runs of features"),
        (Block(64), {}, "runs of features"),
        (Block((24, 40)), {"permuted": "in"}, "no 16 bytes align"),
        (Block(64), {"permuted": "in", "dtype": "float32", "precision": "tf32"}, "TF32"),
        (Block(64), {"permuted": "in", "dtype": "float32", "precision": "tf32x3"}, None),
        (NM(1, 4), {}, None),
        (NM(1, 4), {"dtype": "float32", "precision": "tf32"}, None),
        (NM(1, 4, 16), {}, None),
        (NM(1, 4, 16), {"dtype": "float32", "precision": "tf32"}, "TF32"),
        (Diagonal(), {}, None),
        (Diagonal(), {"dtype": "float32", "precision": "tf32"}, None),
    ],
    ids=str,
)
def test_who_gains_by_adjacent_tokens(structure: Structure, problem: dict[str, str], reason: str | None) -> None:
    with triton_support.interpreted():
        product = dispatch.triton_product(structure, torch.device("cpu"), torch.float32)
    assert product is not None
    for name, device in DEVICES.items():
        launch = Problem(
            f"{structure.kind}_forward", structure.to_string(), 3072, 768, 1 << 16, 4096, "bfloat16", device=device
        )
        found = product.why_token_major(dataclasses.replace(launch, **problem))
        if reason is None or (reason == "TF32" and name == "A100"):
            assert found is None
        else:
            assert found is not None and reason in found


def test_open_sizes(triton_device: torch.device) -> None:
    """Nothing is known of a size that is open, unless it is a multiple of what must divide it."""
    model = sparse(Chain, "diagonal", triton_device)
    x = whole(3, 16, 32, device=triton_device)
    with torch.no_grad():
        outcome, result = apply(model, x, dynamic=True)
        assert_exact(model, x, result)
        assert outcome.rewritten == 0
        torch._dynamo.reset()
        torch._dynamo.mark_dynamic(x, 0)
        outcome, result = apply(model, x)
        assert_exact(model, x, result)
        assert outcome.rewritten == 2


def lowered(model: nn.Module, x: torch.Tensor) -> Context:
    """The graph of a model with all products on Triton, as the pass finds it."""
    facts = capture(model, x).context(inference=True)
    for rule in (FuseInputPermutation(), ChooseKernels("sparse"), FuseActivation(), FuseGate()):
        rule.run(facts)
    return facts


def launches(facts: Context, model: nn.Module, x: torch.Tensor) -> list[Problem]:
    """What a run of the graph launches."""
    facts.module.recompile()
    run = torch.compile(model, backend=lambda graph, inputs: facts.module.forward)
    run(x)
    with recorded() as problems:
        run(x)
    return problems


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own for measurements."""
    monkeypatch.setenv("PADST_CACHE_DIR", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("autocast", [False, True])
def test_both_layouts_are_measured_and_found_by_launches(autocast: bool, triton_device: torch.device, results: Path) -> None:
    model, x = sparse(Gated, "nm:1:4:16", triton_device), whole(16, 32, device=triton_device)
    with torch.no_grad(), torch.autocast(triton_device.type, torch.bfloat16, enabled=autocast):
        facts = lowered(model, x)
        before = launches(facts, model, x)
        HandOverFeatureMajor(measure=True, effort="quick").run(facts)
        for call in facts.module.graph.nodes:
            if is_triton_linear(call):
                set_arguments(call, feature_major=False)
        assert HandOverFeatureMajor(measure=True, effort="off").run(facts).rewritten == 1
        after = launches(facts, model, x)
    assert [launch.layout for launch in before] == ["token/token"] * 3
    assert [launch.layout for launch in after] == ["token/feature", "token/feature", "feature/token"]
    for launch in (*before, *after):
        found = find(launch_key(launch))
        assert found is not None and found.source == "cached" and len(found.entry.timings) > 1


@pytest.mark.parametrize(("slower", "rewritten"), [(0.5, 1), (1.04, 1), (2.0, 0), (None, 1)])
def test_known_times_decide(slower: float | None, rewritten: int, triton_device: torch.device, results: Path) -> None:
    """What is known of both layouts, and is slower by more than noise, speaks against it; nothing is measured for that."""
    model, x = sparse(Siblings, "nm:1:4", triton_device), whole(16, 32, device=triton_device)
    with torch.no_grad():
        facts = lowered(model, x)
        problems = launches(facts, model, x)
        for problem in problems:
            sides = ("feature", "token") if problem.in_features == 48 else ("token", "feature")
            for layout, seconds in (("token/token", 1.0), ("/".join(sides), slower)):
                if seconds is not None:
                    entry = Entry("quick", (Timing(Candidate(problem.kernel), seconds),))
                    lookup.library().cache.write(launch_key(dataclasses.replace(problem, layout=layout)), entry)
        stored = len(list(results.rglob("*.json")))
        report = HandOverFeatureMajor(measure=True, effort="cached").run(facts)
    assert report.rewritten == rewritten and len(list(results.rglob("*.json"))) == stored
    assert rewritten or "the products take 2.00 of their time" in report.refusals[0].reason


def test_training_is_left_alone(triton_device: torch.device) -> None:
    model, x = sparse(Chain, "nm:1:4", triton_device), whole(TOKENS, 32, device=triton_device)
    outcome, _ = apply(model, x)
    assert (outcome.rewritten, outcome.layouts) == (0, [])
