"""Runs the accuracy study within a budget of hours, and writes its report. The same command goes on where it stopped.

python benchmarks/accuracy/study.py --images CIFAR.parquet --text TEXT --out runs/study --hours 2
python benchmarks/accuracy/study.py --out runs/study --report      only write the report again
python benchmarks/accuracy/study.py --out runs/study --record      keep the finished cells in benchmarks/results, too

Finished cells are never repeated; their numbers are in OUT/results.jsonl, the report in OUT/report.html.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from grid import TASKS, Cell, cells
from report import write_report
from rich.console import Console

from padst_compile.files import replace_text
from padst_compile.recipes import Result, run

RESULTS = "results.jsonl"
RECORDED = Path(__file__).resolve().parents[1] / "results" / "accuracy-study.jsonl"


def main() -> None:
    """Train cells until the budget is spent, then report."""
    arguments = _arguments()
    console, out = Console(width=140), arguments.out
    out.mkdir(parents=True, exist_ok=True)
    if not (arguments.report or arguments.record):
        _train(arguments, console)
    rows = read_rows(out / RESULTS)
    if arguments.record:
        kept = {row["cell"]: row for row in [*read_rows(RECORDED), *rows]}
        _write(RECORDED, list(kept.values()))
    console.print(f"{len(rows)} cells, report in {write_report(rows, out / 'report.html')}", soft_wrap=True)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """One row per finished cell; a last line that was cut off does not count."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _train(arguments: argparse.Namespace, console: Console) -> None:
    data = {"images": arguments.images, "text": arguments.text}
    done = {row["cell"] for row in read_rows(arguments.out / RESULTS)}
    began = time.monotonic()
    for cell in _wanted(arguments, data):
        if cell.name in done:
            continue
        if time.monotonic() - began > arguments.hours * 3600:
            console.print(f"{arguments.hours:g} hours are over; the same command goes on")
            return
        console.print(cell.name)
        torch.compiler.reset()  # or Dynamo, after as many models of one class as it allows, would no longer compile them
        config = cell.config(data, arguments.threads, "cuda" if arguments.grid == "gpu" else "cpu")
        _append(arguments.out / RESULTS, _row(cell, run(config, arguments.out / "runs" / cell.name)))


def _wanted(arguments: argparse.Namespace, data: dict[str, str | None]) -> Iterator[Cell]:
    for cell in cells(arguments.grid, arguments.seeds, tuple(arguments.sparsity)):
        chosen = not arguments.only or any(part in cell.name for part in arguments.only)
        if chosen and data[cell.task.kind] is not None:
            yield cell


def _row(cell: Cell, result: Result) -> dict[str, Any]:
    return {
        "cell": cell.name,
        "task": cell.task.name,
        "metric": cell.task.metric,
        "method": cell.method.name,
        "sparsity": cell.sparsity,
        "seed": cell.seed,
        "value": getattr(result.eager, cell.task.metric),
        "compiled_agrees": result.passed,
        "density": result.density,
        "seconds": result.seconds,
    }


def _append(path: Path, row: dict[str, Any]) -> None:
    """Add a row; the file is replaced, so that a line which was cut off does not stay."""
    _write(path, [*read_rows(path), row])


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    replace_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the study")
    parser.add_argument("--images", help="as for padst train; without it no image task")
    parser.add_argument("--text", help="as for padst train; without it no text task")
    parser.add_argument("--grid", choices=tuple(TASKS), default="cpu")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.9, 0.8, 0.95])
    parser.add_argument("--hours", type=float, default=1.0, help="no cell begins after so long")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--only", nargs="*", help="cells whose name contains one of these")
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--record", action="store_true", help="train nothing; add the finished cells to benchmarks/results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
