"""`torch.compile` with this backend: equal to eager, without graph breaks, for every structure, size, dtype and change."""

from __future__ import annotations

import copy
import functools
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn import functional as F

import padst_compile
import padst_compile as padst
from padst_compile import backend as backend_module
from padst_compile import specialization
from padst_compile.backend import compile_graph
from padst_compile.backend import padst as backend
from padst_compile.errors import InvalidOptionError, UnknownOptionError
from padst_compile.options import Options, read_options
from padst_compile.passes.graph import PERMUTE

STRUCTURES = ("block:16", "nm:1:4", "nm:2:4:4", "diagonal", "diagonal:8", "unstructured")
POLICIES = ("sparse", "dense", "measure")
WIDTH = 32


class Net(nn.Module):
    """Norm, two layers and a dense head, with a residual in between."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x + self.fc2(F.gelu(self.fc1(self.norm(x)))))


def spec_of(structure: str = "block:16", permutation: Any = "random", side: Any = "input", seed: int = 0) -> padst.SparsitySpec:
    sparsity = None if structure.startswith("nm") else 0.5
    return padst.SparsitySpec(structure, sparsity, permutation=permutation, permutation_side=side, seed=seed)


def net(spec: padst.SparsitySpec | None = None, dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return padst.sparsify(Net(), spec or spec_of()).to(dtype).eval()


def sample(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*(shape or (3, 5)), WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)


def cheap(options: dict[str, Any] | None = None) -> Callable[..., Any]:
    """This backend's passes with the rewritten graph run as it is, instead of by Inductor."""
    chosen = read_options(None, options)

    def compile_cheaply(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        return compile_graph(gm, inputs, chosen, lambda graph, _: graph)[0]

    return compile_cheaply


def with_gradients(model: nn.Module, call: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    y = call(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])]


def assert_near(found: torch.Tensor, expected: torch.Tensor, terms: int = 8 * WIDTH) -> None:
    """Equal up to `terms` roundings relative to the largest entry."""
    bound = terms * torch.finfo(expected.dtype).eps * max(1.0, expected.detach().abs().max().item())
    torch.testing.assert_close(found, expected, rtol=0, atol=bound)


# --- every structure, permutation and side; forward and every gradient ---


@pytest.mark.parametrize("side", ["input", "output", "smaller"])
@pytest.mark.parametrize("permutation", ["none", "random", "learned"])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("policy", ["sparse", "dense"])
def test_the_rewritten_graph_equals_eager(structure: str, permutation: str, side: str, policy: str) -> None:
    model, x = net(spec_of(structure, permutation, side), torch.float64), sample(dtype=torch.float64)
    compiled = torch.compile(model, backend=cheap({"kernels": policy}), fullgraph=True)
    with torch.no_grad():
        assert_near(compiled(x), model(x))
    for found, expected in zip(with_gradients(model, compiled, x), with_gradients(model, model, x), strict=True):
        assert_near(found, expected)


@pytest.mark.parametrize(
    ("structure", "side", "policy"),
    [("block:16", "input", "sparse"), ("nm:2:4:4", "output", "sparse"), ("diagonal", "input", "measure")],
)
def test_inductor_equals_eager(structure: str, side: str, policy: str) -> None:
    model, x = net(spec_of(structure, "random", side)), sample()
    exact = copy.deepcopy(model).double()
    compiled = torch.compile(model, backend=backend, fullgraph=True, options={"kernels": policy})
    with torch.no_grad():
        assert_near(compiled(x), exact(x.double()).float())
    for found, expected in zip(with_gradients(model, compiled, x), with_gradients(exact, exact, x.double()), strict=True):
        assert_near(found, expected.float())


