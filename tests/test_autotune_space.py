"""The search space and the cost model that ranks it."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from typing import Any

import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

from padst_compile.autotune import cost_model
from padst_compile.autotune.cost_model import layer_seconds, ranked, tile_seconds
from padst_compile.autotune.effort import BUDGETS
from padst_compile.autotune.machine import cpu, cpu_cache_bytes, gpu, machine
from padst_compile.autotune.problem import LayerProblem
from padst_compile.autotune.search import worth_measuring
from padst_compile.autotune.space import Candidate, Facts, no_facts, tiles_of, why_not, without_waste
from padst_compile.kernels.launch import Problem, Tile

CORE = cpu(1, "AVX512", amx=True)
H200 = gpu("NVIDIA H200", (9, 0), 132)
NATIVE = Problem("native_block", "block:64x64", 768, 3072, 235_930, 1024, "float32", device="cpu")
TRITON = Problem("block_forward", "block:64x64", 768, 3072, 235_930, 16384, "bfloat16", device="NVIDIA H200 (9.0)")
TILES = (Tile(128, 64, 64), Tile(64, 64, 64), Tile(256, 64, 64, warps=8), Tile(16, 16, 16))


def layer(structure: str, active: int, tokens: int, **changes: Any) -> LayerProblem:
    fields = {"dtype": "float32", "training": False, "device": "cpu", "kernels": ("native", "dense"), **changes}
    return LayerProblem(structure, 768, 3072, active, tokens, permuted="", **fields)


# --- machines ---


@pytest.mark.parametrize(
    ("name", "bandwidth"),
    [("NVIDIA H200", 4.8e12), ("NVIDIA H100 80GB HBM3", 3.35e12), ("NVIDIA GH200 480GB", 4e12), ("NVIDIA L4", 0.3e12)],
)
def test_gpus_are_known_by_name(name: str, bandwidth: float) -> None:
    assert gpu(name, (9, 0), 132).bandwidth == bandwidth


def test_a_gpu_of_no_list_is_reckoned_from_its_size() -> None:
    small, large = (gpu("GPU of tomorrow", (13, 0), units) for units in (10, 100))
    assert large.rate("bfloat16") == 10 * small.rate("bfloat16") > 0
    assert 0 < small.shared_bytes <= H200.shared_bytes


def test_a_cpu_is_reckoned_from_its_vectors_and_cores() -> None:
    assert cpu(4, "AVX512").rate("float32") == 4 * CORE.rate("float32") == 8 * cpu(1, "AVX2").rate("float32")
    assert CORE.rate("bfloat16") > cpu(1, "AVX512").rate("bfloat16")
    assert CORE.rate("float8_e5m2") == CORE.rate("float32")
    assert machine("cpu").cache_bytes == cpu_cache_bytes() > 0


# --- the cost model ---


def test_formulas_can_be_printed() -> None:
    symbols = {name: sympy.Symbol(name, positive=True) for name in "TKNARFBLe"}
    assert sympy.sympify(str(cost_model.DENSE), symbols) == cost_model.DENSE
    assert str(cost_model.DENSE).startswith("L + Max(")
    assert cost_model.BLOCK.free_symbols == set(symbols.values())


@pytest.mark.parametrize(
    ("structure", "active", "kernel", "faster"),
    [
        ("block:64x64", 235_930, "native", True),
        ("block:16x16", 235_930, "native", True),
        ("block:16x16", 2_200_000, "native", False),
        ("nm:1:10", 235_930, "native", True),
        ("nm:1:2", 1_179_648, "native", False),
        ("nm:1:10", 235_930, "aten", False),
        ("diagonal", 235_930, "native", True),
    ],
)
def test_sparse_wins_where_it_does_little_work(structure: str, active: int, kernel: Any, faster: bool) -> None:
    problem = layer(structure, active, 1024, kernels=(kernel, "dense"))
    assert (layer_seconds(problem, kernel, CORE) < layer_seconds(problem, "dense", CORE)) == faster


def test_gathering_kernels_lose_to_matrix_units() -> None:
    problem = layer("nm:1:10", 235_930, 1024, dtype="bfloat16")
    assert layer_seconds(problem, "native", CORE) > layer_seconds(problem, "dense", CORE)


@pytest.mark.parametrize("structure", ["block:64x64", "nm:1:10", "diagonal"])
def test_training_takes_three_products(structure: str) -> None:
    for kernel in ("native", "dense"):
        inference, training = (layer_seconds(layer(structure, 235_930, 1024, training=t), kernel, CORE) for t in (False, True))
        assert training == pytest.approx(3 * inference)


@pytest.mark.parametrize("kernel", ["native", "aten", "triton", "dense"])
@pytest.mark.parametrize("structure", ["block:64x64", "nm:1:10", "diagonal"])
@given(tokens=st.integers(1, 1 << 16), active=st.integers(1, 768 * 3072), training=st.booleans())
def test_more_work_never_takes_less_time(structure: str, kernel: Any, tokens: int, active: int, training: bool) -> None:
    problem = layer(structure, active, tokens, training=training)
    for on in (CORE, H200):
        less = layer_seconds(problem, kernel, on)
        assert 0 < on.launch_seconds < less
        assert layer_seconds(dataclasses.replace(problem, tokens=tokens + 1), kernel, on) >= less
        assert layer_seconds(dataclasses.replace(problem, active=active + 1), kernel, on) >= less


@pytest.mark.parametrize("problem", [NATIVE, TRITON])
def test_tiles_are_ranked_by_their_time(problem: Problem) -> None:
    on = CORE if problem is NATIVE else H200
    tiles = tiles_of(problem) if problem is NATIVE else TILES
    order = ranked(problem, tiles, on)
    assert sorted(map(repr, order)) == sorted(map(repr, tiles))
    times = [tile_seconds(problem, tile, on) for tile in order]
    assert times == sorted(times)
    assert times[0] < times[-1]


def test_tiny_tiles_are_bad_everywhere() -> None:
    assert ranked(NATIVE, tiles_of(NATIVE), CORE)[-1] in (Tile(16, 0, 0), Tile(128, 0, 0))
    assert ranked(TRITON, TILES, H200)[-1] == Tile(16, 16, 16)


def test_tiles_of_few_tokens_do_not_pay_for_many() -> None:
    few = dataclasses.replace(TRITON, tokens=16)
    assert tile_seconds(few, Tile(16, 64, 64), H200) <= tile_seconds(few, Tile(256, 64, 64), H200)


# --- the space ---


def test_the_default_comes_first_and_nothing_twice() -> None:
    tiles = tiles_of(NATIVE)
    assert tiles == tuple(Tile(tokens, 0, 0) for tokens in (0, 16, 32, 48, 64, 96, 128))


def test_tiles_for_more_tokens_than_there_are_do_the_same_as_one_that_holds_all() -> None:
    few = dataclasses.replace(NATIVE, tokens=40)
    assert [tile.tokens for tile in without_waste(few, tiles_of(few)[1:])] == [16, 32, 48]
    assert without_waste(NATIVE, tiles_of(NATIVE)) == list(tiles_of(NATIVE))


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        (Facts(100_000, 64, 0), None),
        (Facts(100_000, 64, 8), "8 bytes of registers spill"),
        (Facts(300_000, 64, 0), "300000 bytes of shared memory, 232448 are there"),
        (Facts(100_000, 255, 0), "65280 registers"),
    ],
)
def test_what_a_compiler_found_decides(facts: Facts, reason: str | None) -> None:
    tile = Tile(128, 128, 64, warps=8)
    if reason is not None and "registers" in reason and not facts.spilled_bytes:
        assert why_not(facts, H200, tile) is None  # 255 registers of 8 warps just fit
        assert why_not(facts, H200, dataclasses.replace(tile, warps=16)) == "130560 registers, 65536 are there"
    else:
        assert why_not(facts, H200, tile) == reason


def test_what_does_not_compile_well_is_not_measured_and_the_default_always_is() -> None:
    bad = {TILES[0], TILES[2]}

    def facts(problem: Problem, tile: Tile) -> Facts:
        return Facts(0, 32, 64 if tile in bad else 0)

    assert worth_measuring(TRITON, TILES, BUDGETS["full"], H200, facts) == [TILES[0], TILES[1], TILES[3]]
    assert worth_measuring(TRITON, TILES, BUDGETS["full"], H200) == list(TILES)
    assert no_facts(NATIVE, TILES[0]) is None


def test_quick_measures_the_default_and_the_best_by_the_model_in_the_order_of_the_space() -> None:
    default, *others = tiles_of(NATIVE)
    chosen = worth_measuring(NATIVE, tiles_of(NATIVE), BUDGETS["quick"], CORE)
    best = ranked(NATIVE, others, CORE)[: BUDGETS["quick"].tiles]
    assert chosen == [default, *(tile for tile in others if tile in best)]


def test_what_a_tile_compiles_to_is_known_without_a_gpu() -> None:
    code = """
