"""Files from others run no code here, and folders that others may write are not used for what is loaded as code."""

from __future__ import annotations

import ast
import dataclasses
import io
import json
import os
import pickle
import stat
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import padst_compile as padst
from padst_compile.autotune.cache import Cache
from padst_compile.autotune.entry import Entry, Timing
from padst_compile.autotune.environment import Environment
from padst_compile.autotune.keys import Key
from padst_compile.autotune.problem import LayerProblem
from padst_compile.autotune.space import Candidate
from padst_compile.errors import PadstError
from padst_compile.files import sha256_of

ROOT = Path(padst.__file__).parent.parent
SOURCES = sorted(path for name in ("padst_compile", "passes", "kernels", "autotune") for path in (ROOT / name).rglob("*.py"))
KEY = Key(
    LayerProblem("block:16x16", 64, 32, 1024, 128, "float32", "in", False, "cpu", ("native", "dense"), "bias"),
    Environment("a processor", "AVX512", 2, "0123456789ab", "2.15.0", "3.9.0"),
)
RESULT = Entry("quick", (Timing(Candidate("native"), 1.0), Timing(Candidate("dense"), 2.0)))


class Planted:
    """What makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.mark,)


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[Path]:
    """The folder that appears where a planted pickle is executed; a test fails if it is there at the end."""
    mark = tmp_path / "executed"
    yield mark
    assert not mark.exists()


def sparse_model() -> nn.Module:
    torch.manual_seed(0)
    return padst.sparsify(nn.Sequential(nn.Linear(32, 32), nn.GELU()), padst.SparsitySpec("block:8", sparsity=0.75))


def by_pickle(path: Path, content: object) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


def by_torch(path: Path, content: object) -> None:
    buffer = io.BytesIO()
    torch.save({"state": content}, buffer)
    path.write_bytes(buffer.getvalue())


@pytest.mark.parametrize("write", [by_pickle, by_torch])
def test_the_planted_files_would_run_code(write: Callable[[Path, object], None], tmp_path: Path) -> None:
    write(tmp_path / "file", Planted(tmp_path / "executed"))
    if write is by_pickle:
        pickle.loads((tmp_path / "file").read_bytes())
    else:
        torch.load(tmp_path / "file", weights_only=False)
    assert (tmp_path / "executed").is_dir()


@pytest.mark.parametrize("write", [by_pickle, by_torch])
@pytest.mark.parametrize("name", ["padst.json", "weights"])
def test_saved_models_are_not_unpickled(write: Callable[[Path, object], None], name: str, tmp_path: Path, mark: Path) -> None:
    padst.save_pretrained(sparse_model(), tmp_path / "model")
    (file,) = (tmp_path / "model").glob(name if name == "padst.json" else "*.safetensors")
    write(file, Planted(mark))
    with pytest.raises(PadstError):
        padst.load_pretrained(tmp_path / "model", nn.Sequential(nn.Linear(32, 32), nn.GELU()))


@pytest.mark.parametrize("write", [by_pickle, by_torch])
def test_specifications_are_not_unpickled(write: Callable[[Path, object], None], tmp_path: Path, mark: Path) -> None:
    write(tmp_path / "spec.json", Planted(mark))
    with pytest.raises(PadstError):
        padst.load_spec(tmp_path / "spec.json")


@pytest.mark.parametrize("write", [by_pickle, by_torch])
def test_measurements_are_not_unpickled(write: Callable[[Path, object], None], tmp_path: Path, mark: Path) -> None:
    write(tmp_path / f"{KEY.name}.json", Planted(mark))
    with pytest.warns(UserWarning, match="unusable and will be replaced"):
        assert Cache(tmp_path).read(KEY) is None


@pytest.mark.parametrize("write", [by_pickle, by_torch])
def test_checkpoints_are_not_unpickled(write: Callable[[Path, object], None], tmp_path: Path, mark: Path) -> None:
    model = sparse_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    padst.save_checkpoint(tmp_path / "run", model, optimizer)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    (digests,) = (file for file in files if file.name == "digests.json")
    assert len(files) > 4
    for file in files:
        before, content = digests.read_text(), file.read_bytes()
        write(file, Planted(mark))
        if file != digests and file.name in json.loads(before):  # as somebody would who wants us to believe the file
            digests.write_text(json.dumps({**json.loads(before), file.name: sha256_of(file)}))
        with pytest.raises(PadstError):
            padst.load_checkpoint(tmp_path / "run", model, optimizer)
        file.write_bytes(content)
        digests.write_text(before)
    padst.load_checkpoint(tmp_path / "run", model, optimizer)


def risky(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Calls that execute what they read."""
    unpicklers = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        owner, _, function = called.rpartition(".")
        weights_only = any(word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in node.keywords)
        if called in ("eval", "exec", "__import__") or (
            function in ("load", "loads", "Unpickler", "open") and owner in unpicklers
        ):
            yield node.lineno, called
        if called == "torch.load" and not weights_only:
            yield node.lineno, called


