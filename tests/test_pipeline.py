"""The passes together: over models traced in every way, with the reports they give and the errors they raise."""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.nn import functional as F

import padst_compile as padst
from padst_compile import passes
from padst_compile.errors import PadstError, PatternError, UnknownFieldError, UnsupportedGraphError
from padst_compile.passes.graph import PERMUTE, STRUCTURED_LINEAR
from padst_compile.passes.pipeline import RULES, PermutationAccount, Pipeline

SPEC = padst.SparsitySpec(structure="block:4", sparsity=0.5, permutation="random")
STRUCTURES = ("block:4", "nm:1:4", "nm:2:4:4", "diagonal", "diagonal:4", "unstructured")


def whole(model: nn.Module) -> nn.Module:
    """The model in float64 with small whole numbers as parameters."""
    generator = torch.Generator().manual_seed(0)
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-2, 3, parameter.shape, generator=generator))
    return model.eval()


def mlp() -> nn.Module:
    return whole(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 8)))


def sample(*shape: int) -> torch.Tensor:
    return torch.randint(-3, 4, shape or (3, 8), generator=torch.Generator().manual_seed(1)).double()


def graph_text(module: fx.GraphModule) -> tuple[str, list[str]]:
    return str(module.graph), sorted(module.state_dict())


# --- already sparse models ---


def by_export(strict: bool) -> Callable[[nn.Module, torch.Tensor], Any]:
    return lambda model, x: torch.export.export(model, (x,), strict=strict).module()


@pytest.mark.parametrize(
    "capture",
    [lambda model, x: fx.symbolic_trace(model), by_export(strict=False), by_export(strict=True)],
    ids=["symbolic_trace", "export", "strict export"],
)
@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_sparse_model_is_traced_and_its_permutations_placed(capture: Callable[..., Any], structure: str, side: Any) -> None:
    sparsity = None if structure.startswith("nm") else 0.5
    spec = padst.SparsitySpec(structure=structure, sparsity=sparsity, permutation="random", permutation_side=side)
    model, x = padst.sparsify(mlp(), spec), sample()
    graph = capture(model, x)
    report = passes.run(graph)
    graph.graph.lint()
    assert (report.permutations.total, report.permutations.fused, report.permutations.remaining) == (3, 3, 0)
    assert graph.graph.find_nodes(op="call_function", target=PERMUTE) == []
    assert torch.equal(graph(x), model(x))


def test_the_traced_sparse_model_follows_its_parameters() -> None:
    model, x = padst.sparsify(mlp(), SPEC), sample()
    graph = fx.symbolic_trace(model)
    passes.run(graph)
    for _, layer in padst.sparse_layers(model):
        layer.set_permutation(layer.permutation.flip(0))
        with torch.no_grad():
            layer.values.mul_(2)
    assert torch.equal(graph(x), model(x))


# --- whole models ---


def test_a_vision_transformer_from_timm_by_symbolic_trace() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32).double().eval()
    model.blocks = model.blocks[:1]
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    spec = padst.SparsitySpec(structure="block:16", sparsity=0.75, permutation="random")
    expected = padst.sparsify(copy.deepcopy(model), spec)(x)
    graph = fx.symbolic_trace(model)
    report = passes.run(graph, spec)
    assert (report.rules[0].rewritten, report.permutations.remaining) == (4, 0)
    torch.testing.assert_close(graph(x), expected, rtol=1e-12, atol=1e-12)


def test_a_mixer_from_timm_by_symbolic_trace_and_export() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("mixer_s32_224", img_size=64).double().eval()
    model.blocks = model.blocks[:1]
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    spec = padst.SparsitySpec(structure="diagonal", sparsity=0.75, permutation="random")
    expected = padst.sparsify(copy.deepcopy(model), spec)(x)
    for graph in (fx.symbolic_trace(model), by_export(strict=False)(model, x)):
        assert passes.run(graph, spec).rules[0].rewritten == 4
        torch.testing.assert_close(graph(x), expected, rtol=1e-12, atol=1e-12)


# --- training and saving ---


@pytest.mark.parametrize("capture", [lambda model, x: fx.symbolic_trace(model), by_export(strict=False)])
def test_the_result_trains_and_saves(capture: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)), torch.randn(32, 8)
    graph = capture(model, x)
    passes.run(graph, SPEC)
    parameters = dict(graph.named_parameters())
    assert sorted(name.rsplit(".")[-1] for name in parameters) == ["bias", "bias", "values", "values"]
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (graph(x) - x).square().mean()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters.values())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    file, result = io.BytesIO(), graph(x)
    torch.save(graph.state_dict(), file)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.zero_()
    file.seek(0)
    graph.load_state_dict(torch.load(file))
    assert torch.equal(graph(x), result)


# --- errors ---