# --- sizes ---


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("permutation", ["random", "learned"])
def test_sizes_share_a_program(permutation: str, grad: bool) -> None:
    model = net(spec_of("block:16", permutation))
    count = 0

    def counting(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        nonlocal count
        count += 1
        return (cheap() if grad or permutation == "learned" else backend)(gm, inputs)

    compiled = torch.compile(model, backend=counting, fullgraph=True)
    with torch.set_grad_enabled(grad):
        for batch, length in ((3, 5), (4, 6), (7, 9), (2, 3)):
            x = sample(batch, length)
            assert_near(compiled(x), model(x))
    assert count <= 2


@pytest.mark.parametrize("batch", [0, 1])
def test_empty_and_single_batches(batch: int) -> None:
    model = net()
    compiled = torch.compile(model, backend=backend, fullgraph=True, options={"kernels": "sparse"})
    with torch.no_grad():
        assert_near(compiled(sample(batch)), model(sample(batch))) if batch else None
        assert compiled(sample(batch)).shape == (batch, 10)


def test_a_size_that_depends_on_data() -> None:
    class Selecting(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x[x[:, 0] > 0])

    model = padst.sparsify(Selecting(), spec_of()).eval()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True), torch.no_grad():
        compiled = torch.compile(model, backend=cheap(), fullgraph=True)
        assert_near(compiled(sample(6)), model(sample(6)))


# --- dtypes ---


