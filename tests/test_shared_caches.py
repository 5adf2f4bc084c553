"""One cache folder for many: processes and threads that begin at once, one that is killed, other versions of the package."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import padst_compile
from padst_compile.autotune.cache import cache_folder
from padst_compile.kernels import native
from padst_compile.testing.package_copies import copy_package, edit, leave_schemas_alone

ROOT = Path(padst_compile.__file__).parent.parent
PROCESSES = 8


_STRICT = 'import warnings; warnings.filterwarnings("error", module="padst_compile")'


def start(code: str, cache: Path, package: Path = ROOT, **environment: str) -> subprocess.Popen[str]:
    """Run `code` in a new interpreter, in a session of its own, with the package below `package`."""
    own = {"PYTHONPATH": str(package), "PADST_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        [sys.executable, "-c", f"{_STRICT}\n{code}"],
        env={**os.environ, **own},
        cwd=package,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def answer(process: subprocess.Popen[str]) -> Any:
    """The JSON that a process prints last."""
    printed, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return json.loads(printed.splitlines()[-1])


def contents(folder: Path) -> dict[str, str]:
    """What the files of a folder hold, but for locks."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def compiler(folder: Path, before: str = "") -> str:
    """The path of a C++ compiler that notes in `folder` what it compiles; `before` runs first, where it compiles."""
    script, draft = folder / "compiler", folder / "draft"
    draft.write_text(
        f'#!/bin/sh\ncase "$*" in *" -c "*)\necho "$@" >> {folder / "compiled"}\n{before}\nesac\nexec c++ "$@" -O0\n'
    )
    draft.chmod(0o755)
    draft.replace(script)  # a shell may still be reading the one before
    return str(script)


def compiled_sources(folder: Path) -> Counter[str]:
    """How often each of the kernels' sources was compiled."""
    words = (folder / "compiled").read_text().split()
    return Counter(Path(word).name for word in words if word.endswith(".cpp") and "kernels/native" in word)


needs_compiler = pytest.mark.skipif(not native.load(), reason=f"no native kernels: {native.unavailable_reason()}")

# --- other versions ---

_TUNE = """
import json
from padst_compile.autotune.kernel_choice import choose_kernel
from padst_compile.autotune.problem import LayerProblem

problem = LayerProblem("block:16x16", 64, 64, 1024, 128, "float32", "", False, "cpu", ("native", "dense"))
print(json.dumps(choose_kernel(problem, lambda: {"native": lambda: None, "dense": lambda: None}).source))
"""


def test_versions_of_results_and_of_kernels_keep_their_measurements_side_by_side(tmp_path: Path) -> None:
    format_, kernels, cache = tmp_path / "format", tmp_path / "kernels", tmp_path / "cache"
    edit(copy_package(format_) / "autotune" / "cache.py", "VERSION = 1\n", "VERSION = 2\n")
    edit(copy_package(kernels) / "kernels" / "native" / "library.cpp", "// Registers", "// Now registers")
    for package in (ROOT, format_, kernels):
        assert answer(start(_TUNE, cache, package)) == "tuned now"
    kept = contents(cache)
    assert len(kept) == 3
    for package in (ROOT, format_, kernels):
        assert answer(start(_TUNE, cache, package)) == "cached"
    assert contents(cache) == kept


_LOAD = """
import json, torch
from padst_compile.kernels import native
print(json.dumps(torch.ops.padst_native.panel_tokens() if native.load() else native.unavailable_reason()))
"""


@needs_compiler
def test_builds_of_other_sources_lie_side_by_side(tmp_path: Path) -> None:
    cache, packages = tmp_path / "cache", {number: tmp_path / str(number) for number in (3, 5)}
    for number, package in packages.items():
        leave_schemas_alone(copy_package(package), number)
    at_once = {number: start(_LOAD, cache, package, CXX=compiler(tmp_path)) for number, package in packages.items()}
    assert {number: answer(process) for number, process in at_once.items()} == {3: 3, 5: 5}
    kept = contents(cache)
    assert sorted(Path(name).name for name in kept) == 2 * ["padst_native.sha256"] + 2 * ["padst_native.so"]
    for number, package in packages.items():
        assert answer(start(_LOAD, cache, package, CXX=compiler(tmp_path, "exit 1"))) == number
    assert contents(cache) == kept


# --- a process that is killed while its compiler runs ---


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    """Until a process has made a file."""
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


