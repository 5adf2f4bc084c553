"""Sparse tensor cores as one candidate among kernels: when, which algorithms, what wins and why, and what a graph becomes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import padst_compile as padst
from padst_compile.autotune import lookup, search
from padst_compile.autotune.cache import read_stored, stored_form
from padst_compile.autotune.cost_model import layer_seconds
from padst_compile.autotune.effort import BUDGETS
from padst_compile.autotune.entry import Entry, Timing
from padst_compile.autotune.environment import environment
from padst_compile.autotune.kernel_choice import choose_kernel
from padst_compile.autotune.keys import Key
from padst_compile.autotune.machine import gpu
from padst_compile.autotune.problem import LayerProblem
from padst_compile.autotune.search import Checked, worth_measuring
from padst_compile.autotune.space import Candidate, describe_tile, tiles_of
from padst_compile.autotune.tiles import forget
from padst_compile.backend import compile_graph
from padst_compile.equivalence import verify
from padst_compile.kernels import native
from padst_compile.kernels.cusparselt import op, reference, support, tiles, trial
from padst_compile.kernels.launch import Problem, Tile, tile_for
from padst_compile.options import Options
from padst_compile.passes.choose_kernels import ChooseKernels
from padst_compile.structures import NM, Block, Shape
from padst_compile.testing.capture import capture

PACK, LINEAR = torch.ops.padst.two_of_four_pack.default, torch.ops.padst.two_of_four_linear.default
CPU, HALF = torch.device("cpu"), torch.bfloat16
NINTH = LayerProblem("nm:1:9", 64, 32, 256, 128, "bfloat16", "", False, "cpu", ("native", "cusparselt", "dense"))


# --- when it is a candidate ---


def why_not(structure: NM, dtype: torch.dtype = HALF, inputs: int = 64) -> str | None:
    return support.why_not(structure, Shape(32, inputs), CPU, dtype)


def test_only_layers_that_are_always_two_of_four_in_16_bits_are_candidates() -> None:
    assert why_not(NM(1, 9)) is None
    assert why_not(NM(1, 9), torch.float32) == "it multiplies float16 and bfloat16, not float32"
    assert why_not(NM(2, 5)) == "nm:2:5 may keep 4 of 4 neighbouring inputs, and sparse tensor cores take 2"
    assert why_not(NM(2, 5), inputs=5) is None  # one group


def test_on_the_cpu_it_is_not_considered() -> None:
    assert not support.considered(NM(1, 9), CPU)
    with support.emulated():
        assert support.considered(NM(1, 9), CPU)
        assert not support.considered(Block(16), CPU)
    assert not support.considered(NM(1, 9), CPU)


def test_a_trial_tells_right_from_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    assert support.why_trial_fails.__wrapped__(CPU, HALF) is None
    multiply = reference.two_of_four_linear

    def wrong_in_one_place(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        y = multiply(x, packed, bias)
        y[0, 5] += 1
        return y

    monkeypatch.setattr(reference, "two_of_four_linear", wrong_in_one_place)
    assert support.why_trial_fails.__wrapped__(CPU, HALF) == "its results for 65 tokens are wrong here"

    def missing(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        raise RuntimeError("cuSPARSELt not supported on your machine.\nmore")

    monkeypatch.setattr(reference, "two_of_four_linear", missing)
    assert support.why_trial_fails.__wrapped__(CPU, HALF) == "cuSPARSELt not supported on your machine."


@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 100, 128])
def test_a_trial_multiplies_only_what_asks_for_the_same_algorithm(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: set[Problem] = set()
    monkeypatch.setattr(op, "tile_for", lambda problem, default: (asked.add(problem), default(problem))[1])
    weight, bias = torch.eye(32, 64, dtype=HALF), torch.ones(32, dtype=HALF)
    bucket = 1 << (tokens - 1).bit_length()
    trial.assert_exact(weight, torch.randn(bucket, 64).to(HALF), bias)
    LINEAR(torch.ones(bucket, 64, dtype=HALF), PACK(weight), bias, None, 32)
    assert len(asked) == 1


# --- algorithms ---

LAUNCH = Problem("cusparselt_linear", "nm:2:4", 64, 32, 1152, 128, "bfloat16", epilogue="bias", device="cpu")


def test_every_algorithm_is_a_tile_with_a_number() -> None:
    found = tiles_of(LAUNCH)
    assert [tiles.algorithm(tile) for tile in found] == list(range(len(found)))
    assert found[0] == tiles.default_tile(LAUNCH)
    assert describe_tile(found[7]) == "algorithm 7"
    assert [tiles.algorithm(Tile(16, 16, 16, variant=name)) for name in ("pointer", "algorithm -1", "algorithm ٣")] == [0] * 3


@pytest.mark.parametrize("effort", ["quick", "full"])
def test_all_algorithms_are_measured_whatever_the_effort(effort: str) -> None:
    every = tiles_of(LAUNCH)
    assert worth_measuring(LAUNCH, every, BUDGETS[effort], gpu("NVIDIA H200", (9, 0), 132)) == list(every)


def test_an_algorithm_is_used_where_it_was_tried_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PADST_CACHE_DIR", str(tmp_path))
    forget()
    measured = Timing(Candidate("cusparselt_linear"), 2.0), Timing(Candidate("cusparselt_linear", tiles.tiles(LAUNCH)[9]), 1.0)
    lookup.library().cache.write(Key(LAUNCH, environment("cpu")), Entry("quick", measured))
    used = {
        tokens: tiles.algorithm(tile_for(Problem(**{**LAUNCH.__dict__, "tokens": tokens}), tiles.default_tile))
        for tokens in (64, 128, 256)
    }
    assert used == {64: 0, 128: 9, 256: 0}
    forget()


# --- the choice ---


def test_the_cost_model_prefers_it_for_many_tokens_and_counts_the_gather_before_it() -> None:
    on = gpu("NVIDIA H200", (9, 0), 132)

    def seconds(kernel: Any, tokens: int, permuted: str = "") -> float:
        kernels = ("triton", "cusparselt", "dense")
        problem = LayerProblem("nm:1:10", 4096, 4096, 1_677_722, tokens, "bfloat16", permuted, False, "cuda", kernels)
        return layer_seconds(problem, kernel, on)

    assert seconds("cusparselt", 1 << 14) < seconds("dense", 1 << 14) < 2 * seconds("cusparselt", 1 << 14)
    assert seconds("cusparselt", 1 << 14, "out") == seconds("cusparselt", 1 << 14)
    assert seconds("cusparselt", 1 << 14, "in+out") == seconds("cusparselt", 1 << 14, "in") > seconds("cusparselt", 1 << 14)


def entry_of(*seconds: float, left_out: tuple[tuple[str, str], ...] = ()) -> Entry:
    names = ("native", "cusparselt", "dense")[: len(seconds)] if len(seconds) == 3 else ("native", "dense")
    return Entry("quick", tuple(Timing(Candidate(n), s) for n, s in zip(names, seconds, strict=True)), left_out)


@pytest.mark.parametrize(
    ("seconds", "kernel", "reason"),
    [
        ((3.0, 1.0, 2.0), "cusparselt", "2.0x faster than dense and 3.0x faster than native at 128 tokens (cached)"),
        ((1.0, 2.0, 4.0), "native", "4.0x faster than dense and 2.0x faster than cusparselt at 128 tokens (cached)"),
        ((1.0, 1.01, 4.0), "native", "4.0x faster than dense and as fast as cusparselt at 128 tokens (cached)"),
        ((4.0, 2.0, 1.0), "dense", "native would be 4.0x slower than dense, cusparselt 2.0x at 128 tokens (cached)"),
    ],
)
def test_the_reason_names_all_that_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: tuple[float, ...], kernel: str, reason: str
) -> None:
    monkeypatch.setenv("PADST_CACHE_DIR", str(tmp_path))
    lookup.library().cache.write(Key(NINTH, environment("cpu")), entry_of(*seconds))
    choice = choose_kernel(NINTH, dict)
    assert (choice.kernel, choice.reason) == (kernel, reason)
    assert choice.sparse_seconds == min(seconds[:2])
    assert choice.dense_seconds == seconds[2]


def nothing() -> None: ...


def fails() -> None:
    raise RuntimeError("cuSPARSELt not supported on your machine.\nmore")


def no_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_what_fails_is_left_out_with_its_reason_and_stays_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PADST_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(
        search, "raced_seconds", lambda runs, device, budget: {c: {"native": 1.0, "dense": 2.0}[c.kernel] for c in runs}
    )
    runs: dict[Any, Any] = {"native": nothing, "cusparselt": Checked(nothing, fails), "dense": nothing}
    for source in ("tuned now", "cached"):
        choice = choose_kernel(NINTH, lambda: runs)
        assert choice.kernel == "native"
        left_out = "cusparselt is left out: cuSPARSELt not supported on your machine."
        assert choice.reason == f"2.0x faster than dense at 128 tokens ({source}); {left_out}"
        lookup._library.cache_clear()  # the second answer is read from the file


@pytest.mark.parametrize("left_out", [{"dense": "no"}, {"native": "no"}, {"cusparselt": 1}, ["cusparselt"], None])
def test_a_file_cannot_leave_out_what_must_run(tmp_path: Path, left_out: Any) -> None:
    key = Key(NINTH, environment("cpu"))
    form = stored_form(key.to_dict(), entry_of(1.0, 2.0, left_out=(("cusparselt", "no"),)))
    assert read_stored(form)[1].left_out == (("cusparselt", "no"),)
    with pytest.raises((ValueError, TypeError, KeyError)):
        read_stored({**form, "left_out": left_out})


def test_a_lack_of_memory_is_no_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PADST_CACHE_DIR", str(tmp_path))
    runs: dict[Any, Any] = {"native": nothing, "cusparselt": no_memory, "dense": nothing}
    assert choose_kernel(NINTH, lambda: runs).source == "cost model"
    assert lookup.library().exact(Key(NINTH, environment("cpu"))) is None


# --- lowered ---

IN, OUT = 40, 24


def rewritten(model: nn.Module, **options: Any) -> Any:
    """The model as the backend rewrites and specializes it, without machine code."""

    def backend(graph: fx.GraphModule, inputs: list[Any]) -> Any:
        return compile_graph(graph, inputs, Options(**options), lambda rewritten, _: rewritten.forward)[0]

    return torch.compile(model, backend=backend)


class Product(nn.Module):
    """A sparse layer with an activation behind, which stays outside of the product."""

    def __init__(self, structure: str, side: str, *, bias: bool = True) -> None:
        super().__init__()
        spec = padst.SparsitySpec(structure, permutation="none" if side == "none" else "random", ignore=())
        if side != "none":
            spec = padst.SparsitySpec(structure, permutation="random", permutation_side=side, ignore=())
        self.layer = padst.sparsify(nn.Sequential(nn.Linear(IN, OUT, bias=bias)), spec)
        with torch.no_grad():
            self.layer[0].values.copy_(torch.randint(-3, 4, self.layer[0].values.shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.layer(x))


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Within the test, the CPU has sparse tensor cores, and they are the fastest."""
    native.load()  # built once, and not again for a folder that has no build
    monkeypatch.setenv("PADST_CACHE_DIR", str(tmp_path))
    times = {"cusparselt": 1.0, "dense": 3.0}
    monkeypatch.setattr(search, "raced_seconds", lambda runs, device, budget: {c: times.get(c.kernel, 2.0) for c in runs})
    with support.emulated():
        yield