@pytest.mark.parametrize(
    ("spec", "example_inputs", "kwargs", "error", "message"),
    [
        (padst.SparsitySpec("block:4", 0.5, targets=("nothing.*",)), None, {}, PatternError, "nothing"),
        (padst.SparsitySpec("block:4", 0.5, ignore=("*",)), None, {}, PadstError, "no layer would become sparse"),
        (padst.SparsitySpec("diagonal:7", 0.5), None, {}, PadstError, "diagonal|Diagonal"),
        ("block:4", None, {}, PatternError, "expected a SparsitySpec"),
        (SPEC, [], {}, UnsupportedGraphError, "the graph has 1 inputs, but example_inputs has 0"),
        (SPEC, [1, 2], {}, UnsupportedGraphError, "the graph has 1 inputs, but example_inputs has 2"),
        (SPEC, None, {"disabled": ["AbsorbBais"]}, UnknownFieldError, "did you mean 'AbsorbBias'"),
    ],
)
def test_a_wrong_request_is_named_and_leaves_the_graph_alone(
    spec: Any, example_inputs: Any, kwargs: Any, error: type[Exception], message: str
) -> None:
    graph = fx.symbolic_trace(mlp())
    before = graph_text(graph)
    with pytest.raises(error, match=message):
        passes.run(graph, spec, example_inputs, **kwargs)
    assert graph_text(graph) == before


def test_a_module_that_is_no_graph_is_refused() -> None:
    with pytest.raises(UnsupportedGraphError, match=r"not Sequential; use padst\.sparsify for a module"):
        passes.run(mlp(), SPEC)  # type: ignore[arg-type]  # the mistake


# --- reports, dumps, switches ---


def test_a_second_run_changes_nothing() -> None:
    graph = fx.symbolic_trace(mlp())
    passes.run(graph, SPEC)
    before = graph_text(graph)
    report = passes.run(graph)
    assert [rule.rewritten for rule in report.rules] == [0] * len(report.rules)
    assert graph_text(graph) == before


@pytest.mark.parametrize("rule", [rule.__name__ for rule in RULES])
def test_a_disabled_rule_does_not_run_and_the_rest_is_still_right(rule: str) -> None:
    model, x = padst.sparsify(mlp(), SPEC), sample()
    graph = fx.symbolic_trace(model)
    report = passes.run(graph, disabled=[rule])
    assert rule not in [r.rule for r in report.rules]
    assert torch.equal(graph(x), model(x))


def test_a_dump_holds_the_graph_before_and_after_every_rule_that_fired(tmp_path: Path) -> None:
    passes.run(fx.symbolic_trace(mlp()), SPEC, dump=tmp_path / "graphs")
    names = sorted(file.name for file in (tmp_path / "graphs").iterdir())
    assert names == ["000_captured.py", "001_SparsifyLinears.py", "002_FuseInputPermutation.py"]
    text = (tmp_path / "graphs" / names[-1]).read_text()
    assert "def forward(self" in text
    assert "torch.ops.padst.structured_linear" in text
    compile(text, names[-1], "exec")


def test_a_second_dump_does_not_overwrite_the_first(tmp_path: Path) -> None:
    for _ in range(2):
        passes.run(fx.symbolic_trace(mlp()), SPEC, dump=tmp_path)
    assert len(list(tmp_path.iterdir())) == 6


def test_accounts_add_up() -> None:
    one, two = PermutationAccount(3, 1, 0, 0, 2, 0), PermutationAccount(1, 0, 1, 0, 0, 0)
    assert one + two == PermutationAccount(4, 1, 1, 0, 2, 0)


def test_permutations_of_neighbouring_layers_meet_through_a_norm() -> None:
    class Post(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.norm, self.two = nn.Linear(8, 8, bias=False), nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x: Any) -> Any:
            return self.two(F.layer_norm(F.relu(self.one(x)), (8,), self.norm.weight, self.norm.bias))

    out = padst.SparsitySpec("block:4", 0.5, permutation="random", permutation_side="output")
    model = padst.sparsify(whole(Post()), {"one": out, "two": SPEC})
    graph, x = fx.symbolic_trace(model), sample()
    report = passes.run(graph)
    assert report.permutations.remaining == 0
    torch.testing.assert_close(graph(x), model(x), rtol=1e-12, atol=1e-12)


def test_a_permuted_output_with_two_readers_goes_into_the_store_and_not_into_one_load() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 8, bias=False), nn.Linear(8, 8)

        def forward(self, x: Any) -> Any:
            y = self.one(x)
            return y + self.two(y)

    out = padst.SparsitySpec("block:4", 0.5, permutation="random", permutation_side="output")
    model = padst.sparsify(whole(Residual()), out)
    graph, x = fx.symbolic_trace(model), sample()
    assert passes.run(graph).permutations == PermutationAccount(total=2, fused=2, remaining=0)
    assert torch.equal(graph(x), model(x))


