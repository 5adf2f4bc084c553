"""Disks that fill up, and folders that cannot be written: what was there stays, nothing half is left, and models still run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import padst_compile as padst
from padst_compile.autotune.cache import Cache, cache_folder
from padst_compile.autotune.entry import Entry, Timing
from padst_compile.autotune.environment import Environment
from padst_compile.autotune.keys import Key
from padst_compile.autotune.problem import LayerProblem
from padst_compile.autotune.space import Candidate
from padst_compile.errors import CheckpointError, PretrainedError, RunFolderError
from padst_compile.kernels import native
from padst_compile.recipes.checkpoint import load_checkpoint, save_checkpoint
from padst_compile.recipes.rows import Rows
from padst_compile.recipes.run_folder import RunFolder
from padst_compile.testing.package_copies import copy_package, leave_schemas_alone
from padst_compile.testing.privileges import obedient

ROOT = Path(padst.__file__).parent.parent


class Disk:
    """A folder on a disk that can be made full.

    Args:
        folder: to write to.
        mounted: whether the disk is that of the folder alone; otherwise no file of this process and those that it starts may
            grow beyond a few bytes while it is full.
    """

    def __init__(self, folder: Path, mounted: bool) -> None:
        self.folder, self._mounted = folder, mounted

    @contextlib.contextmanager
    def full(self) -> Iterator[None]:
        """Within this, nothing can be written."""
        if self._mounted:
            ballast = self.folder / "ballast"
            with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
            try:
                yield
            finally:
                ballast.unlink()
            return
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (16, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    def contents(self) -> dict[str, str]:
        """What is on the disk, but for locks, which are empty."""
        files = [path for path in self.folder.rglob("*") if path.is_dir() or path.suffix != ".lock"]
        return {
            str(path.relative_to(self.folder)): "" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
            for path in files
        }


@pytest.fixture(params=["a small disk", "files that may not grow"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if request.param != "a small disk":
        yield Disk(folder, mounted=False)
        return
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m,mode=0700", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("only root can mount a disk, where that is allowed")
    yield Disk(folder, mounted=True)
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


# --- measurements and builds: work goes on without them ---

KEY = Key(
    LayerProblem("block:16x16", 64, 32, 1024, 128, "float32", "in", False, "cpu", ("native", "dense"), "bias"),
    Environment("a processor", "AVX512", 2, "0123456789ab", "2.15.0", "3.9.0"),
)


def result(seconds: float) -> Entry:
    return Entry("quick", (Timing(Candidate("native"), seconds), Timing(Candidate("dense"), 2.0)))


def test_measurements_are_used_though_they_cannot_be_kept(disk: Disk) -> None:
    Cache(disk.folder).write(KEY, result(1.0))
    with Cache(disk.folder).claim(KEY):
        before = disk.contents()
    cache = Cache(disk.folder)
    with disk.full(), cache.claim(KEY):
        with pytest.warns(UserWarning, match="measurements are not kept for the next run: .*(space|large)"):
            cache.write(KEY, result(0.5))
        assert cache.read(KEY) == result(0.5)
        assert Cache(disk.folder).read(KEY) == result(1.0)
    assert disk.contents() == before


_LOAD = """
import json, warnings
from padst_compile.kernels import native
warnings.simplefilter("ignore")
print(json.dumps([native.load(), native.unavailable_reason()]))
"""


def load_kernels(package: Path, cache: Path) -> tuple[bool, str | None]:
    """Whether a process gets the C++ kernels, and why not."""
    environment = {**os.environ, "PYTHONPATH": str(package), "PADST_CACHE_DIR": str(cache)}
    done = subprocess.run(
        [sys.executable, "-B", "-c", _LOAD], capture_output=True, text=True, env=environment, cwd=package, check=False
    )
    assert done.returncode == 0, done.stderr
    loaded, reason = json.loads(done.stdout.splitlines()[-1])
    return loaded, reason


@pytest.mark.skipif(not native.load(), reason=f"no native kernels: {native.unavailable_reason()}")
def test_kernels_that_cannot_be_built_are_done_without_and_built_later(disk: Disk, tmp_path: Path) -> None:
    leave_schemas_alone(copy_package(tmp_path / "package"), 3)
    with disk.full():
        loaded, reason = load_kernels(tmp_path / "package", disk.folder)
    assert not loaded and reason
    assert list(disk.contents()) == ["native"]
    assert load_kernels(tmp_path / "package", disk.folder) == (True, None)


# --- models and trainings: a clear error, and what was saved before ---


def make(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    return padst.sparsify(model, padst.SparsitySpec("block:8", sparsity=0.5, permutation="random"))


def test_a_model_that_cannot_be_saved_leaves_the_one_before(disk: Disk) -> None:
    padst.save_pretrained(make(), disk.folder / "model")
    before = disk.contents()
    with disk.full(), pytest.raises(PretrainedError, match="could not be written to"):
        padst.save_pretrained(make(seed=1), disk.folder / "model")
    assert disk.contents() == before
    dense = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    x = torch.randn(2, 64)
    assert torch.equal(padst.load_pretrained(disk.folder / "model", dense)(x), make()(x))


def trained(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = make(seed)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(disk: Disk) -> None:
    padst.save_checkpoint(disk.folder / "run", *trained(0), extra={"step": 0})
    before = disk.contents()
    with disk.full(), pytest.raises(CheckpointError, match="could not be written"):
        padst.save_checkpoint(disk.folder / "run", *trained(1), extra={"step": 1})
    assert disk.contents() == before
    model, optimizer = trained(2)
    assert padst.load_checkpoint(disk.folder / "run", model, optimizer) == {"step": 0}
    assert torch.equal(model[0].values, trained(0)[0][0].values)


def test_a_run_that_cannot_write_says_so_and_keeps_its_rows_and_checkpoint(disk: Disk) -> None:
    rows, checkpoint, folder = Rows(disk.folder / "rows"), disk.folder / "checkpoint.pt", RunFolder(disk.folder)
    rows.append({"step": 1, "loss": 0.123456789})
    save_checkpoint(checkpoint, {"step": 1})
    folder.write(folder.data, {"classes": 10})
    before = disk.contents()
    with disk.full():
        for write in (
            lambda: rows.append({"step": 2, "text": "long" * 2000}),
            lambda: rows.keep_until(1),
            lambda: save_checkpoint(checkpoint, {"step": 2}),
            lambda: folder.write(folder.data, {"classes": 100}),
        ):
            with pytest.raises(RunFolderError, match="cannot write .*; once that is possible"):
                write()
    assert rows.read() == [{"step": 1, "loss": 0.123456789}]
    rows.keep_until(1)
    assert disk.contents() == before
    assert load_checkpoint(checkpoint, torch.device("cpu")) == {"step": 1}


# --- folders that cannot be written ---

_INFERENCE = """
import copy, json, warnings
import torch
import padst_compile as padst
from padst_compile.autotune.kernel_choice import observed
from padst_compile.kernels import native
from padst_compile.tolerance import allowed_error, relative_error

