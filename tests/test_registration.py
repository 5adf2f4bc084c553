"""Structures, passes and kernels of others: the example of the documents through everything, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn
from torch._dynamo.testing import CompileCounter

import padst_compile as padst
from padst_compile import registered
from padst_compile.autotune.environment import environment
from padst_compile.backend import padst as backend
from padst_compile.errors import AttachError, NameTakenError, NoUnitsError, RegistrationError, SpecError, UnknownFieldError
from padst_compile.kernels import formats
from padst_compile.kernels.formats import Format
from padst_compile.layers import PermutedSparseLinear
from padst_compile.passes import pipeline
from padst_compile.passes.base import Pass, RewriteRule
from padst_compile.passes.context import Context
from padst_compile.passes.graph import STRUCTURED_LINEAR, is_call
from padst_compile.spec import spec_from_dict, spec_to_dict
from padst_compile.structures import STRUCTURES, Block, Shape, Structure, Topology, parse
from padst_compile.structures import registry as structure_registry
from padst_compile.testing.registration import assert_kernel, assert_structure

ROOT = Path(padst.__file__).parent.parent
EXAMPLE = ROOT / "docs" / "examples" / "columns.py"


pytestmark = pytest.mark.usefixtures("fresh_registries")


@pytest.fixture
def columns() -> Any:
    """The structure of docs/examples, registered with its kernel."""
    spec = importlib.util.spec_from_file_location("columns", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["columns"] = module  # dataclasses look their annotations up there
    spec.loader.exec_module(module)
    return module.Columns


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16))


def sparse(permutation: str = "random", **options: object) -> nn.Module:
    return padst.sparsify(model(), padst.SparsitySpec("columns:8", 0.75, permutation=permutation, **options))


def x() -> torch.Tensor:
    return torch.randn(5, 24, generator=torch.Generator().manual_seed(1))


# The example through everything


@pytest.mark.parametrize(("rows", "shape", "sparsity"), [(1, Shape(3, 5), 0.5), (4, Shape(8, 7), 0.6), (8, Shape(8, 1), 0.0)])
def test_the_example_is_a_structure_with_a_kernel(columns: Any, rows: int, shape: Shape, sparsity: float) -> None:
    assert_structure(columns(rows), shape, sparsity)
    assert_kernel(formats._REGISTERED["columns"], columns(rows), shape, sparsity)


def test_it_is_known_by_its_short_form_and_in_json(columns: Any) -> None:
    spec = padst.SparsitySpec("columns:8", sparsity=0.75)
    assert spec.structure == columns(8) == padst.SparsitySpec(columns(8), 0.75).structure
    assert spec_from_dict(json.loads(json.dumps(spec_to_dict(spec)))) == spec


@pytest.mark.parametrize("text", ["columns", "columns:0", "columns:1:2", "columns:x"])
def test_wrong_short_forms_are_refused(columns: Any, text: str) -> None:
    with pytest.raises(SpecError, match="columns|rows"):
        parse(text)


@pytest.mark.parametrize("side", ["input", "output"])
def test_sparsify_densify_and_checkpoints(columns: Any, side: str) -> None:
    original, other = sparse(permutation_side=side), sparse(permutation_side=side, init="random", seed=3)
    weights = io.BytesIO()
    torch.save(original.state_dict(), weights)
    weights.seek(0)
    other.load_state_dict(torch.load(weights, weights_only=True))
    assert torch.equal(other(x()), original(x()))
    torch.testing.assert_close(padst.densify(copy.deepcopy(original))(x()), original(x()))


def test_saved_models_name_it(columns: Any, tmp_path: Path) -> None:
    original = sparse()
    padst.save_pretrained(original, tmp_path / "model")
    assert torch.equal(padst.load_pretrained(tmp_path / "model", model())(x()), original(x()))


def test_checkpoints_with_wrong_indices_are_refused(columns: Any) -> None:
    own = sparse()
    state = {name: tensor.clone() for name, tensor in own.state_dict().items()}
    state["0.columns"][0, 0] = 24
    with pytest.raises(RuntimeError, match=r"columns must lie in \[0, 24\)"):
        own.load_state_dict(state)


@pytest.mark.parametrize(("kernels", "kernel"), [("sparse", True), ("sparse", False), ("measure", False)], ids=str)
def test_inference_compiles_without_graph_breaks(columns: Any, kernels: str, kernel: bool) -> None:
    if not kernel:
        formats._REGISTERED.clear()
    own = sparse()
    expected = padst.densify(copy.deepcopy(own)).double()(x().double())
    with torch.no_grad():
        explanation = padst.explain(own, x(), options={"kernels": kernels, "autotune": "off"})
        compiled = torch.compile(own, backend=backend, fullgraph=True, options={"kernels": kernels, "verify": True})
        torch.testing.assert_close(compiled(x()).double(), expected, atol=1e-5, rtol=1e-5)
    used = {layer.kernel for layer in explanation.layers}
    assert explanation.graph_breaks == ()
    assert used == ({"registered" if kernel else "aten"} if kernels == "sparse" else {"dense"})
    if kernels == "measure":
        assert {layer.reason for layer in explanation.layers} == {"nobody registered a kernel for columns that runs here"}
    assert padst.verify(own, padst.densify(copy.deepcopy(own)), x()).equal


@pytest.mark.parametrize("kernel", [True, False], ids=["with a kernel", "through dense weights"])
def test_training_compiles_with_the_gradients_of_the_dense_layer(columns: Any, kernel: bool) -> None:
    if not kernel:
        formats._REGISTERED.clear()
    own, eager = sparse().double(), sparse().double()
    dense = padst.densify(copy.deepcopy(own))
    for module in (torch.compile(own, backend=backend, fullgraph=True, options={"kernels": "sparse"}), eager, dense):
        module(x().double()).square().sum().backward()
    for layer, plain, reference in zip((own[0], own[2]), (eager[0], eager[2]), (dense[0], dense[2]), strict=True):
        order = layer.permutation.long()  # S[:, j] meets x[order[j]]
        expected = layer.config.structure.pack(reference.weight.grad[:, order], layer.topology)
        torch.testing.assert_close(layer.values.grad, expected)
        torch.testing.assert_close(plain.values.grad, expected)
        torch.testing.assert_close(layer.bias.grad, reference.bias.grad)


@pytest.mark.parametrize("method", ["rigl", "set"])
def test_topologies_train_and_nothing_is_recompiled(columns: Any, method: str) -> None:
    own = sparse(permutation="none")
    optimizer = torch.optim.AdamW(own.parameters(), lr=1e-2)
    runtime = padst.attach(own, optimizer, padst.DSTConfig(method=method, interval=2, total_steps=20, check_invariants=True))
    counter = CompileCounter()
    compiled = torch.compile(own, backend=counter)
    before = own[0].columns.clone()
    for _ in range(10):
        compiled(x()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert counter.frame_count == 1
    assert runtime.metrics()
    assert not torch.equal(own[0].columns, before)
    padst.finalize(own)
    assert own[0].config.structure.check_topology(own[0].topology, own[0].config.shape) is None


def test_a_kernel_for_a_structure_of_ours_comes_first_where_it_supports(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class Noted(Format[Block]):
        def supports(self, structure: Block, device: torch.device, dtype: torch.dtype) -> bool:
            return dtype == torch.float64

        def forward(self, structure, x, values, topology, out_features):  # type: ignore[no-untyped-def]
            calls.append(x.dtype)
            return super().forward(structure, x, values, topology, out_features)

    padst.register_kernel("block", Noted())
    own = padst.sparsify(model(), padst.SparsitySpec("block:8", 0.5, permutation="random"))
    own(x())
    assert calls == []
    expected = padst.densify(copy.deepcopy(own)).double()(x().double())
    torch.testing.assert_close(own.double()(x().double()), expected)
    assert calls == [torch.float64] * 2


# Structures without units


class Fixed(Structure):
    """The first inputs, without units."""

    kind: ClassVar[str] = "fixed"
    index_names: ClassVar[tuple[str, ...]] = ("count",)

    def check(self, shape: Shape, sparsity: float, module: str) -> None:
        pass

    def choose(self, scores: torch.Tensor, sparsity: float) -> Topology:
        return (torch.tensor([round((1 - sparsity) * scores.shape[1])], dtype=torch.int32),)

    def pack(self, weight: torch.Tensor, topology: Topology) -> torch.Tensor:
        return weight[:, : int(topology[0])].contiguous()

    def unpack(self, values: torch.Tensor, topology: Topology, shape: Shape) -> torch.Tensor:
        return nn.functional.pad(values, (0, shape.in_features - values.shape[1]))

    def check_topology(self, topology: Topology, shape: Shape) -> str | None:
        return None if 0 <= int(topology[0]) <= shape.in_features else "count is out of range"


def fixed(**changes: object) -> type[Structure]:
    return dataclasses.dataclass(frozen=True)(type("Fixed", (Fixed,), {"__module__": __name__, **changes}))


def test_a_structure_without_units_works_but_does_not_train() -> None:
    cls = padst.register_structure(fixed())
    assert_structure(cls(), Shape(3, 4), 0.5)
    own = padst.sparsify(model(), padst.SparsitySpec("fixed", 0.5))
    torch.testing.assert_close(padst.densify(copy.deepcopy(own))(x()), own(x()))
    with pytest.raises(NoUnitsError, match="units_per_pool"):
        cls().active_units(own[0].topology, own[0].config.shape)
    optimizer = torch.optim.SGD(own.parameters(), lr=0.1)
    with pytest.raises(AttachError, match="'0' is fixed, which defines no units"):
        padst.attach(own, optimizer, padst.DSTConfig(method="rigl", total_steps=10))


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "Fixed"}, "kind must be a name in lower case"),
        ({"kind": "a:b"}, "kind must be a name"),
        ({"kind": None}, "kind must be a name"),
        ({"index_names": ()}, "at least one"),
        ({"index_names": ["count"]}, "at least one"),
        ({"index_names": ("count", "count")}, "at least one"),
        ({"index_names": ("values",)}, "'values' cannot name an index tensor"),
        ({"index_names": ("forward",)}, "'forward' cannot name an index tensor"),
        ({"index_names": ("a b",)}, "'a b' cannot name an index tensor"),
        ({"choose": Structure.choose}, "does not define active_units, topology_of, unit_totals, units_per_pool"),
        ({"pack": Structure.pack}, "does not define pack"),
    ],
)
def test_structures_that_lack_something_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(RegistrationError, match=message):
        padst.register_structure(fixed(**changes))
    assert "fixed" not in STRUCTURES


def test_what_is_no_frozen_dataclass_is_refused() -> None:
    for cls in (Fixed, dataclasses.make_dataclass("Loose", [], bases=()), Fixed(), int):
        with pytest.raises(RegistrationError, match="frozen=True|subclass"):
            padst.register_structure(cls)


@pytest.mark.parametrize("kind", ["block", "unstructured", "dense", "none"])
def test_names_of_ours_are_taken(kind: str) -> None:
    with pytest.raises(NameTakenError, match="belongs to this package"):
        padst.register_structure(fixed(kind=kind))


def test_a_class_may_replace_itself_and_no_other() -> None:
    padst.register_structure(fixed())
    again = padst.register_structure(fixed())
    assert type(parse("fixed")) is again
    with pytest.raises(NameTakenError, match="choose another kind"):
        padst.register_structure(fixed(__qualname__="Another"))


def test_unregistered_classes_are_refused() -> None:
    with pytest.raises(RegistrationError, match="Fixed is not registered"):
        padst.SparsitySpec(fixed()(), 0.5)


@pytest.mark.parametrize("form", ["to_string", "to_dict"])
def test_forms_that_read_back_as_something_else_are_refused(columns: Any, form: str) -> None:
    wrong = {"to_string": lambda self: "columns:1", "to_dict": lambda self: {"kind": "columns", "rows": 1}}
    setattr(columns, form, wrong[form])
    with pytest.raises(RegistrationError, match="reads back as"):
        padst.SparsitySpec(columns(8), 0.5)


def test_the_names_that_a_layer_uses_itself_are_listed() -> None:
    layer = padst.sparsify(model(), padst.SparsitySpec("block:8", 0.5))[0]
    own = {*dir(PermutedSparseLinear), *vars(layer)}
    public = {name for name in own - set(dir(nn.Module)) - set(vars(nn.Module())) if not name.startswith("_")}
    assert public <= set(structure_registry._ATTRIBUTES)


def test_kernels_that_are_none_are_refused(columns: Any) -> None:
    with pytest.raises(UnknownFieldError, match="unknown structure 'colums'; did you mean 'columns'"):
        padst.register_kernel("colums", Format())
    wrongs: list[Any] = [Format(), Format, None]
    for wrong in wrongs:
        with pytest.raises(RegistrationError, match="overrides forward"):
            padst.register_kernel("columns", wrong)

    class Other(Format[Structure]):
        def forward(self, structure, x, values, topology, out_features):  # type: ignore[no-untyped-def]
            raise AssertionError

    with pytest.raises(NameTakenError, match="has a kernel already"):
        padst.register_kernel("columns", Other())


# Passes


class DoubleNegation(RewriteRule):
    """-(-x) = x"""

    def matches(self, node: fx.Node) -> bool:
        inner = node.args[0] if node.target is torch.neg else None
        return isinstance(inner, fx.Node) and inner.target is torch.neg

    def rewrite(self, node: fx.Node, facts: Context) -> None:
        node.replace_all_uses_with(node.args[0].args[0])


class Negates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(24, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.neg(torch.neg(self.linear(x)))


def counted(**options: Any) -> dict[str, int]:
    own = padst.sparsify(Negates(), padst.SparsitySpec("block:8", 0.5))
    found: list[fx.GraphModule] = []
    facts_of = pipeline.Pipeline.run

    def run(self, facts, **kwargs):  # type: ignore[no-untyped-def]
        report = facts_of(self, facts, **kwargs)
        found.append(report)
        return report

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(pipeline.Pipeline, "run", run)
        y = torch.compile(own, backend=backend, options={"verify": True, "autotune": "off", **options})(x())
    torch.testing.assert_close(y, own(x()))
    return {report.rule: report.rewritten for report in found[0].rules}


def test_a_registered_pass_runs_in_its_place_is_verified_and_can_be_disabled() -> None:
    assert padst.register_pass(before="AbsorbBias")(DoubleNegation) is DoubleNegation
    counts = counted()
    names = list(counts)
    assert counts["DoubleNegation"] == 1
    assert names.index("DoubleNegation") + 1 == names.index("AbsorbBias")
    assert "DoubleNegation" not in counted(disable=["DoubleNegation"])


def test_by_default_a_pass_sees_structured_products() -> None:
    seen = []

    @padst.register_pass
    class Looks(RewriteRule):
        def matches(self, node: fx.Node) -> bool:
            seen.extend([node] if is_call(node, STRUCTURED_LINEAR) else [])
            return False

        def rewrite(self, node: fx.Node, facts: Context) -> None:
            raise AssertionError

    counted(kernels="dense")
    assert len(seen) == 1


def test_a_wrong_registered_pass_is_caught_by_verify() -> None:
    @padst.register_pass
    class Wrong(RewriteRule):
        def matches(self, node: fx.Node) -> bool:
            return node.target is torch.neg and not hasattr(self, "done")

        def rewrite(self, node: fx.Node, facts: Context) -> None:
            node.replace_all_uses_with(node.args[0])
            node.graph.erase_node(node)
            self.done = True  # one of two

    with pytest.raises(Exception, match="pass Wrong changed what the graph computes"):
        counted()


def test_passes_that_lack_something_are_refused() -> None:
    class Abstract(RewriteRule):
        pass

    class Needs(DoubleNegation):
        def __init__(self, what: int) -> None:
            pass

    class Odd(DoubleNegation):
        effect = "magic"  # type: ignore[assignment]

    class ChooseKernels(DoubleNegation):
        pass

    wrongs: tuple[tuple[Any, str], ...] = (
        (Abstract, "does not define matches, rewrite"), (Needs, "made without arguments"), (Odd, "effect 'magic'"),
        (int, "is no pass"), (DoubleNegation(), "is no pass"),
    )  # fmt: skip
    for rule, message in wrongs:
        with pytest.raises(RegistrationError, match=message):
            padst.register_pass(rule)
    with pytest.raises(NameTakenError, match="'ChooseKernels' is there already"):
        padst.register_pass(ChooseKernels, before="AbsorbBias")
    with pytest.raises(UnknownFieldError, match="did you mean 'AbsorbBias'"):
        padst.register_pass(DoubleNegation, before="AbsorbBiases")
    assert pipeline.rules() == pipeline.RULES


def test_a_pass_that_is_defined_again_replaces_itself() -> None:
    padst.register_pass(DoubleNegation)
    again: type[Pass] = type("DoubleNegation", (DoubleNegation,), {"__module__": __name__})
    padst.register_pass(again)
    assert [rule for rule in pipeline.rules() if rule not in pipeline.RULES] == [again]


def test_a_pass_cannot_stand_before_one_that_is_registered_later() -> None:
    later = type("Later", (DoubleNegation,), {})
    padst.register_pass(DoubleNegation)
    padst.register_pass(later, before="DoubleNegation")
    with pytest.raises(UnknownFieldError, match="Later"):
        padst.register_pass(DoubleNegation, before="Later")
    assert [rule for rule in pipeline.rules() if rule not in pipeline.RULES] == [later, DoubleNegation]


@given(st.lists(st.sampled_from([rule.__name__ for rule in pipeline.RULES]), max_size=4))
def test_registered_passes_leave_the_others_in_order(places: list[str]) -> None:
    pipeline._registered.clear()
    for number, before in enumerate(places):
        padst.register_pass(type(f"Own{number}", (DoubleNegation,), {}), before=before)
    assert tuple(rule for rule in pipeline.rules() if rule in pipeline.RULES) == pipeline.RULES
    assert len(pipeline.rules()) == len(pipeline.RULES) + len(places)
    pipeline._registered.clear()


# Caches


_PROGRAM = """
import json, sys, torch
sys.path.insert(0, sys.argv[1])
import padst_compile as padst
import mine
from padst_compile.backend import padst as backend
from torch._dynamo.utils import counters
torch.manual_seed(0)
model = padst.sparsify(torch.nn.Linear(16, 16), padst.SparsitySpec("mine", 0.5))
y = torch.compile(model, backend=backend, options={"kernels": "sparse"})(torch.ones(2, 16))
y.sum().backward()
print(json.dumps({"hits": counters["aot_autograd"]["autograd_cache_hit"], "y": y.sum().item()}))
"""
_MINE = """
import dataclasses, torch
import padst_compile as padst
from padst_compile.structures import Unstructured

