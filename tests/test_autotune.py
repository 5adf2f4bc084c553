"""Measuring alternatives, and remembering what won across processes."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import padst_compile
from padst_compile.autotune import kernel_choice
from padst_compile.autotune.cache import JsonCache, cache_folder
from padst_compile.autotune.kernel_choice import LayerProblem, choose_kernel, token_bucket
from padst_compile.autotune.measure import interleaved_medians, interleaved_samples

ROOT = Path(padst_compile.__file__).parent.parent
PROBLEM = LayerProblem("block:16x16", 64, 64, 1024, 128, "float32", "in", False, "cpu", "aten")


def python(code: str, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    command = [sys.executable, "-c", code, *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}, check=True)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PADST_CACHE_DIR", str(tmp_path))
    return tmp_path


# --- the file ---


def test_values_are_kept_for_the_next_process(tmp_path: Path) -> None:
    path = tmp_path / "new" / "cache.json"
    JsonCache(path).put("key", {"a": 1.5})
    assert JsonCache(path).get("key") == {"a": 1.5}
    assert JsonCache(path).get("other") is None
    assert json.loads(path.read_text())["entries"] == {"key": {"a": 1.5}}


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"version": 99, "entries": {}}', '{"version": 1, "entries": []}', "\x00"]
)
def test_an_unusable_file_costs_one_warning_and_is_rebuilt(tmp_path: Path, content: str) -> None:
    path = tmp_path / "cache.json"
    path.write_text(content)
    cache = JsonCache(path)
    with pytest.warns(UserWarning, match="unusable and will be rebuilt"):
        assert cache.get("key") is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.get("key") is None
        cache.put("key", 1)
        assert JsonCache(path).get("key") == 1


def test_a_file_that_is_no_text_is_rebuilt(tmp_path: Path) -> None:
    path = tmp_path / "cache.json"
    path.write_bytes(b"\xff\xfe\x80")
    with pytest.warns(UserWarning, match="unusable"):
        assert JsonCache(path).get("key") is None


def test_processes_keep_each_others_entries(tmp_path: Path) -> None:
    path = tmp_path / "cache.json"
    first, second = JsonCache(path), JsonCache(path)
    assert first.get("x") is None
    assert second.get("x") is None
    first.put("first", 1)
    second.put("second", 2)
    assert json.loads(path.read_text())["entries"] == {"first": 1, "second": 2}


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from padst_compile.autotune.cache import JsonCache\n"
        "cache = JsonCache(Path(sys.argv[1]))\n"
        "for i in range(20): cache.put(f'{sys.argv[2]}-{i}', i)\n"
    )
    path = tmp_path / "cache.json"
    running = [subprocess.Popen([sys.executable, "-c", code, str(path), name], cwd=ROOT) for name in "ab"]
    assert [process.wait() for process in running] == [0, 0]
    assert len(json.loads(path.read_text())["entries"]) == 40
    assert sorted(file.suffix for file in tmp_path.iterdir() if file.suffix == ".tmp") == []


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    cache = JsonCache(blocked / "cache.json")
    with pytest.warns(UserWarning, match="not kept for the next run"):
        cache.put("key", 1)
    assert cache.get("key") == 1


def test_a_value_that_is_no_json_leaves_the_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "cache.json"
    JsonCache(path).put("good", 1)
    with pytest.raises(TypeError):
        JsonCache(path).put("bad", object())
    assert JsonCache(path).get("good") == 1
    assert [file.name for file in tmp_path.iterdir() if file.suffix == ".tmp"] == []


def test_the_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PADST_CACHE_DIR", "/some/where")
    assert cache_folder() == Path("/some/where")
    monkeypatch.delenv("PADST_CACHE_DIR")
    assert cache_folder().name == "padst_compile"


# --- measuring ---


def test_candidates_take_turns() -> None:
    order: list[str] = []
    rounds: list[None] = []
    run: dict[str, Callable[[], Any]] = {name: functools.partial(order.append, name) for name in "ab"}
    samples = interleaved_samples(run, repetitions=3, warmup=2, progress=lambda: rounds.append(None))
    assert "".join(order) == "ab" * 5
    assert ({name: len(times) for name, times in samples.items()}, len(rounds)) == ({"a": 3, "b": 3}, 5)


def test_the_median_is_of_the_timed_rounds_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0, 100, 0, 1, 0, 3, 0, 2])  # start and end of a warm-up round and of three timed ones
    monkeypatch.setattr("padst_compile.autotune.measure.time.perf_counter", lambda: next(ticks))
    assert interleaved_medians({"only": lambda: None}, repetitions=3) == {"only": 2}


# --- choosing ---


@pytest.mark.parametrize(
    ("tokens", "bucket"), [(0, 1), (1, 1), (2, 2), (3, 4), (128, 128), (129, 256), (4096, 4096), (10**6, 4096)]
)
def test_tokens_share_buckets_of_powers_of_two(tokens: int, bucket: int) -> None:
    assert token_bucket(tokens) == bucket


@pytest.mark.parametrize(
    ("sparse", "dense", "kernel", "reason"),
    [
        (1.0, 3.0, "aten", "3.0x faster than dense at 128 tokens"),
        (3.0, 1.0, "dense", "sparse would be 3.0x slower than dense at 128 tokens"),
    ],
)
def test_the_faster_one_is_chosen_and_remembered(
    folder: Path, monkeypatch: pytest.MonkeyPatch, sparse: float, dense: float, kernel: str, reason: str
) -> None:
    measured = []

    def medians(candidates: Any, *, repetitions: int) -> dict[str, float]:
        measured.append(sorted(candidates))
        return {"sparse": sparse, "dense": dense}

    monkeypatch.setattr(kernel_choice, "interleaved_medians", medians)
    candidates: dict[str, Callable[[], Any]] = {"sparse": lambda: None, "dense": lambda: None}
    for _ in range(2):
        choice = choose_kernel(PROBLEM, lambda: candidates)
        assert (choice.kernel, choice.reason, choice.sparse_seconds, choice.dense_seconds) == (kernel, reason, sparse, dense)
    assert measured == [["dense", "sparse"]]


def test_both_outcomes_of_real_measurements(folder: Path) -> None:
    fast, slow = torch.zeros(1), torch.zeros(2_000_000)
    one: dict[str, Callable[[], Any]] = {"sparse": lambda: fast + 1, "dense": lambda: slow.exp().exp()}
    other = {"sparse": one["dense"], "dense": one["sparse"]}
    assert choose_kernel(PROBLEM, lambda: one).kernel == "aten"
    assert choose_kernel(LayerProblem(**{**PROBLEM.__dict__, "tokens": 256}), lambda: other).kernel == "dense"


def test_a_second_process_measures_nothing(folder: Path) -> None:
    code = (
        "from padst_compile.autotune.kernel_choice import LayerProblem, choose_kernel\n"
        "runs = []\n"
        "problem = LayerProblem('block:16x16', 64, 64, 1024, 128, 'float32', '', False, 'cpu', 'aten')\n"
        "choose_kernel(problem, lambda: {'sparse': lambda: runs.append(1), 'dense': lambda: runs.append(1)})\n"
        "print(len(runs))\n"
    )
    counts = [int(python(code, PADST_CACHE_DIR=str(folder)).stdout) for _ in range(2)]
    assert counts[0] > 0
    assert counts[1] == 0


@pytest.mark.parametrize(
    "stored", [None, {}, {"sparse": 1.0}, {"sparse": 1.0, "dense": 0.0}, {"sparse": "1", "dense": 1.0}, [1.0]]
)
def test_a_stored_value_that_makes_no_sense_is_measured_again(folder: Path, stored: Any) -> None:
    kernel_choice._cache().put(PROBLEM.key(), stored)
    runs = []
    choose_kernel(PROBLEM, lambda: {"sparse": lambda: runs.append(1), "dense": lambda: runs.append(1)})
    assert runs


def test_every_field_of_a_problem_is_part_of_its_key() -> None:
    changes: dict[str, Any] = {
        "structure": "nm:1:4",
        "in_features": 1,
        "out_features": 1,
        "active": 1,
        "tokens": 1,
        "dtype": "bfloat16",
    }
    changes |= {"permuted": "out", "training": True, "device": "meta", "sparse_kernel": "native"}
    assert set(changes) == set(PROBLEM.__dict__)
    keys = {LayerProblem(**{**PROBLEM.__dict__, name: value}).key() for name, value in changes.items()}
    assert len(keys | {PROBLEM.key()}) == len(changes) + 1
