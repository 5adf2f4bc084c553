"""Results of searches on disk: their keys, and what many processes, a kill and broken files do to them."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import padst_compile
from padst_compile.autotune.cache import Cache, cache_folder, read_stored
from padst_compile.autotune.entry import MARGIN, Entry, Timing
from padst_compile.autotune.environment import Environment
from padst_compile.autotune.keys import Key, anywhere, relatives
from padst_compile.autotune.lookup import Library
from padst_compile.autotune.problem import LayerProblem
from padst_compile.autotune.space import Candidate
from padst_compile.kernels.launch import Problem, Tile
from padst_compile.testing.privileges import obedient

ROOT = Path(padst_compile.__file__).parent.parent
HERE = Environment("a processor", "AVX512", 2, "0123456789ab", "2.15.0", "3.9.0")
LAYER = LayerProblem("block:16x16", 64, 32, 1024, 128, "float32", "in", False, "cpu", ("native", "dense"), "bias")
LAUNCH = Problem("native_block", "block:16x16", 64, 32, 1024, 128, "float32", permuted="in", epilogue="bias", device="cpu")
KEY = Key(LAYER, HERE)


def entry(sparse: float = 1.0, dense: float = 2.0, effort: Any = "quick") -> Entry:
    return Entry(effort, (Timing(Candidate("native"), sparse), Timing(Candidate("dense"), dense)))


def at(key: Key, **changes: Any) -> Key:
    return dataclasses.replace(key, problem=dataclasses.replace(key.problem, **changes))


def python(code: str, *args: str, before: Sequence[str] = (), **environment: str) -> str:
    command = [*before, sys.executable, "-c", code, *args]
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}, check=False, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


# --- keys ---

names = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=12)
sizes = st.integers(0, 1 << 40)
kernels = st.sampled_from([("native", "dense"), ("aten", "dense"), ("triton", "dense")])
layers = st.builds(
    LayerProblem, names, sizes, sizes, sizes, st.integers(1, 1 << 16), names, names, st.booleans(), names, kernels, names, names
)
launches = st.builds(Problem, names, names, sizes, sizes, sizes, st.integers(1, 1 << 16), *[names] * 6)
environments = st.builds(Environment, names, names, st.integers(0, 512), names, names, names)
keys = st.builds(Key, st.one_of(layers, launches), environments)
seconds = st.floats(1e-9, 1e9)
tiles = st.one_of(st.none(), st.builds(Tile, *[st.integers(0, 512)] * 6, st.sampled_from(["pointer", "descriptor"])))


@st.composite
def stored(draw: Any) -> tuple[Key, Entry]:
    key = draw(keys)
    layer = isinstance(key.problem, LayerProblem)
    timed = list(key.problem.kernels) if layer else [key.problem.kernel]
    timings = [Timing(Candidate(timed[0]), draw(seconds))]
    timings += [Timing(Candidate(timed[0], tile), draw(seconds)) for tile in draw(st.lists(tiles, max_size=3))]
    timings += [Timing(Candidate(name), draw(seconds)) for name in timed[1:]]
    return key, Entry(draw(st.sampled_from(["quick", "full"])), tuple(timings))


@given(stored())
def test_a_result_reads_back_as_it_was(case: tuple[Key, Entry]) -> None:
    key, result = case
    text = json.dumps({"version": 1, "key": key.to_dict(), **result.to_dict()})
    assert read_stored(json.loads(text)) == (key.to_dict(), result)


@given(keys, keys)
def test_only_equal_keys_share_a_file(first: Key, second: Key) -> None:
    assert (first.to_dict() == second.to_dict()) == (first == second)
    same_family = relatives(first.to_dict()) == relatives(second.to_dict())
    assert (first.family == second.family) == same_family


@given(keys)
def test_file_names_are_plain(key: Key) -> None:
    assert key.name.startswith(f"{key.family}_t{key.problem.tokens}_")
    assert all(character.isascii() and (character.isalnum() or character in "_-") for character in key.name)


@pytest.mark.parametrize("problem", [LAYER, LAUNCH])
def test_every_field_of_a_problem_is_part_of_its_key(problem: Any) -> None:
    key = Key(problem, HERE)
    for field in dataclasses.fields(problem):
        value = getattr(problem, field.name)
        changed = ("aten", "dense") if field.name == "kernels" else not value if value in (True, False) else value * 2 or "x"
        other = at(key, **{field.name: changed})
        assert other.name != key.name, field.name
        assert (other.family == key.family) == (field.name in ("tokens", "epilogue")), field.name


def test_every_field_of_the_environment_is_part_of_the_key() -> None:
    for field in dataclasses.fields(HERE):
        other = Key(LAYER, dataclasses.replace(HERE, **{field.name: getattr(HERE, field.name) * 2}))
        assert other.family != KEY.family
        assert (anywhere(other.to_dict()) == anywhere(KEY.to_dict())) == (field.name in ("torch", "triton"))


# --- files ---


def test_the_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PADST_CACHE_DIR", "/some/where")
    assert cache_folder() == Path("/some/where")
    monkeypatch.delenv("PADST_CACHE_DIR")
    assert cache_folder().name == "padst_compile"


def test_results_are_kept_for_the_next_process(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "tuning"
    Cache(folder).write(KEY, entry())
    assert Cache(folder).read(KEY) == entry()
    assert Cache(folder).read(at(KEY, tokens=256)) is None
    (file,) = folder.glob("*.json")
    data = json.loads(file.read_text())
    assert data["key"]["problem"]["structure"] == "block:16x16"
    assert data["key"]["environment"]["processor"] == "a processor"


GOOD = {"version": 1, "key": KEY.to_dict(), **entry().to_dict()}


def changed(**changes: Any) -> str:
    return json.dumps({**GOOD, **changes})


def candidate(**changes: Any) -> list[Any]:
    first, *rest = GOOD["candidates"]
    return [{**first, **changes}, *rest]


BROKEN = {
    "empty": "",
    "truncated": json.dumps(GOOD)[:-20],
    "a list": "[]",
    "null": "null",
    "deeply nested": "[" * 100_000,
    "another version": changed(version=99),
    "no key": changed(key=None),
    "no candidates": changed(candidates=[]),
    "no effort": changed(effort="off"),
    "a time of zero": changed(candidates=candidate(seconds=0.0)),
    "a negative time": changed(candidates=candidate(seconds=-1.0)),
    "no number": changed(candidates=candidate(seconds=float("nan"))),
    "an endless time": changed(candidates=candidate(seconds=float("inf"))),
    "a time in words": changed(candidates=candidate(seconds="1")),
    "no dense": changed(candidates=GOOD["candidates"][:1]),
    "another kernel": changed(candidates=candidate(kernel="aten")),
    "a tile of words": changed(candidates=candidate(tile={**dataclasses.asdict(Tile(1, 2, 3)), "tokens": "many"})),
    "half a tile": changed(candidates=candidate(tile={"tokens": 1})),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_an_unusable_file_costs_one_warning_and_is_replaced(tmp_path: Path, content: str) -> None:
    path = tmp_path / f"{KEY.name}.json"
    path.write_text(content)
    cache = Cache(tmp_path)
    with pytest.warns(UserWarning, match="is unusable and will be replaced"):
        assert cache.read(KEY) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.read(KEY) is None
        assert list(cache.relatives(KEY)) == []
        cache.write(KEY, entry())
        assert Cache(tmp_path).read(KEY) == entry()


@pytest.mark.parametrize("content", [b"\xff\xfe\x80", b"\x80\x04K\x01."])
def test_a_file_that_is_no_text_is_replaced(tmp_path: Path, content: bytes) -> None:
    (tmp_path / f"{KEY.name}.json").write_bytes(content)
    with pytest.warns(UserWarning, match="unusable"):
        assert Cache(tmp_path).read(KEY) is None


def test_a_file_about_another_problem_is_replaced(tmp_path: Path) -> None:
    other = at(KEY, in_features=65)
    Cache(tmp_path).write(other, entry())
    (tmp_path / f"{other.name}.json").rename(tmp_path / f"{KEY.name}.json")
    cache = Cache(tmp_path)
    with pytest.warns(UserWarning, match="is about another problem and will be replaced"):
        assert cache.read(KEY) is None
    assert list(cache.relatives(KEY)) == []
    cache.write(KEY, entry(3.0))
    assert Cache(tmp_path).read(KEY) == entry(3.0)


def test_a_folder_that_cannot_be_written_costs_a_warning_and_is_remembered(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    cache = Cache(blocked / "tuning")
    with pytest.warns(UserWarning, match="other processes may measure the same"), cache.claim(KEY):
        pass
    with pytest.warns(UserWarning, match="not kept for the next run"):
        cache.write(KEY, entry())
    assert cache.read(KEY) == cache.refresh(KEY) == entry()


_READ_ONLY = """
import sys
from pathlib import Path
import pytest
sys.path.insert(0, "tests")
from test_autotune_cache import KEY, Cache, entry