@padst.register_structure
@dataclasses.dataclass(frozen=True)
class Mine(Unstructured):
    kind = "mine"
"""


@pytest.mark.slow
def test_programs_of_other_registered_code_are_not_taken_from_caches(tmp_path: Path) -> None:
    def run(source: str) -> dict:
        (tmp_path / "mine.py").write_text(source)
        done = subprocess.run(
            [sys.executable, "-B", "-c", _PROGRAM, str(tmp_path)],
            cwd=ROOT,
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    first, second, changed = run(_MINE), run(_MINE), run(_MINE + "# another version\n")
    assert first["y"] == second["y"] == changed["y"]
    assert [result["hits"] for result in (first, second, changed)] == [0, 1, 0]


def test_measurements_of_other_registered_code_are_not_taken_from_caches(columns: Any) -> None:
    first = environment("cpu", "columns:8")
    assert first != environment("cpu") == environment("cpu", "block:8")
    registered._versions["kernel", "columns"] = "another"
    assert environment("cpu", "columns:8") != first


def test_code_without_sources_is_the_same_in_this_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    typed = type("Typed", (), {"__module__": "an_interpreter"})
    here = registered.code_version(typed)
    assert registered.code_version(typed) == here
    monkeypatch.setattr(registered, "_WITHOUT_SOURCE", "that of another process")
    assert registered.code_version(typed) != here
