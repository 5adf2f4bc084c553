"""Sparse models through torch.export and ONNX, and on machines without this package."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import Dim, ExportedProgram, export

import padst_compile as padst
from padst_compile.tolerance import allowed_error, relative_error

SPECS = {
    "block": padst.SparsitySpec(padst.Block((4, 8)), sparsity=0.5, permutation="random"),
    "nm": padst.SparsitySpec(padst.NM(1, 4), permutation="random", permutation_side="output"),
    "diagonal": padst.SparsitySpec(padst.Diagonal(), sparsity=0.7, permutation="random"),
    "unstructured": padst.SparsitySpec(padst.Unstructured(), sparsity=0.7),
}
X = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))


def model(name: str) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 13), nn.LayerNorm(13))
    return padst.sparsify(layers, SPECS[name]).eval()


def exported(layers: nn.Module) -> ExportedProgram:
    return export(layers, (X,), dynamic_shapes=({0: Dim("batch", min=2, max=64)},))


def assert_rounding_apart(found: torch.Tensor, layers: nn.Module, x: torch.Tensor) -> None:
    """`found` is as near to the model in float64 as the model in float32 is, a few times over."""
    with torch.no_grad():
        exact = copy.deepcopy(layers).double()(x.double() if x.is_floating_point() else x)
        bound = allowed_error(relative_error([layers(x)], [exact]), torch.float32)
    assert relative_error([found], [exact]) <= bound


WITHOUT_US = """
import sys, torch
sys.modules["padst_compile"] = None  # an import fails
inputs = torch.load("inputs.pt")
for name in sys.argv[1:]:
    program = torch.export.load(f"{name}.pt2").module()
    torch.save([program(x) for x in inputs], f"{name}.pt")
"""


@pytest.mark.parametrize("name", SPECS)
def test_an_exported_program_keeps_our_ops_through_a_file(name: str, tmp_path: Path) -> None:
    layers = model(name)
    torch.export.save(exported(layers), tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2")
    assert sum("structured_linear" in str(node.target) for node in program.graph.nodes) == 2
    for x in (X, torch.randn(7, 16)):
        assert torch.equal(program.module()(x), layers(x))


def test_decomposed_programs_run_without_this_package(tmp_path: Path) -> None:
    inputs = [X, torch.randn(7, 16)]
    torch.save(inputs, tmp_path / "inputs.pt")
    for name in SPECS:
        program = padst.decompose(exported(model(name)))
        assert not [node for node in program.graph.nodes if "padst" in str(node.target)]
        torch.export.save(program, tmp_path / f"{name}.pt2")
    command = [sys.executable, "-c", WITHOUT_US, *SPECS]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    for name in SPECS:
        for x, found in zip(inputs, torch.load(tmp_path / f"{name}.pt"), strict=True):
            assert_rounding_apart(found, model(name), x)


AHEAD_OF_TIME = """
import torch, padst_compile
run = torch._inductor.aoti_load_package("model.pt2")
torch.save([run(x) for x in torch.load("inputs.pt")], "outputs.pt")
"""


@pytest.mark.slow
def test_a_program_compiled_ahead_of_time_calls_our_ops(tmp_path: Path) -> None:
    """AOTInductor: the process that loads the package imports padst_compile, which has the ops that it calls."""
    layers, inputs = model("block"), [X, torch.randn(7, 16)]
    torch.save(inputs, tmp_path / "inputs.pt")
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(exported(layers), package_path=str(tmp_path / "model.pt2"))
    command = [sys.executable, "-c", AHEAD_OF_TIME]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    for x, found in zip(inputs, torch.load(tmp_path / "outputs.pt"), strict=True):
        assert_rounding_apart(found, layers, x)


class Logits(nn.Module):
    """A transformers model as a function of its tokens alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=tokens, use_cache=False).logits


def tiny_vit() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    timm = pytest.importorskip("timm")
    sizes = {"depth": 1, "embed_dim": 32, "num_heads": 2, "patch_size": 8, "img_size": 16, "num_classes": 5}
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return timm.create_model("vit_tiny_patch16_224", pretrained=False, **sizes), (images,)


def tiny_gpt2() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    transformers = pytest.importorskip("transformers")
    sizes = {"n_layer": 1, "n_embd": 32, "n_head": 2, "vocab_size": 50, "n_positions": 16}
    return Logits(transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))), (torch.arange(24).reshape(2, 12),)


@pytest.mark.parametrize("build", [tiny_vit, tiny_gpt2])
def test_real_models_run_in_onnxruntime(build, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    layers, inputs = build()
    padst.sparsify(layers.eval(), padst.SparsitySpec(padst.Block(8), sparsity=0.5, permutation="random"))
    dense = padst.densify(copy.deepcopy(layers))
    torch.onnx.export(dense, inputs, tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: inputs[0].numpy()})
    assert_rounding_apart(torch.from_numpy(found), layers, inputs[0])


def test_a_densified_model_runs_in_onnxruntime(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    layers = model("block")
    dense = padst.densify(copy.deepcopy(layers))
    batch = {0: Dim("batch", min=2, max=64)}
    torch.onnx.export(dense, (X,), tmp_path / "model.onnx", dynamo=True, dynamic_shapes=(batch,), verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for x in (X, torch.randn(7, 16)):
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert_rounding_apart(torch.from_numpy(found), layers, x)