@pytest.mark.usefixtures("chosen")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("side", ["none", "input", "output"])
@pytest.mark.parametrize("structure", ["nm:1:9", "nm:2:4", "nm:1:10:8", "nm:2:8:5"])
def test_a_lowered_product_is_the_same_function(structure: str, side: str, bias: bool) -> None:
    torch.manual_seed(0)
    model = Product(structure, side, bias=bias).to(HALF).eval()
    x = torch.randint(-2, 3, (3, 5, IN)).to(HALF)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(rewritten(model, verify=True)(x), expected)
        (layer,) = padst.explain(model, x).layers
    assert layer.kernel == "cusparselt"
    assert layer.reason.startswith("3.0x faster than dense and 2.0x faster than ")


@pytest.mark.usefixtures("chosen")
def test_the_weight_is_packed_once_and_again_when_it_changes() -> None:
    torch.manual_seed(0)
    model = Product("nm:1:9", "output").to(HALF).eval()
    x = torch.randint(-2, 3, (8, IN)).to(HALF)
    with torch.no_grad():
        captured = capture(model, x)
        facts = captured.context(inference=True)
        rule = ChooseKernels()
        rule.run(facts)
        (packed,) = facts.module.graph.find_nodes(op="call_function", target=PACK)
        assert facts.is_static(packed)
        assert verify(captured.graph, facts.module, *captured.inputs).equal
        compiled = rewritten(model)
        assert torch.equal(compiled(x), model(x))
        layer = model.layer[0]
        layer.values.add_(1)
        layer.permutation.copy_(layer.permutation.flip(0))
        layer.offsets.copy_(layer.offsets.flip(0))
        assert torch.equal(compiled(x), model(x))


