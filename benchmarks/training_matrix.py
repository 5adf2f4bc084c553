"""Trains a small ViT and a small GPT with every structure and permutation by `padst train`, and compares them compiled.

python benchmarks/training_matrix.py --images CIFAR --text TEXT --out runs/matrix
python benchmarks/training_matrix.py --images CIFAR --text TEXT --out runs/matrix --steps 50 --only 'gpt/*' 'vit/*/regroup'

Finished runs are skipped, interrupted ones go on from their last checkpoint. Writes results/cpu-training-matrix.json after each
run, and ends with a table; the exit status is 1 if a run failed or a compiled model differs from the eager one by more than
rounding. Two runs of one thread each stand side by side.

Sizes are chosen for two cores and some tens of minutes at 200 steps: ViT-Tiny's width and heads with 4 of its 12 blocks and
patches of 8 pixels, 16 images a step; a GPT of 4 layers of 192 features, 8 windows of 64 characters a step. Validation is on a
part. Whether permutations help is the accuracy study's question, not asked here.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import fnmatch
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from padst_compile.benchmarking.machine import describe_machine
from padst_compile.benchmarking.report import write_json
from padst_compile.recipes.result import Result

ROOT = Path(__file__).resolve().parents[1]
RESULT = Path(__file__).parent / "results" / "cpu-training-matrix.json"
STRUCTURES = ("block:16", "nm:1:10", "nm:1:10:8", "diagonal", "unstructured")
PERMUTATIONS = ("none", "random", "autoshuffle", "sinkhorn_ste", "regroup")
UPDATES = 10  # of the topology, over the training
_SCHEMA = 1
_LINES = 12  # of a failed run's output


@dataclasses.dataclass(frozen=True)
class Task:
    """A model and its data.

    Args:
        model: as `padst train` takes it.
        data: which of the script's arguments names it.
        options: for `padst train`.
    """

    model: str
    data: str
    options: tuple[str, ...]


TASKS = {
    "vit": Task("timm:vit_tiny_patch16_224,patch_size=8,depth=4", "images", ("--batch", "16", "--eval-limit", "500")),
    "gpt": Task("hf:gpt2,n_layer=4,n_embd=192,n_head=4", "text", ("--batch", "8", "--context", "64", "--eval-limit", "64")),
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run."""

    task: str
    structure: str
    permutation: str

    @property
    def name(self) -> str:
        """For `--only` and the results."""
        return f"{self.task}/{self.structure}/{self.permutation}"

    def folder(self, out: Path, steps: int) -> Path:
        """Where it is kept; another number of steps is another run."""
        return out / f"{self.name.replace('/', '-').replace(':', '_')}-{steps}"

    def command(self, data: Path, folder: Path, steps: int) -> list[str]:
        """The smaller side is permuted, as in PA-DST, which keeps soft matrices small."""
        task, interval = TASKS[self.task], max(2, steps // UPDATES)
        return [
            sys.executable, "-m", "padst_compile.cli", "train", task.model, str(data), "--out", str(folder),
            "--structure", self.structure, "--permutation", self.permutation, "--side", "smaller", "--steps", str(steps),
            "--interval", str(interval), "--checkpoint-interval", str(max(1, steps // 4)), "--eval-interval", str(steps),
            "--threads", "1", *task.options,
        ]  # fmt: skip


def cells() -> Iterator[Cell]:
    """All runs, each task's quickest first; regroup cannot help an unstructured layer, and refuses it."""
    for task in TASKS:
        for permutation in PERMUTATIONS:
            for structure in STRUCTURES:
                if (structure, permutation) != ("unstructured", "regroup"):
                    yield Cell(task, structure, permutation)


def main() -> int:
    """Run what is missing, record, print; 1 where anything failed or differs."""
    arguments = _arguments()
    console = Console(width=150)
    arguments.out.mkdir(parents=True, exist_ok=True)
    wanted = [cell for cell in cells() if any(fnmatch.fnmatchcase(cell.name, pattern) for pattern in arguments.only)]
    if not wanted:
        raise SystemExit(f"no run is called {' or '.join(arguments.only)}; names are like {next(cells()).name}")
    missing = sorted({TASKS[cell.task].data for cell in wanted if getattr(arguments, TASKS[cell.task].data) is None})
    if missing:
        raise SystemExit(f"give --{' and --'.join(missing)}, or leave out by --only what needs them")
    failed = _train(wanted, arguments, console)
    rows = _record(arguments)
    console.print(_table([row for row in rows if any(row["cell"] == cell.name for cell in wanted)], arguments.steps))
    console.print(f"written to {arguments.results}", soft_wrap=True)
    for name, output in failed.items():
        console.print(f"{name} failed:", output, sep="\n", markup=False, highlight=False)
    differ = [row["cell"] for row in rows if not row["passed"]]
    if differ:
        console.print(f"{len(differ)} compiled models differ from the eager ones: {', '.join(differ)}")
    return 1 if failed or differ else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="parquet files of images, or a folder of classes")
    parser.add_argument("--text", type=Path, help="a UTF-8 text")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="of names like vit/block:16/regroup")
    parser.add_argument("--processes", type=int, default=2, help="runs side by side, of one thread each")
    parser.add_argument("--results", type=Path, default=RESULT, help="the file to write")
    return parser.parse_args()


def _train(wanted: list[Cell], arguments: argparse.Namespace, console: Console) -> dict[str, str]:
    """Run what is not finished; the last lines of those that failed, by name."""
    missing = [cell for cell in wanted if _result(cell, arguments) is None]
    console.print(f"{len(wanted) - len(missing)} of {len(wanted)} runs are finished")
    failed = {}
    with concurrent.futures.ThreadPoolExecutor(arguments.processes) as pool:
        running = {pool.submit(_run, cell, arguments): cell for cell in missing}
        for number, done in enumerate(concurrent.futures.as_completed(running), 1):
            cell = running[done]
            if _result(cell, arguments) is None:
                failed[cell.name] = done.result()
            console.print(f"{number} of {len(missing)}: {cell.name}{' failed' if cell.name in failed else ''}", highlight=False)
            _record(arguments)
    return failed


def _run(cell: Cell, arguments: argparse.Namespace) -> str:
    folder = cell.folder(arguments.out, arguments.steps)
    data = getattr(arguments, TASKS[cell.task].data)
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = cell.command(data, folder, arguments.steps)
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return "\n".join(done.stdout.splitlines()[-_LINES:])


def _result(cell: Cell, arguments: argparse.Namespace) -> Result | None:
    path = cell.folder(arguments.out, arguments.steps) / "result.json"
    return Result.from_dict(json.loads(path.read_text())) if path.exists() else None


def _record(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Write every finished run of so many steps, whichever were asked for this time."""
    rows = []
    for cell in cells():
        result = _result(cell, arguments)
        if result is not None:
            rows.append({"cell": cell.name, **dataclasses.asdict(cell), **result.to_dict()})
    models = {name: task.model for name, task in TASKS.items()}
    write_json(
        {"schema": _SCHEMA, "machine": describe_machine(), "steps": arguments.steps, "models": models, "cases": rows},
        arguments.results,
    )
    return rows


def _table(rows: list[dict[str, Any]], steps: int) -> Table:
    table = Table(title=f"trained for {steps} steps, finalized, compiled with backend padst", title_justify="left")
    table.add_column("run")
    for column in ("loss", "compiled", "accuracy", "compiled", "logit error", "bound", "density", "seconds"):
        table.add_column(column, justify="right")
    table.add_column("same")
    for row in rows:
        eager, compiled = row["eager"], row["compiled"]
        losses = (f"{eager['loss']:.4f}", f"{compiled['loss']:.4f}", f"{eager['accuracy']:.2%}", f"{compiled['accuracy']:.2%}")
        errors = (f"{row['logit_error']:.1e}", f"{row['bound']:.1e}", f"{row['density']:.3f}", f"{row['seconds']:.0f}")
        table.add_row(row["cell"], *losses, *errors, "yes" if row["passed"] else "NO")
    return table


if __name__ == "__main__":
    sys.exit(main())