folder = Path(sys.argv[1])
cache = Cache(folder)
assert cache.read(KEY) == entry()
with pytest.warns(UserWarning, match="other processes may measure the same"), cache.claim(KEY):
    pass
with pytest.warns(UserWarning, match="not kept for the next run"):
    cache.write(KEY, entry(5.0))
assert cache.read(KEY) == cache.refresh(KEY) == entry(5.0)
assert Cache(folder).read(KEY) == entry()
"""


def test_a_read_only_folder_is_read(tmp_path: Path) -> None:
    before = obedient()
    if before is None:
        pytest.skip("there is no way here to take the right to write anywhere from root")
    Cache(tmp_path).write(KEY, entry())
    tmp_path.chmod(0o500)
    try:
        python(_READ_ONLY, str(tmp_path), before=before)
    finally:
        tmp_path.chmod(0o700)
    assert [path.name for path in tmp_path.iterdir()] == [f"{KEY.name}.json"]


def test_what_a_killed_writer_left_goes_with_the_next_search(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "sys.path.insert(0, 'tests')\n"
        "from test_autotune_cache import KEY, Cache, entry\n"
        "Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "Cache(Path(sys.argv[1])).write(KEY, entry())\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=False, timeout=300)
    assert killed.returncode == -signal.SIGKILL
    (draft,) = tmp_path.iterdir()
    assert (draft / f"{KEY.name}.json").exists()
    cache = Cache(tmp_path)
    with cache.claim(at(KEY, tokens=256)):
        assert draft.exists()  # of another problem, which somebody may be writing
    with cache.claim(KEY):
        assert not draft.exists()
        cache.write(KEY, entry())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([f"{KEY.name}.json", "locks"])


def test_what_another_process_stored_is_seen_by_refresh(tmp_path: Path) -> None:
    first, second = Cache(tmp_path), Cache(tmp_path)
    first.write(KEY, entry())
    assert second.read(KEY) == entry()
    first.write(KEY, entry(effort="full"))
    assert (second.read(KEY), second.refresh(KEY)) == (entry(), entry(effort="full"))


# --- processes ---

_PROCESSES = """
import os, signal, sys, time
import torch
torch.set_num_threads(1)
from padst_compile.autotune.kernel_choice import choose_kernel
from padst_compile.autotune.problem import LayerProblem

