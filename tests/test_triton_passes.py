"""The passes lower to the Triton ops as they do to the C++ ones, and fuse into them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import padst_compile as padst
from padst_compile.backend import padst as backend
from padst_compile.kernels import dispatch
from padst_compile.kernels.triton_support import Launch
from padst_compile.passes.choose_kernels import ChooseKernels
from padst_compile.passes.fuse_activation import FuseActivation
from padst_compile.passes.fuse_gate import FuseGate
from padst_compile.passes.fuse_input_permutation import FuseInputPermutation
from padst_compile.passes.fuse_mlp import FuseMlp
from padst_compile.passes.fuse_residual import FuseResidual
from padst_compile.passes.graph import argument
from padst_compile.passes.native_calls import is_native_linear
from padst_compile.passes.split_gates import SplitGates
from padst_compile.structures import NM, Block, Diagonal, Shape, Structure
from padst_compile.testing.capture import capture

STRUCTURES = (Block(16), NM(1, 4), Diagonal())


class Branch(nn.Module):
    """A layer with what kernels can do behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(self.layer(x)) + x


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda s: s.to_string())
def test_products_run_on_triton_with_their_epilogue(structure: Structure, inference: bool, triton_device: torch.device) -> None:
    torch.manual_seed(0)
    sparsity = structure.natural_sparsity() or 0.5
    model = padst.sparsify(Branch(), padst.SparsitySpec(structure, sparsity)).to(triton_device)
    x = torch.randn(5, 32, device=triton_device)
    with torch.set_grad_enabled(not inference):
        facts = capture(model, x).context(inference=inference)
        choose = ChooseKernels("sparse")
        for rule in (choose, FuseActivation(), FuseResidual()):
            rule.run(facts)
        facts.module.recompile()
        assert [decision.choice.kernel for decision in choose.decisions] == ["triton"]
        calls = [node for node in facts.module.graph.nodes if is_native_linear(node)]
        assert len(calls) == (1 if inference else 0)
        for call in calls:
            assert call.target.namespace == "padst_triton"
            assert argument(call, "activation") == "gelu" and argument(call, "residual") is not None
            assert choose.decisions[0].fused[-2:] == ("activation", "residual")
        result = torch.compile(model, backend=lambda graph, inputs: facts.module.forward)(x)
        torch.testing.assert_close(result, model(x), rtol=1e-5, atol=1e-5)


class Halves(nn.Module):
    """A layer whose outputs are the two factors of a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.layer(x).chunk(2, dim=-1)
        return a * F.silu(b)


@pytest.mark.parametrize("structure", [Block(16), NM(1, 4)], ids=lambda s: s.to_string())
def test_each_half_of_a_chunked_product_is_a_triton_kernel(structure: Structure, triton_device: torch.device) -> None:
    torch.manual_seed(0)
    sparsity = structure.natural_sparsity() or 0.5
    model = padst.sparsify(Halves(), padst.SparsitySpec(structure, sparsity)).to(triton_device)
    x = torch.randn(65, 32, device=triton_device)
    with torch.no_grad():
        facts = capture(model, x).context(inference=True)
        choose = ChooseKernels("sparse")
        for rule in (choose, SplitGates(), FuseActivation(), FuseGate()):
            rule.run(facts)
        facts.module.recompile()
        calls = [node for node in facts.module.graph.nodes if is_native_linear(node)]
        assert [call.target.namespace for call in calls] == ["padst_triton"] * 2
        assert choose.decisions[0].fused[-2:] == ("activation", "gate")
        result = torch.compile(model, backend=lambda graph, inputs: facts.module.forward)(x)
        torch.testing.assert_close(result, model(x), rtol=1e-5, atol=1e-5)


class Mlp(nn.Module):
    """Two layers, one behind the other."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x))) + x


