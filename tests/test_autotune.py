"""Choosing what runs a layer: what each effort measures, looks up or reckons, and timing itself."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from padst_compile.autotune import lookup, measure, tiles
from padst_compile.autotune.cache import Cache, results_folder
from padst_compile.autotune.effort import Budget
from padst_compile.autotune.entry import Entry, Timing
from padst_compile.autotune.environment import environment
from padst_compile.autotune.kernel_choice import KernelChoice, choose_kernel, observed
from padst_compile.autotune.keys import Key
from padst_compile.autotune.measure import interleaved_medians, interleaved_samples, raced_medians, raced_seconds
from padst_compile.autotune.problem import LayerProblem, token_bucket
from padst_compile.autotune.space import Candidate
from padst_compile.kernels import dispatch, native
from padst_compile.kernels.launch import Problem, Tile, tile_for
from padst_compile.kernels.native.tiles import default_tile
from padst_compile.passes.graph import STRUCTURED_LINEAR
from padst_compile.structures import Block

PROBLEM = LayerProblem("block:16x16", 64, 64, 1024, 128, "float32", "", False, "cpu", ("native", "dense"))
LAUNCH = Problem("native_block", "block:16x16", 64, 64, 1024, 128, "float32", device="cpu")
SHORT, LONG = 0.0005, 0.01


class Clock:
    """Time passes where a test says so: candidates take exactly as long as they should, however busy the machine is."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        self.now += seconds


CLOCK = Clock()


@pytest.fixture
def real_time() -> None:
    """Measure what really runs."""


@pytest.fixture(autouse=True)
def _clock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "real_time" not in request.fixturenames:
        monkeypatch.setattr(measure, "time", CLOCK)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    native.load()  # built once, and not again for a folder that has no build
    monkeypatch.setenv("PADST_CACHE_DIR", str(tmp_path))
    return tmp_path


def at(tokens: int, problem: LayerProblem = PROBLEM) -> LayerProblem:
    return LayerProblem(**{**problem.__dict__, "tokens": tokens})


def key(problem: LayerProblem | Problem = PROBLEM) -> Key:
    return Key(problem, environment("cpu"))


def entry(sparse: float = 1.0, dense: float = 3.0, effort: Any = "quick") -> Entry:
    return Entry(effort, (Timing(Candidate("native"), sparse), Timing(Candidate("dense"), dense)))


class Layer:
    """Both products of a layer, which take a given time; `measured` counts how often they were asked for."""

    def __init__(self, sparse: float = SHORT, dense: float = LONG) -> None:
        self.measured = 0
        self._seconds = sparse, dense

    def __call__(self) -> Any:
        self.measured += 1
        sparse, dense = self._seconds
        return {"native": lambda: CLOCK.spend(sparse), "dense": lambda: CLOCK.spend(dense)}


class TunableLayer(Layer):
    """Its sparse product asks for a tile and is fast with 48 tokens alone."""

    def __call__(self) -> Any:
        def sparse() -> None:
            self.used.append(tile_for(LAUNCH, default_tile).tokens)
            CLOCK.spend(SHORT if self.used[-1] == 48 else LONG)

        self.measured += 1
        self.used: list[int] = []
        return {"native": sparse, "dense": lambda: CLOCK.spend(LONG)}


def never() -> Any:
    raise AssertionError("nothing was to be measured")


# --- what each effort does ---


def test_off_measures_and_looks_up_nothing() -> None:
    lookup.library().cache.write(key(), entry(sparse=3.0, dense=1.0))
    choice = choose_kernel(PROBLEM, never, "off")
    assert (choice.source, choice.sparse_seconds, choice.tile) == ("cost model", None, None)
    assert choice.reason.endswith("faster than dense at 128 tokens (cost model)")


def test_cached_measures_nothing() -> None:
    assert choose_kernel(PROBLEM, never, "cached").source == "cost model"
    lookup.library().cache.write(key(), entry())
    assert choose_kernel(PROBLEM, never, "cached").source == "cached"
    assert choose_kernel(at(512), never, "cached").source == "nearest bucket"