problem = LayerProblem("block:16x16", 64, 64, 1024, 128, "float32", "", False, "cpu", ("native", "dense"))

def runs():
    with open(sys.argv[1], "a") as log:
        log.write(f"{os.getpid()}\\n")
    return {"native": lambda: None, "dense": lambda: time.sleep(0.01)}

def forked(work):
    child = os.fork()
    if not child:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return child
"""


def test_eight_processes_measure_a_problem_once(tmp_path: Path) -> None:
    code = _PROCESSES + (
        "children = [forked(lambda: os.write(1, f'{choose_kernel(problem, runs).source}\\n'.encode())) for _ in range(8)]\n"
        "sys.exit(any(os.waitpid(child, 0)[1] for child in children))\n"
    )
    log = tmp_path / "log"
    sources = python(code, str(log), PADST_CACHE_DIR=str(tmp_path)).split("\n")
    assert sorted(filter(None, sources)) == ["cached"] * 7 + ["tuned now"]
    assert len(log.read_text().split()) == 1


def test_a_process_that_is_killed_while_it_measures_leaves_no_trace(tmp_path: Path) -> None:
    code = _PROCESSES + (
        "def hang():\n"
        "    choose_kernel(problem, lambda: runs() | {'dense': lambda: time.sleep(100)})\n"
        "child = forked(hang)\n"
        "while not os.path.exists(sys.argv[1]): time.sleep(0.01)\n"
        "time.sleep(0.1)\n"
        "os.kill(child, signal.SIGKILL)\n"
        "os.waitpid(child, 0)\n"
        "for _ in range(2): print(choose_kernel(problem, runs).source)\n"
    )
    log = tmp_path / "log"
    assert python(code, str(log), PADST_CACHE_DIR=str(tmp_path)).split("\n")[:2] == ["tuned now", "cached"]
    assert len(log.read_text().split()) == 2
    assert len(list((tmp_path / "tuning").rglob("*.json"))) == 1


def test_processes_that_write_at_once_leave_whole_files(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path\n"
        "sys.path.insert(0, 'tests')\n"
        "from test_autotune_cache import KEY, Cache, at, entry\n"
        "children = []\n"
        "for worker in range(4):\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        for i in range(50): Cache(Path(sys.argv[1])).write(at(KEY, tokens=1 << (i % 5)), entry(1.0 + worker))\n"
        "        os._exit(0)\n"
        "    children.append(child)\n"
        "sys.exit(any(os.waitpid(child, 0)[1] for child in children))\n"
    )
    python(code, str(tmp_path))
    assert sorted(file.suffix for file in tmp_path.iterdir()) == [".json"] * 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(Cache(tmp_path).read(at(KEY, tokens=1 << i)) is not None for i in range(5))


# --- the order of lookup ---


def ship(folder: Path, *results: tuple[Key, Entry]) -> Path:
    folder.mkdir(exist_ok=True)
    data = [{"version": 1, "key": key.to_dict(), **result.to_dict()} for key, result in results]
    (folder / "some-device.json").write_text(json.dumps(data))
    return folder


def test_the_users_own_results_come_before_shipped_ones(tmp_path: Path) -> None:
    library = Library(Cache(tmp_path / "own"), ship(tmp_path / "configs", (KEY, entry(5.0))))
    found = library.exact(KEY)
    assert found is not None
    assert (found.source, found.entry) == ("shipped", entry(5.0))
    library.cache.write(KEY, entry())
    found = library.exact(KEY)
    assert found is not None
    assert (found.source, found.entry) == ("cached", entry())


def test_shipped_results_hold_for_other_versions_but_not_for_other_devices_or_kernels(tmp_path: Path) -> None:
    library = Library(Cache(tmp_path / "own"), ship(tmp_path / "configs", (KEY, entry())))

    def found(**changes: Any) -> bool:
        return library.exact(Key(LAYER, dataclasses.replace(HERE, **changes))) is not None

    assert found(torch="3.0", triton="4.0")
    assert not found(processor="another")
    assert not found(kernels="another")
    assert not found(capability="AVX2")


@pytest.mark.parametrize("own", [True, False])
def test_the_nearest_number_of_tokens_answers_within_limits(tmp_path: Path, own: bool) -> None:
    known = [(at(KEY, tokens=16), entry(1.0)), (at(KEY, tokens=512), entry(2.0))]
    library = Library(Cache(tmp_path / "own"), ship(tmp_path / "configs", *([] if own else known)))
    for key, result in known if own else []:
        library.cache.write(key, result)

    def nearest(**changes: Any) -> tuple[float, int] | None:
        found = library.near(at(KEY, **changes))
        return None if found is None else (found.entry.default.seconds, found.tokens)

    assert nearest(tokens=32) == (1.0, 16)
    assert nearest(tokens=256) == nearest(tokens=4096) == (2.0, 512)
    assert nearest(tokens=8192) is None
    assert nearest(tokens=16, in_features=65) is None


@pytest.mark.parametrize(("same", "other"), [(64, 256), (256, 64)])
def test_among_equally_near_results_the_same_epilogue_counts(tmp_path: Path, same: int, other: int) -> None:
    library = Library(Cache(tmp_path), tmp_path / "none")
    library.cache.write(at(KEY, tokens=other, epilogue="relu"), entry(1.0))
    library.cache.write(at(KEY, tokens=same), entry(2.0))
    found = library.near(KEY)
    assert found is not None
    assert found.entry == entry(2.0)
    found = library.near(at(KEY, tokens=other))
    assert found is not None
    assert (found.entry, found.source) == (entry(1.0), "nearest bucket")


def test_the_package_ships_only_what_can_be_read() -> None:
    from padst_compile.autotune.cache import read_shipped
    from padst_compile.autotune.lookup import SHIPPED

    for key, _ in read_shipped(SHIPPED):
        assert key["environment"]["processor"]


# --- who wins ---


def timings(*times: float) -> Entry:
    return Entry("quick", tuple(Timing(Candidate("native", Tile(i, 0, 0) if i else None), s) for i, s in enumerate(times)))


@pytest.mark.parametrize(
    ("times", "winner"),
    [
        ((1.0, 0.98), 0),
        ((1.0, 0.9), 1),
        ((1.0, 0.9, 0.89), 1),
        ((1.0, 0.9, 0.8), 2),
        ((1.0,), 0),
    ],
)
def test_a_candidate_must_win_by_a_margin(times: tuple[float, ...], winner: int) -> None:
    assert timings(*times).winner == timings(*times).timings[winner]


@given(st.lists(st.floats(0.5, 1.0), min_size=1, max_size=6))
def test_who_wins_depends_on_ratios_alone_and_nobody_is_much_faster(times: list[float]) -> None:
    winner = timings(*times).winner
    assert winner.seconds <= min(times) * (1 + MARGIN)
    scaled = timings(*(2.0**10 * time for time in times))
    assert scaled.winner.candidate == winner.candidate


@given(st.lists(st.floats(1.0, 1.0 + MARGIN / 2), min_size=2, max_size=6))
def test_noise_below_the_margin_moves_nobody_away_from_the_default(times: list[float]) -> None:
    assert timings(*times).winner == timings(*times).default
