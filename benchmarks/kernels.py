"""Layers beside everything that could run them: writes results/DEVICE-kernels.json.

    python benchmarks/kernels.py                    the CPU, one thread
    python benchmarks/kernels.py --peers deepsparse sparselab onnxruntime
                                                    and other libraries, installed below build/peers at first use
    python benchmarks/kernels.py --device cuda      the GPU
    python benchmarks/kernels.py --dry-run …        list the cases

Medians with a cold cache, candidates in turns. "fraction of ideal" is the speed-up over the best dense times the density: 1 is
a product whose time shrinks with the weights it stores. On a GPU "roof" is the time that the measured matrix rate and copy
bandwidth allow over the time taken. Results are kept after each case; with --seconds none begins later than that, and the same
command goes on. Whoever computes something else than the dense product of the same weights is left out, with the error.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch
from foreign import REQUIREMENTS, Foreign, ForeignError, in_turns, install
from peers import DENSE, DENSE_TUNED, GPU_PEERS, OURS, PEERS, UNPERMUTED, Layer
from progress import Record, measure_cases
from rich.console import Console
from rich.table import Table

from padst_compile.autotune.effort import Budget
from padst_compile.autotune.measure import raced_medians
from padst_compile.benchmarking.machine import describe_machine
from padst_compile.structures import parse
from padst_compile.tolerance import allowed_error, relative_error

RESULTS = Path(__file__).parent / "results"
_SHOWN = 100  # letters of a reason


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer to measure.

    Args:
        in_features: inputs.
        out_features: outputs.
        structure: short form.
        sparsity: fraction of zeros.
        dtype: of weights and activations.
        tokens: rows of the activations.
    """

    in_features: int
    out_features: int
    structure: str
    sparsity: float
    dtype: str
    tokens: int

    def __str__(self) -> str:
        size = f"{self.in_features} -> {self.out_features}"
        return f"{size}, {self.structure} {100 * self.sparsity:.0f} %, {self.dtype}, {self.tokens} tokens"

    def layer(self, device: torch.device) -> Layer:
        """The layer on a device."""
        structure = parse(self.structure)
        sparsity = structure.natural_sparsity() or self.sparsity
        sizes = self.in_features, self.out_features, self.tokens
        return Layer(structure, sparsity, *sizes, getattr(torch, self.dtype), device)


def cpu_cases() -> list[Case]:
    """ViT-B's layers at batch 8 and 1, and few tokens."""
    up, down = (768, 3072), (3072, 768)
    return [
        *(Case(*up, "block:64", sparsity, dtype, 1576) for dtype in ("float32", "bfloat16") for sparsity in (0.9, 0.95)),
        Case(*down, "block:64", 0.9, "float32", 1576),
        *(Case(*up, f"block:{size}", 0.9, "float32", 1576) for size in (32, 16)),
        *(Case(*up, structure, 0.9, "float32", 1576) for structure in ("nm:1:10", "diagonal", "diagonal:32")),
        *(Case(*up, structure, 0.95, "float32", 1576) for structure in ("nm:1:20", "diagonal")),
        *(Case(*up, "block:64", 0.9, "float32", tokens) for tokens in (1, 16, 197)),
        *(Case(*up, "block:64", 0.9, "bfloat16", tokens) for tokens in (1, 16, 197)),
        *(Case(*up, structure, 0.9, "float32", tokens) for structure in ("nm:1:10", "diagonal") for tokens in (1, 4)),
    ]


def gpu_targets() -> list[Case]:
    """What the kernels are meant to be good at, with a full search by the peers that can be tuned."""
    up, down = (768, 3072), (3072, 768)
    return [
        Case(*up, "block:64", 0.9, "bfloat16", 50432),
        Case(*down, "block:64", 0.9, "bfloat16", 50432),
        Case(*up, "block:32", 0.9, "bfloat16", 50432),
        Case(4096, 16384, "block:128", 0.9, "bfloat16", 16384),
        Case(*up, "nm:1:10", 0.9, "float32", 16384),
        Case(*up, "diagonal", 0.9, "float32", 16384),
    ]