def test_cached_takes_what_the_package_ships(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Cache(tmp_path / "configs").write(key(), entry())
    (file,) = (tmp_path / "configs").glob("*.json")
    file.write_text(f"[{file.read_text()}]")
    monkeypatch.setattr(lookup, "SHIPPED", tmp_path / "configs")
    choice = choose_kernel(PROBLEM, never, "cached")
    assert (choice.source, choice.reason) == ("shipped", "3.0x faster than dense at 128 tokens (shipped)")
    assert choose_kernel(PROBLEM, never, "quick").source == "shipped"


def test_quick_measures_what_is_not_known_and_remembers_it() -> None:
    layer = Layer()
    assert [choose_kernel(PROBLEM, layer).source for _ in range(2)] == ["tuned now", "cached"]
    assert [choose_kernel(at(256), layer).source for _ in range(2)] == ["tuned now", "cached"]  # no matter how near
    assert layer.measured == 2


def test_full_measures_again_what_was_measured_quickly() -> None:
    layer = Layer()
    sources = [choose_kernel(PROBLEM, layer, effort).source for effort in ("quick", "full", "full", "quick", "cached")]
    assert sources == ["tuned now", "tuned now", "cached", "cached", "cached"]
    assert layer.measured == 2


def test_what_another_process_measured_thoroughly_is_not_measured_again(tmp_path: Path) -> None:
    choose_kernel(PROBLEM, Layer())
    Cache(results_folder()).write(key(), entry(effort="full"))
    choice = choose_kernel(PROBLEM, never, "full")
    assert (choice.source, choice.sparse_seconds) == ("cached", 1.0)


@pytest.mark.parametrize("effort", ["quick", "full"])
def test_nothing_is_measured_while_a_cuda_graph_is_captured(monkeypatch: pytest.MonkeyPatch, effort: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose_kernel(PROBLEM, never, effort).source == "cost model"
    lookup.library().cache.write(key(), entry())
    assert choose_kernel(PROBLEM, never, effort).source == "cached"


@pytest.mark.parametrize(
    ("sparse", "dense", "kernel", "reason"),
    [
        (1.0, 3.0, "native", "3.0x faster than dense at 128 tokens (cached)"),
        (1.0, 0.99, "native", "as fast as dense at 128 tokens (cached)"),
        (3.0, 1.0, "dense", "sparse would be 3.0x slower than dense at 128 tokens (cached)"),
    ],
)
def test_the_faster_one_runs_the_layer(sparse: float, dense: float, kernel: str, reason: str) -> None:
    lookup.library().cache.write(key(), entry(sparse, dense))
    choice = choose_kernel(PROBLEM, never)
    assert choice == KernelChoice(kernel, reason, sparse, dense, sparse, None, "cached")


def test_the_number_of_tokens_that_was_measured_is_named() -> None:
    lookup.library().cache.write(key(at(512)), entry())
    assert choose_kernel(PROBLEM, never, "cached").reason == "3.0x faster than dense at 512 tokens (nearest bucket)"


@pytest.mark.usefixtures("real_time")
def test_both_outcomes_of_real_measurements() -> None:
    fast, slow = torch.zeros(1), torch.zeros(2_000_000)
    one: dict[Any, Callable[[], Any]] = {"native": lambda: fast + 1, "dense": lambda: slow.exp().exp()}
    other: dict[Any, Callable[[], Any]] = {"native": one["dense"], "dense": one["native"]}
    assert choose_kernel(PROBLEM, lambda: one).kernel == "native"
    assert choose_kernel(at(256), lambda: other).kernel == "dense"


def test_a_folder_that_cannot_be_written_tunes_once_in_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("PADST_CACHE_DIR", str(tmp_path / "file"))
    layer = Layer()
    with pytest.warns(UserWarning, match="measure") as warned:
        assert choose_kernel(PROBLEM, layer).source == "tuned now"
    assert [str(warning.message).split(":")[0] for warning in warned] == [
        "other processes may measure the same", "measurements are not kept for the next run"
    ]  # fmt: skip
    assert choose_kernel(PROBLEM, layer).source == "cached"
    assert layer.measured == 1


def test_observers_are_told_of_every_choice() -> None:
    seen: list[tuple[LayerProblem, KernelChoice]] = []
    with observed(lambda problem, choice: seen.append((problem, choice))):
        choices = [choose_kernel(PROBLEM, Layer()), choose_kernel(PROBLEM, never, "off")]
    choose_kernel(PROBLEM, never, "off")
    assert seen == [(PROBLEM, choice) for choice in choices]


def test_threads_do_not_meddle_with_each_others_searches() -> None:
    """One measures while others run their layers: they neither get its tiles nor are they taken for launches of its own."""
    other = dataclasses.replace(LAUNCH, in_features=2 * LAUNCH.in_features)
    seen: list[LayerProblem] = []
    found: list[Tile] = []

    def elsewhere() -> None:
        found.append(tile_for(other, default_tile))
        choose_kernel(PROBLEM, never, "off")

    def meanwhile() -> None:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()

    with observed(lambda problem, choice: seen.append(problem)), tiles.recorded() as launches:
        meanwhile()
        tile_for(LAUNCH, default_tile)
    with tiles.given_tiles({other: Tile(48, 0, 0)}):
        meanwhile()
        assert tile_for(other, default_tile) == Tile(48, 0, 0)
    assert found == 2 * [default_tile(other)]
    assert launches == [LAUNCH] and not seen


# --- tiles ---


def test_full_finds_the_best_tile_and_launches_use_it_from_then_on() -> None:
    layer = TunableLayer()
    assert tile_for(LAUNCH, default_tile).tokens == 0
    choice = choose_kernel(PROBLEM, layer, "full")
    assert choice.tile == Tile(48, 0, 0)
    assert choice.sparse_seconds is not None
    assert choice.default_seconds is not None
    assert choice.sparse_seconds < choice.default_seconds
    assert set(layer.used) == {0, 16, 32, 48, 64, 96, 128}
    assert tile_for(LAUNCH, default_tile).tokens == 48
    assert choose_kernel(PROBLEM, never, "cached").tile == Tile(48, 0, 0)


def test_quick_tries_the_default_and_a_few_others() -> None:
    layer = TunableLayer()
    choose_kernel(PROBLEM, layer, "quick")
    assert 0 in layer.used
    assert len(set(layer.used)) == 3


def test_a_launch_is_tuned_once_for_all_layers_that_make_it() -> None:
    choose_kernel(PROBLEM, TunableLayer(), "full")
    layer = TunableLayer()
    choose_kernel(LayerProblem(**{**PROBLEM.__dict__, "layout": "another"}), layer, "full")
    assert set(layer.used) == {0, 48}


def test_a_tile_that_cannot_be_launched_is_left_out() -> None:
    class Failing(TunableLayer):
        def __call__(self) -> Any:
            runs = super().__call__()

            def sparse() -> None:
                runs["native"]()
                if self.used[-1] in (16, 128):
                    raise RuntimeError("out of resource: shared memory")

            return {**runs, "native": sparse}

    assert choose_kernel(PROBLEM, Failing(), "full").tile == Tile(48, 0, 0)
    found = lookup.library().exact(key(LAUNCH))
    assert found is not None
    measured = [timing.candidate.tile for timing in found.entry.timings]
    assert measured == [None, *(Tile(tokens, 0, 0) for tokens in (32, 48, 64, 96))]


def test_what_fails_with_its_default_is_not_hidden() -> None:
    def broken() -> None:
        raise RuntimeError("no such kernel")

    with pytest.raises(RuntimeError, match="no such kernel"):
        choose_kernel(PROBLEM, lambda: {"native": broken, "dense": lambda: None})


def test_a_device_without_memory_for_measurements_compiles_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    def runs() -> Any:
        raise torch.OutOfMemoryError

    lookup.library().cache.write(key(at(256)), entry())
    assert choose_kernel(PROBLEM, runs).source == "nearest bucket"
    assert "at 128 tokens is not tuned: the device is out of memory" in caplog.text


def test_launches_find_the_nearest_bucket_and_never_measure() -> None:
    tuned = Timing(Candidate("native_block", Tile(96, 0, 0)), 1.0)
    slow = Timing(Candidate("native_block"), 2.0)
    lookup.library().cache.write(key(LAUNCH), Entry("quick", (slow, tuned)))
    tiles.forget()
    assert tile_for(LAUNCH, default_tile).tokens == 96
    for changes, tokens in (
        ({"tokens": 256}, 96),
        ({"epilogue": "bias"}, 96),
        ({"dtype": "bfloat16"}, 0),
        ({"tokens": 4096}, 0),
    ):
        assert tile_for(Problem(**{**LAUNCH.__dict__, **changes}), default_tile).tokens == tokens


def test_a_search_within_a_search_decides() -> None:
    with tiles.given_tiles({LAUNCH: Tile(64, 0, 0)}):
        assert tile_for(LAUNCH, default_tile).tokens == 64
        with tiles.default_tiles():
            assert tile_for(LAUNCH, default_tile).tokens == 0
        assert tile_for(Problem(**{**LAUNCH.__dict__, "tokens": 1}), default_tile).tokens == 0
    with tiles.recorded() as problems:
        for _ in range(2):
            tile_for(LAUNCH, default_tile)
    assert problems == [LAUNCH]


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


def test_in_a_race_candidates_take_turns_with_a_cold_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    flush = measure.flush_cache
    monkeypatch.setattr(measure, "flush_cache", lambda device: (order.append("-"), flush(device)))
    run: dict[str, Callable[[], Any]] = {name: functools.partial(order.append, name) for name in "ab"}
    assert set(raced_medians(run, "cpu", Budget(None, 3, 60.0))) == {"a", "b"}
    assert "".join(order) == "ab" + 3 * "-a-b"  # a warm-up comes first


@pytest.mark.parametrize(
    ("slow_runs", "seconds"),
    [
        (0, {"a": 1.0, "b": 1.2}),
        (3, {"a": 1.0, "b": 1.2}),
        (5, {"a": 1.0, "b": 1.1}),
    ],  # b's runs take 1.1 and 1.2 seconds in turn
)
def test_a_busy_machine_decides_nothing(slow_runs: int, seconds: dict[str, float]) -> None:
    """Up to half of a candidate's runs do not move its median; beyond, the fastest runs are compared."""
    calls = {"a": 0, "b": 0}

    def run(name: str, times: list[float]) -> Callable[[], None]:
        def once() -> None:
            CLOCK.spend(times[calls[name] % len(times)])
            calls[name] += 1

        return once

    disturbed = [10.0] * slow_runs + [1.0] * (8 - slow_runs)
    found = raced_seconds({"a": run("a", disturbed), "b": run("b", [1.1, 1.2])}, "cpu", Budget(None, 7, 1000.0))
    assert found == pytest.approx(seconds)


def test_a_race_ends_with_its_budget() -> None:
    runs: list[None] = []
    raced_medians({name: lambda: runs.append(CLOCK.spend(0.01)) for name in "ab"}, "cpu", Budget(None, 1000, 0.0))
    assert len(runs) == 4  # a warm-up and one timed run of each


@pytest.mark.parametrize(
    ("tokens", "device", "bucket"),
    [
        (0, "cpu", 1),
        (1, "cpu", 1),
        (3, "cpu", 4),
        (128, "cpu", 128),
        (129, "cpu", 256),
        (10**6, "cpu", 4096),
        (10**6, "cuda", 65536),
    ],
)
def test_tokens_share_buckets_of_powers_of_two(tokens: int, device: str, bucket: int) -> None:
    assert token_bucket(tokens, device) == bucket


@pytest.mark.parametrize("training", [False, True])
def test_eager_products_ask_for_their_tiles_and_compute_the_same_with_any(training: bool) -> None:
    structure = Block(16)
    if not dispatch.has_native_kernel(structure, torch.device("cpu"), torch.float32):
        pytest.skip("needs the native block kernel")
    weight = torch.randint(-3, 4, (48, 64), generator=torch.Generator().manual_seed(0)).float()
    topology = structure.choose(weight.abs(), 0.5)
    values = structure.pack(weight, topology).requires_grad_(training)
    x = torch.randint(-3, 4, (100, 64), generator=torch.Generator().manual_seed(1)).float().requires_grad_(training)
    order = torch.arange(63, -1, -1, dtype=torch.int32)

    def run() -> list[torch.Tensor]:
        y = STRUCTURED_LINEAR(x, values, list(topology), torch.ones(48), order, None, 48, "block:16x16")
        return [y.detach(), *torch.autograd.grad(y.sum(), (x, values))] if training else [y]

    with tiles.recorded() as problems:
        expected = run()
    product = Problem("native_block", "block:16x16", 64, 48, values.numel(), 128, "float32", "ieee", "in", "bias", device="cpu")
    gradient = Problem("native_block", "block:16x16", 48, 64, values.numel(), 128, "float32", "ieee", "out", device="cpu")
    assert problems == ([product, gradient] if training else [product])
    for tokens in (1, 48, 128, 1000):
        with tiles.given_tiles(dict.fromkeys(problems, Tile(tokens, 0, 0))):
            assert all(map(torch.equal, run(), expected))
