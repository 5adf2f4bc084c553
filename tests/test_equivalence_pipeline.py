"""`options={"verify": True}`: every pass of a compilation is verified, and a wrong one is named and reproduced."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

import padst_compile as padst
from padst_compile.backend import compile_graph
from padst_compile.equivalence import PassCheck
from padst_compile.equivalence.reproduction import write_reproduction
from padst_compile.errors import InvalidOptionError, NotEquivalentError, WrongPassError
from padst_compile.options import Options, read_options
from padst_compile.passes import pipeline
from padst_compile.passes.base import RewriteRule
from padst_compile.passes.context import Context
from padst_compile.passes.graph import PERMUTE, STRUCTURED_LINEAR, is_call

SPEC = padst.SparsitySpec("block:4", 0.25, permutation="random")


class Model(nn.Module):
    """Layers with permutations that meet through norms and activations."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.up, self.down, self.norm, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.LayerNorm(16), nn.Linear(16, 8)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x + self.down(nn.functional.gelu(self.up(self.norm(x)), approximate="tanh"))
        return self.head(self.dropout(self.norm(y)))


class ForgetsBias(RewriteRule):
    """Deliberately wrong: drops the bias of structured products."""

    def matches(self, node: fx.Node) -> bool:
        """A product with a bias."""
        return is_call(node, STRUCTURED_LINEAR) and node.args[3] is not None

    def rewrite(self, node: fx.Node, facts: Context) -> None:
        """Drop it."""
        node.args = (*node.args[:3], None, *node.args[4:])


class DropsPermutation(RewriteRule):
    """Deliberately wrong: removes permutations."""

    def matches(self, node: fx.Node) -> bool:
        """Any permutation."""
        return is_call(node, PERMUTE)

    def rewrite(self, node: fx.Node, facts: Context) -> None:
        """Leave the order as it was."""
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]  # a node
        node.graph.erase_node(node)