choices, torch_model = [], torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 64))
model, x = padst.sparsify(torch_model.eval(), padst.SparsitySpec("nm:1:8", permutation="random")), torch.randn(32, 64)
with warnings.catch_warnings(record=True) as caught, torch.no_grad():
    warnings.simplefilter("always")
    exact, errors = [copy.deepcopy(model).double()(x.double())], []
    with observed(lambda problem, choice: choices.append(choice.source)):
        for _ in range(2):
            torch._dynamo.reset()
            y = torch.compile(model, backend="padst")(x)
            errors.append(relative_error([y], exact) <= allowed_error(relative_error([model(x)], exact), x.dtype))
said = [str(warning.message) for warning in caught if "padst_compile" in warning.filename or "measure" in str(warning.message)]
print(json.dumps([errors, choices, native.load(), said]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("built", [False, True], ids=["home", "cache that holds a build"])
def test_models_run_where_nothing_can_be_kept(tmp_path: Path, built: bool) -> None:
    before = obedient()
    if before is None or (built and not native.load()):
        pytest.skip(f"root writes anywhere here, or there are no native kernels: {native.unavailable_reason()}")
    home, cache = tmp_path / "home", tmp_path / "home" / "cache"
    cache.mkdir(parents=True)
    if built:
        shutil.copytree(cache_folder() / "native", cache / "native")
    environment = {**os.environ, "HOME": str(home), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment = {name: value for name, value in environment.items() if name not in ("XDG_CACHE_HOME", "PADST_CACHE_DIR")}
    environment |= {"PADST_CACHE_DIR": str(cache)} if built else {}
    folders = [home, *(path for path in home.rglob("*") if path.is_dir())]
    try:
        for folder in folders:
            folder.chmod(0o500)
        command = [*before, sys.executable, "-c", _INFERENCE]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    finally:
        for folder in folders:
            folder.chmod(0o700)
    assert done.returncode == 0, done.stderr
    right, choices, loaded, said = json.loads(done.stdout.splitlines()[-1])
    assert right == [True, True] and choices == 2 * ["tuned now"] + 2 * ["cached"] and loaded == built
    expected = ["other processes may measure the same", "measurements are not kept for the next run"]
    expected += [] if built else ["native CPU kernels are unavailable: the cache folder"]
    assert all(any(text.startswith(start) for text in said) for start in expected), said
    assert len(said) == len(expected)