def gpu_cases() -> list[Case]:
    """The targets, then all layers of ViT-B and GPT-2 small, of ViT-L and GPT-2 medium, and of a 4096-wide model.

    The more a case has in common with the first one, the earlier it comes: where time ends, the most alike are measured.
    """
    axes: tuple[tuple[Any, ...], ...] = (
        ((768, 3072), (3072, 768), (4096, 16384), (1024, 4096), (4096, 1024)),
        (50432, 16384, 1024, 64, 1),
        (0.9, 0.95, 0.8),
        ("block:64", "nm:64", "diagonal:64", "block:32", "block:128", "block:16", "nm", "diagonal"),
        ("bfloat16", "float32", "float16"),
    )
    places = itertools.product(*(range(len(axis)) for axis in axes))
    ordered = sorted(places, key=lambda place: (sum(number > 0 for number in place), sum(place)))
    matrix = (tuple(axis[number] for axis, number in zip(axes, place, strict=True)) for place in ordered)
    cases = (Case(*size, _named(kind, zeros), zeros, dtype, tokens) for size, tokens, zeros, kind, dtype in matrix)
    return list(dict.fromkeys([*gpu_targets(), *cases]))


def _named(kind: str, sparsity: float) -> str:
    """The short form of a kind of structure; N:M has the sparsity in its name."""
    vector = {"nm": "", "nm:64": ":64"}
    return f"nm:1:{round(1 / (1 - sparsity))}{vector[kind]}" if kind in vector else kind


def measure(case: Case, device: torch.device, budget: Budget, libraries: Sequence[str] = ()) -> dict[str, Any]:
    """Milliseconds of every candidate that runs and is right, and why the others are missing."""
    torch._dynamo.reset()
    layer = case.layer(device)
    ready: dict[str, Callable[[], torch.Tensor]] = {}
    missing: dict[str, str] = {}
    with torch.no_grad(), ExitStack() as processes:
        for name, prepare in layer.candidates(tuned_peers=case in gpu_targets()):
            try:
                candidate = prepare()
                expected, dense = layer.products(layer.weight if candidate.weight is None else candidate.weight)
                off = relative_error([candidate.read(candidate.run())], [expected])
                bound = allowed_error(relative_error([dense], [expected]), layer.x.dtype)
            except Exception as error:  # a peer may refuse in any way
                missing[name] = (str(error) or type(error).__name__).splitlines()[0][:_SHOWN]
                continue
            if off > bound:
                missing[name] = f"wrong by {off:.1e}"
            else:
                ready[name] = candidate.run
        foreign = {}
        expected, dense = layer.products(layer.weight)
        bound = allowed_error(relative_error([dense], [expected]), layer.x.dtype)
        for library in libraries:
            try:
                install(library)
                peer = processes.enter_context(closing(Foreign(library, layer)))
            except ForeignError as error:
                missing[library] = str(error)[:_SHOWN]
                continue
            off = relative_error([peer.result], [expected])
            if off > bound:
                missing[library] = f"wrong by {off:.1e}"
            else:
                foreign[library] = peer
        seconds = _medians(ready, foreign, device, budget)
    milliseconds = {name: 1e3 * value for name, value in seconds.items()}
    versions = {name: peer.version for name, peer in foreign.items()}
    found = {"density": layer.density, "milliseconds": milliseconds, "missing": missing, "versions": versions}
    return {**dataclasses.asdict(case), **found}


def _medians(
    ready: dict[str, Callable[[], torch.Tensor]], foreign: dict[str, Foreign], device: torch.device, budget: Budget
) -> dict[str, float]:
    if not foreign:
        return raced_medians(ready, device.type, budget)
    return {name: statistics.median(times) for name, times in in_turns(ready, foreign, budget).items()}


def roofs(device: torch.device) -> dict[str, float] | None:
    """Bytes per second of a copy, and operations per second of a large bfloat16 product; on a GPU alone."""
    if device.type != "cuda":
        return None
    budget = Budget(None, 11, 5.0)
    source, matrix = torch.empty(1 << 30, dtype=torch.int8, device=device), torch.randn(8192, 8192, device=device).bfloat16()
    copy = raced_medians({"copy": source.clone}, "cuda", budget)["copy"]
    product = raced_medians({"product": lambda: matrix @ matrix}, "cuda", budget)["product"]
    return {"bytes_per_second": 2 * source.numel() / copy, "bfloat16_per_second": 2 * 8192**3 / product}


