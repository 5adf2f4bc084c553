"""Whole models, forward and training step, dense and sparse compiled side by side: writes results/DEVICE-end-to-end.json.

    python benchmarks/end_to_end.py --device cuda
    python benchmarks/end_to_end.py --device cpu --quick

Dense runs under torch.compile with mode="max-autotune-no-cudagraphs" on a GPU, with its defaults on a CPU; all candidates take
turns. A training step is forward, backward and AdamW on a mean of squares of the outputs. Results are kept after each model;
with --seconds none begins later than that, and the same command goes on.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from progress import Record, measure_cases
from rich.console import Console
from rich.table import Table

from padst_compile import SparsitySpec, sparsify
from padst_compile.autotune.measure import interleaved_medians
from padst_compile.backend import padst
from padst_compile.benchmarking.machine import describe_machine
from padst_compile.benchmarking.models import ModelCase, build_model, first_tensor
from padst_compile.benchmarking.run import own_code
from padst_compile.structures import parse

RESULTS = Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True)
class Case:
    """A model to measure.

    Args:
        model: its name.
        batch: images or sequences.
        tokens: length of a sequence.
        structure: short form.
        dtype: of weights and activations.
        training: whether a training step is timed, rather than a forward pass.
    """

    model: str
    batch: int
    tokens: int
    structure: str
    dtype: str
    training: bool


def cases(device: str) -> list[Case]:
    """ViT and GPT-2 in two sizes; a small ViT on a CPU."""
    if device == "cpu":
        return [Case("timm:vit_small_patch16_224", 4, 0, "block:64", "float32", training) for training in (False, True)]
    medium = "hf:gpt2,n_layer=24,n_embd=1024,n_head=16"
    models = [
        ("timm:vit_base_patch16_224", 256, 0),
        ("timm:vit_large_patch16_224", 128, 0),
        ("hf:gpt2", 16, 1024),
        (medium, 8, 1024),
    ]
    return [
        *(Case(*model, "block:64", "bfloat16", training) for model in models for training in (False, True)),
        *(Case(*models[0], structure, "bfloat16", False) for structure in ("block:32", "nm:1:10:64", "diagonal:64")),
    ]


def measure(case: Case, device: torch.device, repetitions: int) -> dict[str, Any]:
    """Median milliseconds of the dense model and of the sparse one, with permutations and without."""
    torch._dynamo.reset()
    dense = build_model(case.model, batch=case.batch, tokens=case.tokens or 256)
    chosen = parse(case.structure)
    sparsity = chosen.natural_sparsity() or 0.9
    mode = "max-autotune-no-cudagraphs" if device.type == "cuda" else None
    runs = {"dense": _run(case, dense, device, lambda run: torch.compile(run, mode=mode))}
    for name, permutation in (("padst", "random"), ("padst, no permutation", "none")):
        spec = SparsitySpec(chosen, sparsity, permutation=permutation)
        model = dataclasses.replace(dense, model=sparsify(copy.deepcopy(dense.model).cpu().float(), spec))
        runs[name] = _run(case, model, device, lambda run: torch.compile(run, backend=padst))
    seconds = interleaved_medians(runs, repetitions=repetitions, warmup=3)
    milliseconds = {name: 1e3 * value for name, value in seconds.items()}
    return {**dataclasses.asdict(case), "milliseconds": milliseconds, "speedup": seconds["dense"] / seconds["padst"]}


def _run(case: Case, model: ModelCase, device: torch.device, compile_call: Callable[..., Any]) -> Callable[[], Any]:
    dtype = getattr(torch, case.dtype)
    placed = dataclasses.replace(model, model=copy.deepcopy(model.model)).on(device)
    placed.model.to(dtype)
    args = placed.inputs_as(dtype)
    call = compile_call(own_code(placed.model))
    if not case.training:

        def forward() -> None:
            with torch.no_grad():
                call(*args, **placed.kwargs)

        return forward
    optimizer = torch.optim.AdamW(placed.model.train().parameters(), lr=1e-4, fused=device.type == "cuda")

    def step() -> None:
        first_tensor(call(*args, **placed.kwargs)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def table_of(results: list[dict[str, Any]], title: str) -> Table:
    """One row per case."""
    table = Table(title=title, title_justify="left")
    for column in ("model", "batch", "sparse as", "", "dense", "padst", "no permutation", "speed-up"):
        table.add_column(column, justify="right")
    for result in results:
        times = [f"{value:.2f} ms" for value in result["milliseconds"].values()]
        step = "training step" if result["training"] else "forward"
        about = (result["model"], str(result["batch"]), result["structure"], step)
        table.add_row(*about, *times, f"{result['speedup']:.2f}x")
    return table


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dry-run", action="store_true", help="list the cases")
    parser.add_argument("--quick", action="store_true", help="the first case, briefly, nothing written")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument("--seconds", type=float, help="no case begins later than this")
    arguments = parser.parse_args()
    console = Console(width=160)
    chosen = cases(arguments.device)
    if arguments.dry_run:
        for case in chosen:
            console.print(case)
        console.print(f"{len(chosen)} cases on {arguments.device}; nothing was measured")
        return
    torch.set_num_threads(1)
    machine, quick = describe_machine(), arguments.quick
    name = "cpu" if arguments.device == "cpu" else str(machine["gpu"]).lower().replace(" ", "-")
    path = None if quick else arguments.out / f"{name}-end-to-end.json"
    results = measure_cases(
        chosen[:1] if quick else chosen,
        lambda case: measure(case, torch.device(arguments.device), 3 if quick else 11),
        Record(path, {"schema": 1, "machine": machine}),
        seconds=arguments.seconds,
        say=lambda line: console.print(line, markup=False),
    )
    if path is not None:
        console.print(f"kept in {path}")
    console.print(table_of(results, f"{arguments.device}: medians of interleaved calls"))


if __name__ == "__main__":
    main()