import dataclasses
from padst_compile.autotune.facts import compiled_facts
from padst_compile.autotune.machine import gpu
from padst_compile.autotune.space import why_not
from padst_compile.kernels.block.tiles import default_tile
from padst_compile.kernels.launch import Problem

problem = Problem("block_forward", "block:64x64", 768, 768, 57344, 16384, "bfloat16", device="NVIDIA H200 (9.0)")
good = default_tile(problem)
bad = dataclasses.replace(good, tokens=512, outputs=64, warps=4, stages=6)
for tile in (good, bad):
    facts = compiled_facts(problem, tile)
    print(facts is not None and why_not(facts, gpu("NVIDIA H200", (9, 0), 132), tile))
print(compiled_facts(dataclasses.replace(problem, device="cpu"), good))
"""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr
    good, bad, unknown = done.stdout.splitlines()
    assert (good, unknown) == ("None", "None")
    assert "spill" in bad or "shared memory" in bad


@pytest.mark.parametrize(
    ("candidate", "text"),
    [
        (Candidate("dense"), "dense"),
        (Candidate("native", Tile(48, 0, 0)), "native 48 tokens"),
        (Candidate("native", Tile(0, 0, 0)), "native default"),
        (Candidate("triton", Tile(128, 64, 32, warps=8)), "triton 128x64x32 warps=8 stages=3 group=8 pointer"),
    ],
)
def test_candidates_read_well(candidate: Candidate, text: str) -> None:
    assert str(candidate) == text