@pytest.mark.usefixtures("chosen")
def test_inductor_takes_the_op_as_it_is() -> None:
    torch.manual_seed(0)
    layer, x = Product("nm:1:9", "input").layer.to(HALF).eval(), torch.randint(-2, 3, (8, IN)).to(HALF)
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, backend="padst")(x), layer(x))


@pytest.mark.usefixtures("chosen")
def test_explanations_say_where_permutations_went() -> None:
    x = torch.ones(4, IN, dtype=HALF)
    for side, outcome in (("output", "folded into the 2:4 weight"), ("input", "read by the kernel")):
        with torch.no_grad():
            explanation = padst.explain(Product("nm:1:9", side).to(HALF).eval(), x)
        assert [fate.outcome for fate in explanation.fates] == [outcome]
        account = explanation.permutations
        assert (account.total, account.folded, account.fused) == (1, int(side == "output"), int(side == "input"))


@pytest.mark.usefixtures("chosen")
def test_autocast_packs_what_it_multiplies() -> None:
    torch.manual_seed(0)
    model, x = Product("nm:1:9", "output").eval(), torch.randint(-2, 3, (8, IN)).float()
    with torch.no_grad(), torch.autocast("cpu", HALF):
        expected = model(x)
        assert padst.explain(model, x).layers[0].kernel == "cusparselt"
        result = rewritten(model)(x)
    assert result.dtype == expected.dtype == HALF
    assert torch.equal(result, expected)


@pytest.mark.usefixtures("chosen")
@pytest.mark.parametrize(
    ("structure", "dtype", "inference", "reason"),
    [
        ("nm:1:9", torch.float32, True, "it multiplies float16 and bfloat16, not float32"),
        ("nm:2:5", HALF, True, "nm:2:5 may keep 4 of 4 neighbouring inputs, and sparse tensor cores take 2"),
        ("nm:1:9", HALF, False, "it computes no gradients"),
    ],
)
def test_why_it_is_no_candidate_is_told(structure: str, dtype: torch.dtype, inference: bool, reason: str) -> None:
    model = Product(structure, "none").to(dtype)
    with torch.set_grad_enabled(not inference):
        (layer,) = padst.explain(model, torch.ones(4, IN, dtype=dtype)).layers
    assert layer.kernel != "cusparselt"
    assert layer.reason.endswith(f"; cusparselt is left out: {reason}")


def test_without_a_gpu_nothing_is_told() -> None:
    with torch.no_grad():
        (layer,) = padst.explain(Product("nm:1:9", "none").to(HALF), torch.ones(4, IN, dtype=HALF)).layers
    assert "cusparselt" not in layer.reason
