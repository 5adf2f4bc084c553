"""Checkpoints across ranks: another number of them goes on."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from padst_compile.testing.ranks import torchrun

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this PyTorch has no gloo"),
]

SCRIPT = Path(__file__).parent / "distributed" / "checkpoints.py"
STEPS = 12


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def unbroken(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """How the model is distributed, and the weights that two ranks come to in one go."""
    folder = tmp_path_factory.mktemp("unbroken")
    torchrun(SCRIPT, 2, folder / "checkpoint", request.param, STEPS, folder / "weights.safetensors")
    return request.param, folder / "weights.safetensors"


def weights(file: Path) -> dict[str, torch.Tensor]:
    return {name.removeprefix("module."): value for name, value in load_file(*file.glob("*.safetensors")).items()}


def assert_alike(one: Path, other: Path, tolerance: float) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        if tensor.is_floating_point():
            assert torch.allclose(tensor, second[name], rtol=0, atol=tolerance), name
        else:
            assert torch.equal(tensor, second[name]), name


def test_another_number_of_ranks_goes_on(unbroken: tuple[str, Path], tmp_path: Path) -> None:
    kind, expected = unbroken
    for ranks, end in ((2, 4), (1, 8), (4, STEPS)):
        torchrun(SCRIPT, ranks, tmp_path / "checkpoint", kind, end, tmp_path / "weights.safetensors")
    # Sums over ranks round otherwise: in float64 that is 1e-16 of weights of about 1, which AdamW's ratio may enlarge.
    assert_alike(expected, tmp_path / "weights.safetensors", 1e-9)


def test_ranks_check_all_files_among_them_and_all_refuse(unbroken: tuple[str, Path], tmp_path: Path) -> None:
    kind, expected = unbroken
    folder = tmp_path / "checkpoint"
    shutil.copytree(expected.with_name("checkpoint"), folder)
    (digests,) = folder.glob("data-*/digests.json")
    files = {file.name for file in digests.parent.iterdir()}
    assert json.loads(digests.read_text()).keys() == files - {digests.name}
    assert {"__0_0.distcp", "__1_0.distcp"} <= files
    changed = digests.with_name("__1_0.distcp")
    content = changed.read_bytes()
    changed.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(AssertionError) as caught:
        torchrun(SCRIPT, 3, folder, kind, STEPS, tmp_path / "weights.safetensors")
    # torchrun ends ranks once one has failed, and some may not have come to print theirs
    assert str(caught.value).count("__1_0.distcp is not as it was written") >= 1
    assert "Timeout" not in str(caught.value)


@pytest.mark.parametrize(("death", "moment", "back"), [(8, "stepping", 5), (10, "saving", 5), (10, "publishing", 5)])
def test_a_rank_dies_and_the_restarted_training_ends_alike(
    unbroken: tuple[str, Path], tmp_path: Path, death: int, moment: str, back: int
) -> None:
    """A rank is killed in the midst of a step, or of a save; torchrun starts all ranks again, from the checkpoint before."""
    kind, expected = unbroken
    folder, out = tmp_path / "checkpoint", tmp_path / "weights.safetensors"
    errors = torchrun(SCRIPT, 2, folder, kind, STEPS, out, death, moment, restarts=1)
    assert f"exitcode: -{int(signal.SIGKILL)}" in errors
    begun = [line.rpartition(" ")[2] for line in errors.splitlines() if "begins behind step" in line]
    assert sorted(begun) == ["0", "0", str(back), str(back)]
    assert_alike(expected, out, 0.0)
    assert sorted(file.name[:5] for file in folder.iterdir()) == ["curre", "data-"], "drafts were left behind"