@pytest.mark.parametrize("policy", ["sparse", "dense"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_in_other_dtypes(dtype: torch.dtype, policy: str) -> None:
    model = net(dtype=dtype)
    exact, x = copy.deepcopy(model).double(), sample(dtype=dtype)
    compiled = torch.compile(model, backend=backend, fullgraph=True, options={"kernels": policy})
    with torch.no_grad():
        assert_near(compiled(x), exact(x.double()).to(dtype), terms=16)


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("policy", ["sparse", "dense"])
def test_autocast_in_inference_and_training(policy: str, side: str) -> None:
    model, x = net(spec_of(side=side)), sample()
    exact = copy.deepcopy(model).double()
    options = {"kernels": policy}
    compiler = functools.partial(backend, options=options) if (policy, side) == ("sparse", "input") else cheap(options)
    compiled = torch.compile(model, backend=compiler, fullgraph=True)
    # Three products of bfloat16 numbers, each rounded on the way in and out.
    bound = 32 * torch.finfo(torch.bfloat16).eps
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            y, eager = compiled(x), model(x)
        assert y.dtype == eager.dtype
        torch.testing.assert_close(y.double(), exact.forward(x.double()), rtol=bound, atol=bound)
        found = with_gradients(model, compiled, x)
    for now, then in zip(found, with_gradients(exact, exact, x.double()), strict=True):
        scale = max(1.0, then.abs().max().item())
        torch.testing.assert_close(now.double(), then, rtol=0, atol=bound * scale)


def test_inference_mode() -> None:
    model, x = net(), sample()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.inference_mode():
        assert_near(compiled(x), model(x))
        model.fc1.values.mul_(2)
        assert_near(compiled(x), model(x))
        model.fc1.values = nn.Parameter(model.fc1.values * 3)
        assert_near(compiled(x), model(x))


# --- graphs without sparse layers ---


def test_a_dense_model_goes_to_inductor_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    given_graphs, captured = [], []
    original = backend_module.compile_fx

    def spy(gm: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        given_graphs.append(gm)
        return original(gm, *args, **kwargs)

    def keep(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        captured.append(gm)
        return backend(gm, inputs)

    monkeypatch.setattr(backend_module, "compile_fx", spy)
    model, x = Net().eval(), sample()
    with torch.no_grad():
        y = torch.compile(model, backend=keep)(x)
        assert given_graphs[0] is captured[0]
        torch._dynamo.reset()
        assert torch.equal(y, torch.compile(model, backend="inductor")(x))


# --- options ---


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"options": {"kernel": "dense"}}, UnknownOptionError, "did you mean 'kernels'"),
        ({"options": {"max_autotone": True}}, UnknownOptionError, "did you mean 'max_autotune'"),
        ({"options": {"kernels": "fast"}}, InvalidOptionError, "measure, sparse, dense, got 'fast'"),
        ({"mode": "fastest"}, InvalidOptionError, "unknown mode 'fastest'"),
    ],
)
def test_wrong_options_are_named_before_anything_is_compiled(kwargs: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        backend(fx.symbolic_trace(net()), [], **kwargs)


@pytest.mark.parametrize("kwargs", [{"mode": "reduce-overhead"}, {"options": {"max_autotune": False, "kernels": "sparse"}}])
def test_modes_and_inductor_options_are_taken(kwargs: Any) -> None:
    model, x = net(), sample()
    with torch.no_grad():
        assert_near(torch.compile(model, backend=backend, fullgraph=True, **kwargs)(x), model(x))


def test_inductor_receives_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    patches = []
    monkeypatch.setattr(
        backend_module, "compile_fx", lambda gm, inputs, *, config_patches: patches.append(config_patches) or gm
    )
    with torch.no_grad():
        torch.compile(net(), backend=backend, options={"epilogue_fusion": False, "kernels": "sparse"})(sample())
    assert patches == [{"epilogue_fusion": False}]


def test_disabled_passes_do_not_run() -> None:
    report = compilation(net(), sample(), {"disable": ["FuseInputPermutation", "PlacePermutations"]}).report
    assert not {"FuseInputPermutation", "PlacePermutations"} & {rule.rule for rule in report.rules}
    assert report.permutations.remaining == 2


@pytest.mark.parametrize("by", ["option", "environment"])
def test_dumped_graphs_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    options = {"kernels": "dense"} | ({"dump": str(tmp_path)} if by == "option" else {})  # not what is faster at the moment
    if by == "environment":
        monkeypatch.setenv("PADST_DUMP", str(tmp_path))
    compilation(net(), sample(), options)
    names = sorted(file.name for file in tmp_path.iterdir())
    assert (names[0], names[-1].split("_")[1]) == ("000_captured.py", "ChooseKernels.py")
    assert "torch.ops.padst.permute" in (tmp_path / names[0]).read_text()


def test_the_passes_log_as_any_module_of_torch_does() -> None:
    code = (
        "import torch, padst_compile as padst\n"
        "from padst_compile.backend import padst as backend\n"
        "m = padst.sparsify(torch.nn.Sequential(torch.nn.Linear(32, 32)), padst.SparsitySpec('block:16', 0.5))\n"
        "with torch.no_grad(): torch.compile(m, backend=backend, options={'kernels': 'dense'})(torch.ones(2, 32))\n"
    )
    environment = {**os.environ, "TORCH_LOGS": "+padst_compile.passes"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment, check=True)
    assert "ChooseKernels: 1 rewritten" in done.stderr


ROOT = Path(padst_compile.__file__).parent.parent
_INSTALLED = any(e.name == "padst" for e in importlib.metadata.entry_points(group="torch_dynamo_backends"))


@pytest.mark.skipif(not _INSTALLED, reason="the package is not installed, so torch does not know its entry point")
def test_the_backend_is_known_by_name() -> None:
    code = (
        "import torch\n"
        "assert 'padst' in torch._dynamo.list_backends()\n"
        "torch.compile(lambda x: x + 1, backend='padst')(torch.ones(2))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def compilation(model: nn.Module, x: torch.Tensor, options: dict[str, Any] | None = None) -> Any:
    """What the passes did to a model in inference."""
    kept = []

    def keep(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        compiled, done = compile_graph(gm, inputs, read_options(None, options), lambda graph, _: graph)
        kept.append(done)
        return compiled

    with torch.no_grad():
        torch.compile(model, backend=keep, fullgraph=True)(x)
    assert len(kept) == 1
    return kept[0]


# --- never stale ---


def multiply(model: Net) -> None:
    with torch.no_grad():
        model.fc1.values.mul_(2)


def optimize(model: Net) -> None:
    with torch.enable_grad():
        model(sample()).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def load(model: Net) -> None:
    state = {name: tensor * 2 if tensor.is_floating_point() else tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state)


def permute_again(model: Net) -> None:
    for _, layer in padst.sparse_layers(model):
        if layer.permutation is not None:
            layer.set_permutation(layer.permutation.flip(0))


def replace_parameters(model: Net) -> None:
    model.fc1.values = nn.Parameter(model.fc1.values.detach() * 2)
    model.head.bias = nn.Parameter(model.head.bias.detach() + 1)


def assign_data(model: Net) -> None:
    model.fc1.values.data = torch.mul(model.fc1.values.data, 2)


def there_and_back(model: Net) -> None:
    """Rounds every parameter; the memory of the first may be taken again by the last."""
    model.to(torch.bfloat16).to(torch.float32)


def change_bias(model: Net) -> None:
    with torch.no_grad():
        model.fc1.bias.add_(1)


CHANGES = [multiply, optimize, load, permute_again, replace_parameters, assign_data, there_and_back, change_bias]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_compiled_model_follows_its_parameters(policy: str, side: str, change: Callable[[Net], None]) -> None:
    model, x = net(spec_of(side=side)), sample()
    compiled = torch.compile(model, backend=cheap({"kernels": policy}), fullgraph=True)
    with torch.no_grad():
        before = compiled(x)
        change(model)
        assert_near(compiled(x), model(x))
        assert not torch.equal(compiled(x), before)


@pytest.mark.parametrize("change", [multiply, permute_again, assign_data])
@pytest.mark.parametrize("policy", ["sparse", "dense"])
def test_inductors_program_follows_its_parameters(policy: str, change: Callable[[Net], None]) -> None:
    model, x = net(), sample()
    compiled = torch.compile(model, backend=backend, fullgraph=True, options={"kernels": policy})
    with torch.no_grad():
        compiled(x)
        change(model)
        assert_near(compiled(x), model(x))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_compiled_model_follows_its_topology(structure: str, policy: str) -> None:
    model, x = net(spec_of(structure)), sample()
    compiled = torch.compile(model, backend=cheap({"kernels": policy}), fullgraph=True)
    layer = model.fc1
    other = layer.config.structure.choose(torch.rand(2 * WIDTH, WIDTH), 1 - layer.density)
    with torch.no_grad():
        before = compiled(x)
        for index, new in zip(layer.topology, other, strict=True):
            index.copy_(new)
        assert_near(compiled(x), model(x))
        assert not torch.equal(compiled(x), before)


@pytest.mark.parametrize("policy", POLICIES)
def test_training_and_inference_alternate(policy: str) -> None:
    model, x = net(), sample()
    compiled = torch.compile(model, backend=cheap({"kernels": policy}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for _ in range(3):
        model.train()
        optimizer.zero_grad()
        compiled(x).square().sum().backward()
        optimizer.step()
        model.eval()
        with torch.no_grad():
            assert_near(compiled(x), model(x))


@pytest.mark.parametrize("policy", POLICIES)
def test_cancelled_permutations_that_move_later(policy: str) -> None:
    model = net(spec_of("block:16", "learned"))
    count = 0

    def counting(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        nonlocal count

        def compiler(graph: fx.GraphModule, _: list[Any]) -> Any:
            nonlocal count
            count += 1
            return graph

        return compile_graph(gm, inputs, read_options(None, {"kernels": policy}), compiler)[0]

    compiled = torch.compile(model, backend=counting, fullgraph=True)
    with torch.no_grad():
        assert_near(compiled(sample(3, 5)), model(sample(3, 5)))
        assert_near(compiled(sample(4, 6)), model(sample(4, 6)))
        permute_again(model)
        for shape in ((3, 5), (4, 6), (7, 2), (9, 8), (2, 3), (11, 13), (6, 4), (5, 5), (8, 9), (10, 2), (12, 7)):
            assert_near(compiled(sample(*shape)), model(sample(*shape)))
    assert count <= 5


def test_frozen_parameters_that_are_trained_later() -> None:
    model, x = net().requires_grad_(False), sample()
    compiled = torch.compile(model, backend=cheap({"kernels": "sparse"}))
    assert_near(compiled(x), model(x))
    model.requires_grad_(True)
    for found, expected in zip(with_gradients(model, compiled, x), with_gradients(model, model, x), strict=True):
        assert_near(found, expected)


def test_gradients_switched_on_inside_the_model() -> None:
    class Inner(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.enable_grad():
                return super().forward(x)

    model, x = padst.sparsify(Inner(), spec_of()), sample()
    compiled = torch.compile(model, backend=cheap({"kernels": "sparse"}))
    with torch.no_grad():
        y = compiled(x)
    (found,) = torch.autograd.grad(y.sum(), [model.fc1.values])
    (expected,) = torch.autograd.grad(model(x).sum(), [model.fc1.values])
    assert_near(found, expected)


@pytest.mark.parametrize("permutation", ["random", "learned"])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_graph_that_holds_its_parameters_itself_follows_them(policy: str, permutation: str) -> None:
    model, x = net(spec_of(permutation=permutation)), sample()
    graph = torch.export.export(model, (x,)).module()
    with torch.no_grad():
        compiled, _ = compile_graph(graph, [x], read_options(None, {"kernels": policy}), lambda gm, _: gm)
        assert_near(compiled(x)[0], model(x))
        multiply(model)
        permute_again(model)
        assert_near(compiled(x)[0], model(x))


@pytest.mark.parametrize("policy", ["sparse", "dense"])
def test_the_sizes_of_constants_are_numbers(policy: str) -> None:
    """A symbol would stand for a size that Dynamo has no name to guard by."""
    shapes: list[Any] = []

    def spy(graph: fx.GraphModule, inputs: list[Any]) -> Any:
        shapes.extend(size for tensor in inputs for size in tensor.shape)
        return graph

    compiler = aot_autograd(fw_compiler=spy)
    options = read_options(None, {"kernels": policy})
    model, x = padst.sparsify(nn.Sequential(Net(), nn.ReLU(), nn.Linear(10, 16)), {"*.fc*": spec_of()}).eval(), sample()
    folded = torch.compile(model, backend=lambda gm, inputs: compile_graph(gm, inputs, options, compiler)[0])
    with torch.no_grad():
        assert_near(folded(x), model(x))
    assert shapes
    assert all(type(size) is int for size in shapes)


# --- the documented limit: writes through .data ---


def test_values_of_a_native_layer_are_read_live_even_through_data() -> None:
    model, x = net(spec_of(permutation="none")), sample()
    done = compilation(model, x, {"kernels": "sparse"})
    if any(decision.choice.kernel != "native" for decision in done.report.decisions):
        pytest.fail("there is no native kernel here")
    compiled = torch.compile(model, backend=cheap({"kernels": "sparse"}))
    with torch.no_grad():
        compiled(x)
        for layer in (model.fc1, model.fc2):
            layer.values.data.mul_(2)
            layer.bias.data.add_(1)
        structure = model.fc1.config.structure
        other = structure.choose(torch.rand(model.fc1.config.shape.out_features, model.fc1.config.shape.in_features), 0.5)
        assert not torch.equal(other[1], model.fc1.columns)
        for name, index in zip(structure.index_names, other, strict=True):
            getattr(model.fc1, name).data.copy_(index)
        assert_near(compiled(x), model(x))


def test_a_small_folded_weight_is_compared_by_content() -> None:
    model, x = net(spec_of(permutation="none")), sample()
    compiled = torch.compile(model, backend=cheap({"kernels": "dense"}))
    with torch.no_grad():
        compiled(x)
        model.fc1.values.data.mul_(2)
        assert_near(compiled(x), model(x))


def test_only_large_folded_weights_miss_a_write_through_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(specialization, "_COMPARED_BYTES", 0)
    model, x = net(spec_of(permutation="none")), sample()
    compiled = torch.compile(model, backend=cheap({"kernels": "dense"}))
    with torch.no_grad():
        before = compiled(x)
        model.fc1.values.data.mul_(2)
        assert torch.equal(compiled(x), before)  # the documented limit
        model.fc1.values.mul_(1)  # any write that autograd sees ends it
        assert_near(compiled(x), model(x))


def test_compiling_leaves_the_random_numbers_of_the_model_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PADST_CACHE_DIR", str(tmp_path))  # nothing measured yet, so kernels are measured now
    model, x = net(), sample()
    state = torch.get_rng_state()
    with torch.no_grad():
        torch.compile(model, backend=cheap())(x)
    assert torch.equal(torch.get_rng_state(), state)


# --- copies, pairs, files ---


def test_a_deep_copy_is_a_model_of_its_own() -> None:
    model, x = net(), sample()
    compiled = torch.compile(model, backend=cheap())
    with torch.no_grad():
        compiled(x)
        twin = copy.deepcopy(compiled)
        multiply(twin._orig_mod)
        permute_again(twin._orig_mod)
        for _ in range(2):
            assert_near(twin(x), twin._orig_mod(x))
            assert_near(compiled(x), model(x))
        assert not torch.equal(twin(x), compiled(x))


@pytest.mark.parametrize("permutation", ["random", "learned"])
@pytest.mark.parametrize("policy", POLICIES)
def test_two_models_take_turns(policy: str, permutation: str) -> None:
    one, two, x = net(spec_of(permutation=permutation)), net(spec_of(permutation=permutation, seed=5)), sample()
    two.requires_grad_(False).fc1.values.mul_(3)
    permute_again(two)
    compiler = cheap({"kernels": policy})
    compiled = [torch.compile(model, backend=compiler) for model in (one, two)]
    with torch.no_grad():
        for _ in range(2):
            for program, model in zip(compiled, (one, two), strict=True):
                assert_near(program(x), model(x))


def test_a_model_compiled_twice() -> None:
    model, x = net(), sample()
    programs = [torch.compile(model, backend=cheap({"kernels": policy})) for policy in ("sparse", "dense")]
    with torch.no_grad():
        for program in programs:
            assert_near(program(x), model(x))
        multiply(model)
        for program in programs:
            assert_near(program(x), model(x))


def test_a_saved_compiled_model_is_loaded_into_another(tmp_path: Path) -> None:
    model, other, x = net(), net(spec_of(seed=9)), sample()
    compiled, fresh = torch.compile(model, backend=cheap()), torch.compile(other, backend=cheap())
    with torch.no_grad():
        fresh(x)
        multiply(model)
        y = compiled(x)
        safetensors.torch.save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
        other.load_state_dict(safetensors.torch.load_file(tmp_path / "model.safetensors"))
        assert_near(fresh(x), y)


def test_the_captured_graph_is_left_as_it_is() -> None:
    texts = []

    def keep(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        texts.append(str(gm.graph))
        compiled, done = compile_graph(gm, inputs, Options("sparse"), lambda graph, _: graph)
        texts.append(str(gm.graph))
        assert done.graph.graph.find_nodes(op="call_function", target=PERMUTE) == []
        return compiled

    with torch.no_grad():
        torch.compile(net(), backend=keep)(sample())
    assert texts[0] == texts[1]


# --- generated models ---


@given(data=st.data())
@settings(max_examples=5)
def test_generated_models_compile_to_what_they_are(data: st.DataObject) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for kind in data.draw(st.lists(st.sampled_from(["linear", "gelu", "relu", "norm"]), min_size=1, max_size=4)):
        make = {
            "linear": lambda: nn.Linear(WIDTH, WIDTH),
            "gelu": nn.GELU,
            "relu": nn.ReLU,
            "norm": lambda: nn.LayerNorm(WIDTH),
        }
        layers.append(make[kind]())
    spec = spec_of(*(data.draw(st.sampled_from(c)) for c in (STRUCTURES, ["none", "random", "learned"], ["input", "output"])))
    model = padst.sparsify(nn.Sequential(*layers, nn.Linear(WIDTH, WIDTH)).double(), spec)
    x = sample(dtype=torch.float64)
    with torch.no_grad():
        assert_near(torch.compile(model, backend=backend, fullgraph=True)(x), model(x), terms=64 * WIDTH)
