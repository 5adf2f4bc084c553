"""How Triton kernels multiply float32: as PyTorch is set to, or split; and what is measured under which setting."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import nn

import padst_compile as padst
from padst_compile.autotune import kernel_choice
from padst_compile.autotune.cost_model import layer_seconds, tile_seconds
from padst_compile.autotune.machine import gpu
from padst_compile.autotune.problem import LayerProblem, MlpProblem
from padst_compile.kernels import triton_support
from padst_compile.kernels.gather_roof import gather_is_faster
from padst_compile.kernels.launch import Problem, Tile
from padst_compile.kernels.structured_linear import structured_linear
from padst_compile.passes import fuse_mlp
from padst_compile.passes.choose_kernels import ChooseKernels
from padst_compile.passes.fuse_activation import FuseActivation
from padst_compile.passes.fuse_mlp import FuseMlp
from padst_compile.structures import NM, Block, Diagonal, Shape, Structure
from padst_compile.testing.accuracy import error_bound
from padst_compile.testing.capture import capture
from padst_compile.testing.triton_products import TritonLayer

# The most that the product of two float32 numbers is off, relative to it. TF32 keeps 11 bits of each, the rest is cut off or
# rounded; of two parts of 11 bits each, what no part holds and the product of the two lower parts are lost.
PRODUCT_ERROR = {"ieee": 0.0, "tf32": 2.01 * 2**-10, "tf32x3": 3.01 * 2**-20}


@contextlib.contextmanager
def set_to(setting: Callable[[], None]) -> Iterator[None]:
    setting()
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


def allow_tf32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True


def new_tf32() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"


SETTINGS: dict[str, tuple[Callable[[], AbstractContextManager[Any]], str]] = {
    "nothing": (contextlib.nullcontext, "ieee"),
    "highest": (lambda: set_to(lambda: torch.set_float32_matmul_precision("highest")), "ieee"),
    "high": (lambda: set_to(lambda: torch.set_float32_matmul_precision("high")), "tf32"),
    "medium": (lambda: set_to(lambda: torch.set_float32_matmul_precision("medium")), "tf32"),
    "allow_tf32": (lambda: set_to(allow_tf32), "tf32"),
    "fp32_precision": (lambda: set_to(new_tf32), "tf32"),
    "split": (padst.split_tf32, "tf32x3"),
}
each_setting = pytest.mark.parametrize("setting", SETTINGS)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The precision with which each product of tiles is launched, in order."""
    found: list[Any] = []
    call = triton_support.Launch.__call__

    def spy(launch: triton_support.Launch) -> None:
        if "PRECISION" in launch.arguments:
            found.append(launch.arguments["PRECISION"])
        call(launch)

    monkeypatch.setattr(triton_support.Launch, "__call__", spy)
    return found


@each_setting
@pytest.mark.parametrize(("structure", "products"), [(Block(16), 3), (NM(1, 4, vector=16), 2), (Diagonal(), 0)], ids=str)
def test_every_setting_reaches_every_kernel(
    structure: Structure, products: int, setting: str, triton_device: torch.device, launched: list[Any]
) -> None:
    """Gradients of inputs of N:M and diagonals multiply single numbers, always exactly."""
    torch.manual_seed(0)
    context, expected = SETTINGS[setting]
    layer = TritonLayer.random(structure, Shape(32, 48), torch.float32, triton_device)
    x, values = layer.random_input(20).requires_grad_(), layer.values.clone().requires_grad_()
    with context():
        y = structured_linear(x, values, list(layer.topology), None, None, None, 32, structure.to_string())
        y.sum().backward()
    assert launched == products * [expected]
    exact, magnitude = layer.exact_sums(x.detach())
    products_off = PRODUCT_ERROR[expected] if products else 0.0
    allowed = error_bound(magnitude * (1 + products_off), 50, torch.float32) + products_off * magnitude
    assert bool(((y.detach().double() - exact).abs() <= allowed).all())


def test_other_dtypes_are_not_split(triton_device: torch.device, launched: list[Any]) -> None:
    layer = TritonLayer.random(Block(16), Shape(32, 48), torch.bfloat16, triton_device)
    with padst.split_tf32():
        layer.op(*layer.arguments(layer.random_input(3)))
    assert launched == ["ieee"]


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


@pytest.mark.parametrize("setting", ["highest", "high", "split"])
def test_what_is_measured_under_one_setting_does_not_decide_under_another(
    setting: str, triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, expected = SETTINGS[setting]
    seen: list[LayerProblem | MlpProblem] = []
    problem = fuse_mlp._problem
    monkeypatch.setattr(fuse_mlp, "_problem", lambda *args: seen.append(problem(*args)) or seen[-1])
    model = padst.sparsify(Mlp(), padst.SparsitySpec(Block(16), 0.5)).to(triton_device)
    x = torch.randn(8, 32, device=triton_device)
    with context(), torch.no_grad(), kernel_choice.observed(lambda layer, choice: seen.append(layer)):
        facts = capture(model, x).context(inference=True)
        ChooseKernels("measure", "off").run(facts)
        facts = capture(model, x).context(inference=True)
        for rule in (ChooseKernels("sparse", "off"), FuseActivation(), FuseMlp("measure", "off")):
            rule.run(facts)
    assert [type(one) for one in seen] == [LayerProblem, LayerProblem, MlpProblem]
    assert {one.precision for one in seen} == {expected}


def test_a_cpu_multiplies_as_it_does() -> None:
    with set_to(lambda: torch.set_float32_matmul_precision("high")):
        assert triton_support.precision_on(torch.device("cpu"), torch.float32) == "ieee"


def test_the_model_knows_who_splits() -> None:
    on = gpu("NVIDIA H200", (9, 0), 132)
    layer = LayerProblem("block:64x64", 768, 3072, 943_718, 1 << 16, "float32", "", False, "cuda", ("triton", "dense"))
    times = {
        (kernel, precision): layer_seconds(dataclasses.replace(layer, precision=precision), kernel, on)
        for kernel in layer.kernels
        for precision in PRODUCT_ERROR
    }
    assert times["triton", "tf32"] < times["triton", "tf32x3"] < times["triton", "ieee"]
    assert times["dense", "tf32"] < times["dense", "tf32x3"] == times["dense", "ieee"]
    launch = Problem("block_forward", "block:64x64", 768, 3072, 943_718, 1 << 16, "float32", device="NVIDIA H200 (9.0)")
    tiles = [tile_seconds(dataclasses.replace(launch, precision=p), Tile(64, 64, 32), on) for p in ("tf32", "tf32x3", "ieee")]
    assert tiles == sorted(tiles)


def test_gathering_is_weighed_against_the_dense_product_of_pytorch() -> None:
    """Which is exact where Triton's is split."""
    x = torch.empty(4096, 16)
    assert gather_is_faster(0.2, x)
    with padst.split_tf32():
        assert gather_is_faster(0.2, x)
    with set_to(lambda: torch.set_float32_matmul_precision("high")):
        assert not gather_is_faster(0.2, x)