@pytest.mark.parametrize(
    ("structure", "permuted", "reason"),
    [
        ("block:16", "none", None),
        ("block:16:32", "none", "blocks of the first layer"),
        ("block:16", "random", "no permutations"),
    ],
)
def test_two_layers_become_one_triton_kernel(
    structure: str, permuted: str, reason: str | None, triton_device: torch.device
) -> None:
    torch.manual_seed(0)
    spec = padst.SparsitySpec(structure, 0.5, permutation=permuted)
    model, x = padst.sparsify(Mlp(), spec).to(triton_device), torch.randn(5, 32, device=triton_device)
    with torch.no_grad():
        facts = capture(model, x).context(inference=True)
        for rule in (FuseInputPermutation(), ChooseKernels("sparse"), FuseActivation(), FuseResidual()):
            rule.run(facts)
        report = FuseMlp("sparse").run(facts)
        facts.module.recompile()
        joined = [node for node in facts.module.graph.nodes if node.target is dispatch.mlp_op("triton")]
        assert len(joined) == report.rewritten == (1 if reason is None else 0)
        assert reason is None or reason in report.refusals[0].reason
        result = torch.compile(model, backend=lambda graph, inputs: facts.module.forward)(x)
        torch.testing.assert_close(result, model(x), rtol=1e-5, atol=1e-5)


CLASSES = Diagonal(group=16)


class Chain(nn.Module):
    """Two layers of whole numbers, so that their results are exact."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        layers = nn.Sequential(nn.Linear(32, hidden), nn.ReLU(), nn.Linear(hidden, 32))
        self.layers = padst.sparsify(layers, padst.SparsitySpec(CLASSES, 0.5, permutation="random"))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -4, 4)
            parameter.data.round_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x) + 1

    def exact(self, x: torch.Tensor) -> torch.Tensor:
        """Through dense layers, in float64."""
        dense: torch.Tensor = padst.densify(copy.deepcopy(self)).double()(x.double())
        return dense


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize(("hidden", "read"), [(64, (False, False)), (256, (False, True))])
def test_diagonals_in_classes_are_blocks_whose_pointers_are_read_in_loops_alone(
    hidden: int,
    read: tuple[bool, bool],
    inference: bool,
    triton_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    counts: list[int] = []
    launch = Launch.__call__

    def noted(self: Launch) -> None:
        counts.append(self.arguments["BLOCKS_PER_ROW"])
        launch(self)

    monkeypatch.setattr(Launch, "__call__", noted)
    model = Chain(hidden).to(triton_device)
    x = torch.randint(-3, 4, (512, 32), device=triton_device).float()
    compiled = torch.compile(model, backend=backend, options={"kernels": "sparse"})
    with torch.set_grad_enabled(not inference):
        for _ in range(2):
            counts.clear()
            y = compiled(x)
            assert tuple(count == 0 for count in counts) == read
            assert torch.equal(y.double(), model.exact(x))
            for layer in (model.layers[0], model.layers[2]):  # a change of topology
                structure, shape = layer.config.structure, layer.config.shape
                active = structure.active_units(layer.topology, shape)
                layer.offsets.copy_(*structure.topology_of(active.roll(1, 1), shape))


def test_blocks_that_rows_hold_equally_many_of_by_chance_are_looked_up(triton_device: torch.device) -> None:
    structure, shape = Block(16), Shape(64, 64)
    model = padst.sparsify(nn.Sequential(nn.Linear(64, 64)), padst.SparsitySpec(structure, 0.75)).to(triton_device)
    for index, equal in zip(model[0].topology, structure.topology_of(torch.eye(4, dtype=torch.bool), shape), strict=True):
        index.copy_(equal)
    with torch.no_grad():
        facts = capture(model, torch.randn(5, 64, device=triton_device)).context(inference=True)
        ChooseKernels("sparse").run(facts)
    (call,) = (node for node in facts.module.graph.nodes if is_native_linear(node))
    assert not argument(call, "equal_rows")