# --- generated models ---


class Generated(nn.Module):
    """A chain of steps, each of them `[..., 8] -> [..., 8]`."""

    def __init__(self, steps: list[str]) -> None:
        super().__init__()
        self.steps = steps
        self.layers = nn.ModuleDict()
        for number, step in enumerate(steps):
            for part in {"linear": "a", "no bias": "a", "residual": "ab", "gate": "abc"}.get(step, ""):
                narrows, widens = (step, part) in (("gate", "c"), ("residual", "b")), step in ("gate", "residual")
                sizes = (16, 8) if narrows else (8, 16 if widens else 8)
                self.layers[f"{number}{part}"] = nn.Linear(*sizes, bias=step != "no bias")
            if step == "layer norm":
                self.layers[f"{number}n"] = nn.LayerNorm(8)
            if step == "rms norm":
                self.layers[f"{number}n"] = nn.RMSNorm(8)

    def forward(self, x: Any) -> Any:
        for number, step in enumerate(self.steps):
            layer = {name[-1]: self.layers[name] for name in self.layers if name[:-1] == str(number)}
            if step in ("linear", "no bias"):
                x = layer["a"](x)
            elif step == "residual":
                x = x + layer["b"](F.relu(layer["a"](x)))
            elif step == "gate":
                x = layer["c"](F.relu(layer["a"](x)) * layer["b"](x))
            elif step in ("layer norm", "rms norm"):
                norm = layer["n"]
                if step == "layer norm":
                    x = F.layer_norm(x, (8,), norm.weight, norm.bias, eps=1e-5)
                else:
                    x = F.rms_norm(x, (8,), norm.weight, eps=1e-5)
            else:
                x = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}[step](x)
        return x


EXACT = ("linear", "no bias", "residual", "gate", "relu")
ROUNDED = (*EXACT, "layer norm", "rms norm", "gelu", "silu")


@st.composite
def specs(draw: st.DrawFn) -> padst.SparsitySpec:
    structure = draw(st.sampled_from(STRUCTURES))
    return padst.SparsitySpec(
        structure=structure,
        sparsity=None if structure.startswith("nm") else draw(st.sampled_from([0.25, 0.5])),
        permutation=draw(st.sampled_from(["none", "random", "learned"])),
        permutation_side=draw(st.sampled_from(["input", "output", "smaller"])),
        seed=draw(st.integers(0, 5)),
    )


@given(steps=st.lists(st.sampled_from(EXACT), min_size=1, max_size=3).map(lambda steps: [*steps, "linear"]), spec=specs())
@settings(max_examples=40)
def test_generated_models_of_whole_numbers_are_exactly_kept(steps: list[str], spec: padst.SparsitySpec) -> None:
    model, x = whole(Generated(steps)), sample()
    expected = padst.sparsify(copy.deepcopy(model), spec)(x)
    assume(expected.abs().max() < 2**53)  # whole numbers up to here are exact
    graph = fx.symbolic_trace(model)
    report = passes.run(graph, spec)
    account = report.permutations
    assert account.total == account.composed + account.cancelled + account.folded + account.fused + account.remaining
    assert torch.equal(graph(x), expected)


@given(steps=st.lists(st.sampled_from(ROUNDED), min_size=1, max_size=5).map(lambda steps: [*steps, "linear"]), spec=specs())
@settings(max_examples=40)
def test_generated_models_are_kept_within_rounding(steps: list[str], spec: padst.SparsitySpec) -> None:
    torch.manual_seed(0)
    model, x = Generated(steps).double().eval(), torch.randn(3, 8, dtype=torch.float64)
    expected = padst.sparsify(copy.deepcopy(model), spec)(x)
    graph = fx.symbolic_trace(model)
    passes.run(graph, spec)
    torch.testing.assert_close(graph(x), expected, rtol=1e-10, atol=1e-11)


def test_every_pair_of_rules_may_be_disabled() -> None:
    model, x = padst.sparsify(mlp(), SPEC), sample()
    for pair in itertools.combinations([rule.__name__ for rule in RULES], 2):
        graph = fx.symbolic_trace(model)
        passes.run(graph, disabled=pair)
        assert torch.equal(graph(x), model(x)), pair


def test_the_pipeline_refuses_rules_that_do_not_exist() -> None:
    with pytest.raises(UnknownFieldError, match="did you mean 'FoldIntoNorm'"):
        Pipeline(disabled=["FoldIntoNrom"])


def test_structured_products_stay_ops_that_can_be_trained() -> None:
    graph = fx.symbolic_trace(padst.sparsify(mlp(), SPEC))
    report = passes.run(graph)
    assert report.decisions == []
    assert len(graph.graph.find_nodes(op="call_function", target=STRUCTURED_LINEAR)) == 3
