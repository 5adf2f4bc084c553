"""The table of layers beside their peers: its cases, and that no peer is timed that computes something else."""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from padst_compile.autotune.effort import Budget
from padst_compile.structures import parse

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

from peers import DENSE, OURS, UNPERMUTED, Layer, Ready  # type: ignore[import-not-found]  # noqa: E402  # beside the scripts


def _module() -> Any:
    """`benchmarks/kernels.py`, under a name that nobody else has."""
    description = importlib.util.spec_from_file_location("layers_beside_peers", BENCHMARKS / "kernels.py")
    assert description is not None and description.loader is not None
    module = sys.modules[description.name] = importlib.util.module_from_spec(description)
    description.loader.exec_module(module)
    return module


kernels = _module()
sys.path.remove(str(BENCHMARKS))  # or transformers would take kernels.py for Hugging Face's package


def test_gpu_cases_are_the_whole_matrix_the_targets_first_and_each_once() -> None:
    cases = kernels.gpu_cases()
    targets = kernels.gpu_targets()
    assert cases[: len(targets)] == targets
    assert len(set(cases)) == len(cases)
    axes = (
        [(768, 3072), (3072, 768), (1024, 4096), (4096, 1024), (4096, 16384)],
        [1, 64, 1024, 16384, 50432],
        [0.8, 0.9, 0.95],
        ["bfloat16", "float16", "float32"],
    )
    for size, tokens, sparsity, dtype in itertools.product(*axes):
        found = [case.structure for case in cases if kernels.Case(*size, case.structure, sparsity, dtype, tokens) == case]
        groups = {0.8: 5, 0.9: 10, 0.95: 20}[sparsity]
        blocks = [f"block:{side}" for side in (16, 32, 64, 128)]
        assert sorted(found) == sorted([*blocks, f"nm:1:{groups}", f"nm:1:{groups}:64", "diagonal", "diagonal:64"])
    # What differs in one respect from the first case comes before what differs in two.
    apart = [_differences(case, cases[0]) for case in cases[len(targets) :]]
    assert apart == sorted(apart)


def _differences(case: Any, first: Any) -> int:
    size = (case.in_features, case.out_features) != (first.in_features, first.out_features)
    other = (case.tokens != first.tokens, case.sparsity != first.sparsity, case.dtype != first.dtype)
    kind = case.structure.startswith("nm") or case.structure != first.structure
    return size + sum(other) + kind


@pytest.mark.slow
def test_a_candidate_that_computes_something_else_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Layer, "_rows", lambda layer: Ready(lambda: layer.x @ layer.dense.weight.T))
    result = kernels.measure(kernels.Case(64, 96, "block:16", 0.5, "float32", 8), torch.device("cpu"), Budget(None, 1, 0.1))
    assert {DENSE, OURS, UNPERMUTED, "torch BSR", "gather + bmm"} <= result["milliseconds"].keys()
    assert result["missing"].keys() == {"torch CSR"} and result["missing"]["torch CSR"].startswith("wrong by")


def test_the_weights_that_peers_multiply_are_those_of_the_layer() -> None:
    layer = Layer(parse("block:16"), 0.5, 64, 96, 8, torch.float32, torch.device("cpu"))
    exact, product = layer.products(layer.weight)
    torch.testing.assert_close(exact.float(), product)
    assert layer.density == 0.5


def test_pytorch_still_has_the_search_that_its_block_rows_are_tuned_with() -> None:
    pytest.importorskip("triton")
    from torch.sparse._triton_ops import bsr_dense_addmm
    from torch.sparse._triton_ops_meta import tune_bsr_dense_addmm

    matrix = torch.empty(0)
    inspect.signature(tune_bsr_dense_addmm).bind(matrix, matrix, matrix, store=True)
    inspect.signature(bsr_dense_addmm).bind(matrix, matrix, matrix)