def compiled(model: nn.Module, verify: bool = True, **options: Any) -> Any:
    def compiler(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        return compile_graph(gm, inputs, Options(verify=verify, **options), lambda graph, _: graph)[0]

    return torch.compile(model, backend=compiler, fullgraph=True)


def sparse(seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    return padst.sparsify(Model(**options), SPEC).eval()


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the passes that were verified."""
    names: list[str] = []
    original = PassCheck.__call__

    def call(self: PassCheck, name: str, *graphs: fx.GraphModule) -> None:
        names.append(name)
        original(self, name, *graphs)

    monkeypatch.setattr(PassCheck, "__call__", call)
    return names


@pytest.mark.parametrize("kernels", ["sparse", "dense"])
def test_every_pass_that_rewrote_something_is_verified(checked: list[str], kernels: Any) -> None:
    model, x = sparse(), torch.randn(3, 16)
    rewrote: list[str] = []

    def compiler(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        program, compilation = compile_graph(gm, inputs, Options(verify=True, kernels=kernels), lambda graph, _: graph)
        rewrote.extend(report.rule for report in compilation.report.rules if report.rewritten)
        return program

    with torch.no_grad():
        compiled_model = torch.compile(model, backend=compiler, fullgraph=True)
        torch.testing.assert_close(compiled_model(x), model(x), rtol=1e-4, atol=1e-5)
    assert "ChooseKernels" in rewrote
    assert checked == rewrote


def test_nothing_is_verified_unless_asked(checked: list[str]) -> None:
    with torch.no_grad():
        compiled(sparse(), verify=False)(torch.randn(3, 16))
    assert checked == []


def test_training_graphs_are_verified_too(checked: list[str]) -> None:
    model, x = sparse(), torch.randn(3, 16)
    compiled(model, kernels="sparse")(x).sum().backward()
    assert checked


def test_dynamic_sizes_are_verified_at_their_hints(checked: list[str]) -> None:
    model = sparse()
    x = torch.randn(5, 16)
    torch._dynamo.mark_dynamic(x, 0)
    with torch.no_grad():
        torch.testing.assert_close(compiled(model, kernels="sparse")(x), model(x), rtol=1e-4, atol=1e-5)
    assert checked


def test_the_general_program_is_verified_too(checked: list[str]) -> None:
    torch.manual_seed(0)
    model = padst.sparsify(Model(), padst.SparsitySpec("block:4", 0.25, permutation="learned")).eval()
    x = torch.randn(3, 16)
    program = compiled(model, kernels="dense")
    with torch.no_grad():
        program(x)  # relies on permutations that are still the identity
        count = len(checked)
        for _, layer in padst.sparse_layers(model):
            layer.set_permutation(layer.permutation.flip(0))  # type: ignore[union-attr]  # random permutations
        torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)
    assert len(checked) > count


def test_randomness_is_refused_instead_of_passed_over() -> None:
    model = sparse(dropout=0.5).train()
    with pytest.raises(Exception, match=r"RandomOperationError: cannot verify aten::dropout .*call \.eval\(\)"):
        compiled(model)(torch.randn(3, 16))


@pytest.mark.parametrize(("rule", "place"), [(ForgetsBias, 0), (DropsPermutation, 4)])
def test_a_wrong_pass_is_named_and_reproduced(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rule: type[RewriteRule], place: int
) -> None:
    rules = (*pipeline.RULES[:place], rule, *pipeline.RULES[place:])
    monkeypatch.setattr(pipeline, "RULES", rules)
    graph = fx.symbolic_trace(sparse())
    facts = Context(graph, {}, inference=False)
    check = PassCheck([torch.randn(3, 16)], tmp_path)
    disabled = ["FuseInputPermutation", "PlacePermutations", "FoldIntoNorm", "ComposePermutations", "CancelPermutations"]
    known = [name for name in disabled if name in {known.__name__ for known in rules}]
    with pytest.raises(WrongPassError, match=rf"pass {rule.__name__} changed .* entries differ.*'disable'") as caught:
        pipeline.Pipeline(kernels=None, disabled=known, check=check).run(facts)
    assert caught.value.name == rule.__name__
    script = Path(caught.value.script)
    assert script.is_relative_to(tmp_path)
    result = run_script(script)
    assert result.returncode == 1
    assert "NotEquivalentError: output" in result.stderr


def test_a_script_reads_modules_and_tensors_as_data(tmp_path: Path) -> None:
    before, after = (fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.GELU())) for _ in range(2))
    (norm,) = (node for node in after.graph.nodes if node.target == "1")
    norm.replace_all_uses_with(norm.args[0])
    after.recompile()
    script = write_reproduction("a pass", before, after, [torch.randn(2, 4)], tmp_path)
    result = run_script(script)
    assert result.returncode == 1
    assert "NotEquivalentError: output" in result.stderr


def test_a_script_does_not_unpickle_a_planted_file(tmp_path: Path) -> None:
    class Planted:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "executed"),)

    graph = fx.symbolic_trace(nn.Linear(4, 4))
    script = write_reproduction("a pass", graph, graph, [torch.randn(2, 4)], tmp_path)
    torch.save({"attributes": Planted(), "inputs": {}}, script.with_name("tensors.pt"))
    result = run_script(script)
    assert result.returncode == 1
    assert "Weights only load failed" in result.stderr
    assert not (tmp_path / "executed").exists()


def test_the_script_of_a_dynamo_graph_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pipeline, "RULES", (*pipeline.RULES, ForgetsBias))
    model = sparse()
    with torch.no_grad(), pytest.raises(Exception, match="pass ForgetsBias changed what the graph computes"):
        compiled(model, disable=("ChooseKernels",), dump=str(tmp_path))(torch.randn(3, 16))
    (script,) = tmp_path.glob("padst-ForgetsBias-*/repro.py")
    text = script.read_text()
    ast.parse(text)
    assert "torch.zeros([3, 16], dtype=torch.float32)" in text
    assert "# int32 [" in text
    assert "NotEquivalentError: output" in run_script(script).stderr


def run_script(script: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    return subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)


def test_the_error_is_one_of_ours() -> None:
    assert issubclass(WrongPassError, NotEquivalentError)
    assert issubclass(WrongPassError, padst.errors.PadstError)


def test_the_option_is_read_and_checked() -> None:
    assert read_options(None, {"verify": True}).verify
    assert not read_options(None, {}).verify
    with pytest.raises(InvalidOptionError, match="options\\['verify'\\] is True or False, got 1"):
        read_options(None, {"verify": 1})
