"""Runs the accuracy study within a budget of hours, and writes its report. The same command goes on where it stopped.

python benchmarks/accuracy/study.py --images CIFAR.parquet --text TEXT --out runs/study --hours 2 --workers 2
python benchmarks/accuracy/study.py --out runs/study --report      only write the report again
python benchmarks/accuracy/study.py --out runs/study --record      keep the finished cells in benchmarks/results, too

Finished cells are never repeated; their numbers are in OUT/results.jsonl, the report in OUT/report.html. A training that
diverges is a result like any other. Workers train side by side with one thread each, unless --threads says otherwise; times
compare cells that were trained with the same number of workers, on a machine that did nothing else.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from cell_run import Row, train_cell
from grid import TASKS, Cell, cells
from report import write_report
from rich.console import Console
from side_by_side import Job, train_side_by_side

from padst_compile.files import replace_text

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


def read_rows(path: Path) -> list[Row]:
    """One row per finished cell; a last line that was cut off does not count."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _train(arguments: argparse.Namespace, console: Console) -> None:
    data = {"images": arguments.images, "text": arguments.text}
    done = {row["cell"] for row in read_rows(arguments.out / RESULTS)}
    threads = arguments.threads or (1 if arguments.workers > 1 else None)
    device = "cuda" if arguments.grid == "gpu" else "cpu"
    jobs = [
        (cell, cell.config(data, threads, device), arguments.out / "runs" / cell.name)
        for cell in _wanted(arguments, data)
        if cell.name not in done
    ]
    began = time.monotonic()

    def may_begin(cell: Cell) -> bool:
        if time.monotonic() - began > arguments.hours * 3600:
            console.print(f"{arguments.hours:g} hours are over; the same command goes on")
            return False
        console.print(cell.name)
        return True

    trained = train_side_by_side(jobs, arguments.workers, may_begin) if arguments.workers > 1 else _in_turn(jobs, may_begin)
    for row in trained:
        if row.get("diverged"):
            console.print(f"{row['cell']} diverged")
        _append(arguments.out / RESULTS, row)


def _in_turn(jobs: Iterable[Job], may_begin: Callable[[Cell], bool]) -> Iterator[Row]:
    return (train_cell(*job) for job in itertools.takewhile(lambda job: may_begin(job[0]), jobs))


def _wanted(arguments: argparse.Namespace, data: dict[str, str | None]) -> Iterator[Cell]:
    for cell in cells(arguments.grid, arguments.seeds, tuple(arguments.sparsity)):
        chosen = not arguments.only or any(part in cell.name for part in arguments.only)
        if chosen and data[cell.task.kind] is not None:
            yield cell


def _append(path: Path, row: Row) -> None:
    """Add a row; the file is replaced, so that a line which was cut off does not stay."""
    _write(path, [*read_rows(path), row])


def _write(path: Path, rows: list[Row]) -> None:
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
    parser.add_argument("--workers", type=int, default=1, help="cells to train at once")
    parser.add_argument("--threads", type=int, help="of each cell")
    parser.add_argument("--only", nargs="*", help="cells whose name contains one of these")
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--record", action="store_true", help="train nothing; add the finished cells to benchmarks/results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
