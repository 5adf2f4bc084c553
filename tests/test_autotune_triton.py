"""The search over tiles of Triton kernels: in the interpreter where there is no GPU, with real launches."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from padst_compile.autotune import lookup, tiles
from padst_compile.autotune.kernel_choice import choose_kernel
from padst_compile.autotune.problem import LayerProblem
from padst_compile.autotune.search import launches_of
from padst_compile.autotune.space import tiles_of
from padst_compile.passes.graph import STRUCTURED_LINEAR
from padst_compile.structures import parse

TOKENS, IN, OUT = 32, 64, 48


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PADST_CACHE_DIR", str(tmp_path))


def layer(structure: str, device: torch.device, *, training: bool) -> tuple[LayerProblem, Callable[[], torch.Tensor], Any]:
    """The problem, its sparse product with gradients while training, and a dense one."""
    parsed = parse(structure)
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0))
    topology = parsed.choose(weight.abs(), parsed.natural_sparsity() or 0.5)
    values = parsed.pack(weight, topology).to(device).requires_grad_(training)
    index = [table.to(device) for table in topology]
    x = torch.randn(TOKENS, IN, device=device).requires_grad_(training)

    def sparse() -> torch.Tensor:
        y: torch.Tensor = STRUCTURED_LINEAR(x, values, index, None, None, None, OUT, parsed.to_string())
        if training:
            y.sum().backward()
        return y.detach()

    dense = weight.to(device)
    problem = LayerProblem(
        parsed.to_string(), IN, OUT, values.numel(), TOKENS, "float32", "", training, device.type, ("triton", "dense")
    )
    return problem, sparse, lambda: x.detach() @ dense.T


@pytest.mark.parametrize(
    ("structure", "training", "kernels"),
    [
        ("block:16", False, ["block_forward"]),
        ("block:16", True, ["block_forward", "block_input_gradient", "block_value_gradient"]),
        ("nm:1:4", True, ["nm_forward", "nm_input_gradient", "nm_value_gradient"]),
        ("diagonal", True, ["diagonal_forward", "diagonal_input_gradient", "diagonal_value_gradient"]),
    ],
)
def test_every_launch_of_a_product_can_be_tuned(
    triton_device: torch.device, structure: str, training: bool, kernels: list[str]
) -> None:
    _, sparse, _ = layer(structure, triton_device, training=training)
    problems = launches_of(sparse)
    assert [problem.kernel for problem in problems] == kernels
    for problem in problems:
        default, *others = tiles_of(problem)
        assert others
        assert default not in others


def test_what_wins_is_kept_for_each_launch_and_used_by_the_next(triton_device: torch.device) -> None:
    problem, sparse, dense = layer("block:16", triton_device, training=True)
    expected = sparse()
    choice = choose_kernel(problem, lambda: {"triton": sparse, "dense": dense})
    assert choice.source == "tuned now"
    stored = [json.loads(path.read_text()) for path in lookup.library().cache.folder.glob("*.json")]
    launches = {data["key"]["problem"]["kernel"]: data for data in stored if data["key"]["kind"] == "launch"}
    assert sorted(launches) == ["block_forward", "block_input_gradient", "block_value_gradient"]
    assert all(len(data["candidates"]) > 1 for data in launches.values())

    used = {}
    for launch in launches_of(sparse):
        found = tiles.find(tiles.launch_key(launch))
        assert found is not None
        used[launch.kernel] = tiles.tuned_tile(launch)
        assert used[launch.kernel] == found.entry.winner.candidate.tile
    assert torch.allclose(sparse(), expected, atol=1e-4)