@needs_compiler
def test_a_build_whose_process_is_killed_is_done_again(tmp_path: Path) -> None:
    """The compiler survives its parent, as those of ninja do, and ends when another process has built the library."""
    cache, package, go = tmp_path / "cache", tmp_path / "package", tmp_path / "go"
    leave_schemas_alone(copy_package(package), 3)
    pause = f"touch {tmp_path / 'runs'}; while [ ! -e {go} ]; do sleep 0.05; done"
    killed = start(_LOAD, cache, package, CXX=compiler(tmp_path, pause))
    wait_for(tmp_path / "runs", killed)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    try:
        assert not list(cache.rglob("*.so"))
        assert answer(start(_LOAD, cache, package, CXX=compiler(tmp_path))) == 3
        kept = contents(cache)
        go.touch()
        killed.communicate(timeout=60)  # until the compiler, which holds the other ends, has ended
    finally:
        _end_session(killed.pid)
    assert answer(start(_LOAD, cache, package, CXX=compiler(tmp_path, "exit 1"))) == 3
    assert {name: kept[name] for name in kept if name.endswith((".so", ".sha256"))} == {
        name: value for name, value in contents(cache).items() if name.endswith((".so", ".sha256"))
    }


def _end_session(leader: int) -> None:
    """End what a process that is gone has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


# --- many that begin at once ---

_MODEL = """
import copy, hashlib, json, torch
import padst_compile as padst
from padst_compile.autotune.kernel_choice import observed
from padst_compile.tolerance import allowed_error, relative_error

def is_right(y, model, x):
    exact = [copy.deepcopy(model).double()(x.double())]
    return relative_error([y], exact) <= allowed_error(relative_error([model(x)], exact), x.dtype)

def make(features=64):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(features, 96), torch.nn.ReLU(), torch.nn.Linear(96, 64))
    return padst.sparsify(model.eval(), padst.SparsitySpec("nm:1:8", permutation="random"))
"""

_FIRST_CALL = (
    _MODEL
    + """
model, choices = make(), []
with torch.no_grad(), observed(lambda problem, choice: choices.append((str(problem), choice.source, choice.kernel))):
    x = torch.randn(32, 64)
    y = torch.compile(model, backend="padst")(x)
    right = is_right(y, model, x)
print(json.dumps({"choices": choices, "y": hashlib.sha256(y.numpy().tobytes()).hexdigest(), "right": right}))
"""
)


@needs_compiler
@pytest.mark.slow
def test_eight_processes_build_tune_and_compile_at_once(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    inductor = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    at_once = [start(_FIRST_CALL, cache, CXX=compiler(tmp_path), **inductor) for _ in range(PROCESSES)]
    answers = [answer(process) for process in at_once]
    sources = compiled_sources(tmp_path)
    assert sources == dict.fromkeys(sources, 1) and len(sources) > 1
    assert len({found["y"] for found in answers}) == 1 and all(found["right"] for found in answers)
    by_problem: dict[str, list[str]] = {}
    for found in answers:
        for problem, source, _ in found["choices"]:
            by_problem.setdefault(problem, []).append(source)
    assert len(by_problem) == 2
    assert all(sorted(sources) == (PROCESSES - 1) * ["cached"] + ["tuned now"] for sources in by_problem.values())
    names = [path.name for path in cache.rglob("*")]
    assert not [name for name in names if name.endswith("-build") or name.startswith(".")]
    again = answer(start(_FIRST_CALL, cache, CXX=compiler(tmp_path, "exit 1"), **inductor))  # locks block nobody
    assert again["y"] == answers[0]["y"] and {source for _, source, _ in again["choices"]} == {"cached"}


_THREADS = (
    _MODEL
    + """
import threading

def work(number):
    generator = torch.Generator().manual_seed(number)
    model = models[number]
    barrier.wait()
    compiled = together if number >= 4 else torch.compile(model, backend="padst")
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn(32, model[0].config.shape.in_features, generator=generator)
            right.append(is_right(compiled(x), model, x))

tuned = []
tune_layer = kernel_choice.tune_layer
kernel_choice.tune_layer = lambda problem, *rest: (tuned.append(str(problem)), tune_layer(problem, *rest))[1]
right, models = [], [make(), make(), make(80), make(80), *2 * [make(112)]]
together = torch.compile(models[-1], backend="padst")
barrier = threading.Barrier(len(models))
threads = [threading.Thread(target=work, args=(number,)) for number in range(len(models))]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps({"right": right, "tuned": tuned}))
"""
).replace("autotune.kernel_choice import observed", "autotune import kernel_choice")


@needs_compiler
@pytest.mark.slow
def test_threads_that_compile_at_once_tune_once_and_are_right(tmp_path: Path) -> None:
    """Equal models, different ones, and one compiled model that two threads call for the first time."""
    cache = tmp_path / "cache"
    shutil.copytree(cache_folder() / "native", cache / "native")
    found = answer(start(_THREADS, cache, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "inductor")))
    assert found["right"] == 18 * [True]
    assert len(found["tuned"]) == len(set(found["tuned"])) == 4
