"""What a trained model loses when its weights become structured at once, without any training afterwards.

python benchmarks/one_shot.py --text TEXT --out runs/one-shot

Trains a small dense GPT (a run that goes on where it was interrupted), then makes it sparse in each structure without a
permutation, with a random one, and with a searched one, by magnitude and by activation. Writes results/one-shot.json.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import padst_compile as padst
from padst_compile.benchmarking.machine import describe_machine
from padst_compile.benchmarking.report import write_json
from padst_compile.recipes import TrainConfig, load_trained, run
from padst_compile.recipes.data import Data
from padst_compile.recipes.evaluation import evaluate
from padst_compile.recipes.tasks import make_task
from padst_compile.structures import parse

RESULT = Path(__file__).parent / "results" / "one-shot.json"
MODEL = "hf:gpt2,n_layer=4,n_embd=128,n_head=4"
# Structures at half and at three quarters of zeros: with more, no structure keeps a usable model without training.
STRUCTURES = (
    ("unstructured", 0.5), ("nm:2:4", None), ("nm:2:4:8", None), ("block:8", 0.5), ("block:16", 0.5), ("diagonal", 0.5),
    ("unstructured", 0.75), ("nm:1:4", None), ("nm:1:4:8", None), ("block:8", 0.75), ("block:16", 0.75), ("diagonal", 0.75),
)  # fmt: skip
PERMUTATIONS = ("none", "random", "search")
INITS = ("magnitude", "activation")
CALIBRATION = 8  # batches


def main() -> None:
    """Train, prune, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="a text file, or a folder of them")
    parser.add_argument("--out", type=Path, required=True, help="folder of the dense training")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--quick", action="store_true", help="two structures, nothing written")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=140)
    config = TrainConfig(
        MODEL,
        arguments.text,
        steps=arguments.steps,
        batch=32,
        context=64,
        lr=2e-3,
        eval_limit=400,
        eval_interval=500,
        threads=1,
    )
    console.print("training the dense model")
    dense_loss = run(config, arguments.out).eager.loss
    model, data = load_trained(arguments.out), make_task(config).data
    chosen = STRUCTURES[1:3] if arguments.quick else STRUCTURES
    rows = [_row(spec, model, data, console) for spec in _specs(chosen)]
    console.print(_table(rows, dense_loss))
    if not arguments.quick:
        result = {"machine": describe_machine(), "model": MODEL, "steps": arguments.steps, "dense": dense_loss, "cases": rows}
        write_json(result, RESULT)


def _specs(structures: tuple[tuple[str, float | None], ...]) -> Iterator[padst.SparsitySpec]:
    for (structure, sparsity), init, permutation in itertools.product(structures, INITS, PERMUTATIONS):
        if structure != "unstructured" or permutation == "none":  # any order keeps the same weights
            yield padst.SparsitySpec(parse(structure), sparsity, init=init, permutation=permutation)  # type: ignore[arg-type]


def _row(spec: padst.SparsitySpec, model: nn.Module, data: Data, console: Console) -> dict[str, Any]:
    began = time.perf_counter()
    batches = itertools.islice(data.validation_batches(), CALIBRATION) if spec.init == "activation" else None
    calibration = None if batches is None else [batch.inputs for batch in batches]
    sparse = padst.sparsify(copy.deepcopy(model), spec, calibration=calibration)
    seconds = time.perf_counter() - began
    row = {
        "structure": spec.structure.to_string(), "sparsity": spec.sparsity, "init": spec.init, "permutation": spec.permutation,
        "kept": _kept(sparse, model), "loss": evaluate(sparse, data, torch.device("cpu"), "float32").loss, "seconds": seconds,
    }  # fmt: skip
    console.print(row)
    return row


def _kept(sparse: nn.Module, dense: nn.Module) -> float:
    """Part of the magnitude of the sparse layers' weights that is left."""
    pairs = [(layer.weight.detach(), dense.get_submodule(name).weight.detach()) for name, layer in padst.sparse_layers(sparse)]
    return float(sum(kept.abs().sum() for kept, _ in pairs) / sum(whole.abs().sum() for _, whole in pairs))


def _table(rows: list[dict[str, Any]], dense_loss: float) -> Table:
    table = Table(title=f"validation loss without training afterwards; dense {dense_loss:.3f}")
    for column in ("structure", "sparsity", "scores", "none", "random", "search", "kept none", "kept search"):
        table.add_column(column, justify="left" if column in ("structure", "scores") else "right")
    by_case = {(r["structure"], r["sparsity"], r["init"], r["permutation"]): r for r in rows}
    for structure, sparsity, init in dict.fromkeys(key[:3] for key in by_case):
        cells = [by_case.get((structure, sparsity, init, permutation)) for permutation in PERMUTATIONS]
        losses = ["" if cell is None else f"{cell['loss']:.3f}" for cell in cells]
        kept = ["" if cell is None else f"{cell['kept']:.3f}" for cell in (cells[0], cells[2])]
        table.add_row(structure, f"{sparsity:.2f}", init, *losses, *kept)
    return table


if __name__ == "__main__":
    main()