def test_no_source_executes_what_it_reads() -> None:
    assert len(SOURCES) > 100
    found = {f"{path.relative_to(ROOT)}: {name}" for path in SOURCES for _, name in risky(ast.parse(path.read_text()))}
    assert found == {"padst_compile/testing/source_edits.py: exec"}  # of the tests' own variants of the passes


@pytest.mark.parametrize(
    "code", ["eval(x)", "pickle.load(f)", "pickle.Unpickler(f)", "torch.load(f)", "torch.load(f, weights_only=False)"]
)
def test_the_search_finds_such_calls(code: str) -> None:
    assert list(risky(ast.parse(code)))
    assert not list(risky(ast.parse("model.eval(); torch.load(f, weights_only=True); json.load(f)")))


def test_cache_folders_and_files_are_private_without_a_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        cache = Cache(tmp_path / "new" / "padst" / "tuning")
        cache.write(KEY, RESULT)
        with cache.claim(KEY):
            pass
    finally:
        os.umask(before)
    made = list((tmp_path / "new").rglob("*"))
    assert {path.name for path in made} >= {"padst", "tuning", "locks", f"{KEY.name}.json"}
    for path in [tmp_path / "new", *made]:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == 0o700 if path.is_dir() else not mode & 0o022, (path, oct(mode))
    assert Cache(cache.folder).read(KEY) == RESULT


_ROOT_OF_BUILDS = """
import json, os, sys
from padst_compile.kernels.native import build
os.umask(0)
answers = []
for folder in sys.argv[1:]:
    os.environ["PADST_CACHE_DIR"] = folder
    try:
        answers.append(str(build._cache_root()))
    except build._BuildError as error:
        answers.append(f"refused: {error}")
print(json.dumps(answers))
"""


def test_builds_are_kept_where_nobody_else_can_plant_one(tmp_path: Path) -> None:
    fresh, shared, sticky, planted = (tmp_path / name for name in ("fresh/deep", "shared", "sticky", "planted"))
    for folder, mode in ((shared, 0o777), (sticky, 0o1777), (planted, 0o700)):
        folder.mkdir()
        folder.chmod(mode)
    (planted / "native").mkdir()
    (planted / "native").chmod(0o770)
    command = [sys.executable, "-c", _ROOT_OF_BUILDS, *map(str, (fresh, shared, sticky, planted))]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=120)
    assert result.returncode == 0, result.stderr
    made, open_folder, private_in_open, group = json.loads(result.stdout)
    assert made == str(fresh / "native") and private_in_open == str(sticky / "native")
    for folder in (tmp_path / "fresh", fresh, fresh / "native", sticky / "native"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700, folder
    for answer, folder in ((open_folder, shared), (group, planted / "native")):
        assert answer.startswith("refused") and f"{folder} can be written by others" in answer
        assert "chmod go-w" in answer and "PADST_CACHE_DIR" in answer


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can give a folder to somebody else")
def test_a_folder_of_somebody_else_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "native").mkdir(mode=0o700)
    os.chown(tmp_path / "native", 12345, 12345)
    command = [sys.executable, "-c", _ROOT_OF_BUILDS, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True, timeout=120)
    (answer,) = json.loads(result.stdout)
    assert answer.startswith("refused") and "written by others" in answer


def test_results_of_another_version_of_the_kernels_are_not_read(tmp_path: Path) -> None:

    other = Key(KEY.problem, dataclasses.replace(KEY.environment, kernels="ffffffffffff"))
    Cache(tmp_path).write(KEY, RESULT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Cache(tmp_path).read(other) is None
        assert not list(Cache(tmp_path).relatives(other))
        Cache(tmp_path).write(other, dataclasses.replace(RESULT, effort="full"))
        assert Cache(tmp_path).read(KEY) == RESULT