def roof_fraction(result: dict[str, Any], roof: dict[str, float] | None) -> float | None:
    """The time that the roofs allow, over the time taken; for bfloat16, whose rate was measured."""
    if roof is None or result["dtype"] != "bfloat16" or OURS not in result["milliseconds"]:
        return None
    tokens, sizes = result["tokens"], (result["in_features"], result["out_features"])
    active = result["density"] * sizes[0] * sizes[1]
    moved = 2 * (tokens * sum(sizes) + active)
    ideal = max(moved / roof["bytes_per_second"], 2 * tokens * active / roof["bfloat16_per_second"])
    return float(1e3 * ideal / result["milliseconds"][OURS])


def table_of(results: list[dict[str, Any]], roof: dict[str, float] | None, peers: Sequence[str], title: str) -> Table:
    """One row per case, with a column for each of the peers."""
    table = Table(title=title, title_justify="left")
    table.add_column("layer")
    columns = ["best dense", "padst", "no permutation", "speed-up", "fraction of ideal", *(["roof"] if roof else [])]
    for column in (*columns, *peers):
        table.add_column(column, justify="right")
    for result in results:
        ms = result["milliseconds"]
        best = min((ms[name] for name in (DENSE, DENSE_TUNED) if name in ms), default=None)
        case = Case(**{field.name: result[field.name] for field in dataclasses.fields(Case)})
        ours = ms.get(OURS)
        speedup = None if ours is None or best is None else best / ours
        cells = [
            _cell(best, " ms"), _cell(ours, " ms"), _cell(ms.get(UNPERMUTED), " ms"), _cell(speedup, "x"),
            _cell(None if speedup is None else speedup * result["density"], ""),
        ]  # fmt: skip
        if roof:
            cells.append(_cell(roof_fraction(result, roof), ""))
        cells += [_cell(best / ms[name] if best and name in ms else None, "x") for name in peers]
        table.add_row(str(case), *cells)
    return table


def _cell(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value:.2f}{unit}"


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dry-run", action="store_true", help="list the cases")
    parser.add_argument("--quick", action="store_true", help="the first case, briefly, nothing written")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument("--prefix", default="cpu", help="of the file's name on a CPU; on a GPU it is the GPU's name")
    parser.add_argument("--peers", nargs="+", choices=REQUIREMENTS, default=[], help="other libraries, on the CPU, from PyPI")
    parser.add_argument("--seconds", type=float, help="no case begins later than this")
    arguments = parser.parse_args()
    if arguments.peers and arguments.device != "cpu":
        parser.error("--peers run on the CPU")
    cases = cpu_cases() if arguments.device == "cpu" else gpu_cases()
    console = Console(width=200)
    if arguments.dry_run:
        for case in cases:
            console.print(case)
        console.print(f"{len(cases)} cases on {arguments.device}; nothing was measured")
        return
    device = torch.device(arguments.device)
    torch.set_num_threads(1)
    budget = Budget(None, 3, 2.0) if arguments.quick else Budget(None, 15, 6.0)
    roof, machine = roofs(device), describe_machine()
    name = str(machine["cpu"] if device.type == "cpu" else machine["gpu"])
    prefix = arguments.prefix if device.type == "cpu" else name.lower().replace(" ", "-")
    path = None if arguments.quick else arguments.out / f"{prefix}-kernels.json"
    results = measure_cases(
        cases[:1] if arguments.quick else cases,
        lambda case: measure(case, device, budget, arguments.peers),
        Record(path, {"schema": 1, "machine": machine, "roofs": roof}),
        seconds=arguments.seconds,
        say=lambda line: console.print(line, markup=False),
    )
    if path is not None:
        console.print(f"kept in {path}")
    peers = (*PEERS, *(GPU_PEERS if roof else arguments.peers))
    console.print(table_of(results, roof, peers, f"{name}: speed-ups are against the better of dense compiled and dense tuned"))


if __name__ == "__main__":
    main()
