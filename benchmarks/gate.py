"""Whether new results are slower than the recorded ones: compares ratios against dense, which survive another machine's load.

make gate NEW=folder
python benchmarks/gate.py NEW            exit 1 if a ratio in the folder NEW is lower than the recorded one by over 10 %
python benchmarks/gate.py NEW --recorded OLD --tolerance 0.2
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ratios import RESULTS, recorded
from rich.console import Console
from rich.table import Table

Key = tuple[str, str, str]


def ratios(folder: Path) -> dict[Key, float]:
    """By file, case and candidate."""
    return {
        (file.file, case.name, candidate): value
        for file in recorded(folder)
        for case in file.cases
        for candidate, value in case.ratios.items()
        if candidate.startswith("padst")
    }


def moved(before: Path, after: Path) -> dict[str, tuple[str, str]]:
    """Files of both folders that were measured on different machines, with the names of those."""
    old, new = ({file.file: _machine(file.machine) for file in recorded(folder)} for folder in (before, after))
    return {file: (old[file], new[file]) for file in old.keys() & new.keys() if old[file] != new[file]}


def _machine(machine: dict[str, Any]) -> str:
    vector = f"{machine['vector']}{', AMX' if machine['amx'] else ''}"
    return f"{machine['gpu'] or machine['cpu']} ({vector}, {machine['threads']} thread(s))"


def main() -> int:
    """Compare and print what fell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("new", type=Path, help="folder of new results")
    parser.add_argument("--recorded", type=Path, default=RESULTS, help="folder to compare with")
    parser.add_argument("--tolerance", type=float, default=0.1, help="fraction that a ratio may fall by")
    arguments = parser.parse_args()
    before, after = ratios(arguments.recorded), ratios(arguments.new)
    shared = sorted(before.keys() & after.keys())
    fallen = [key for key in shared if after[key] < before[key] * (1 - arguments.tolerance)]
    console = Console(width=200)
    for file, (old, new) in moved(arguments.recorded, arguments.new).items():
        console.print(f"{file}: recorded on {old}, new on {new}; ratios may differ with the machine")
    if fallen:
        table = Table(title="slower than recorded", title_justify="left")
        for column in ("result", "case", "candidate", "recorded", "now"):
            table.add_column(column)
        for key in fallen:
            table.add_row(*key, f"{before[key]:.2f}x", f"{after[key]:.2f}x")
        console.print(table)
    console.print(f"{len(shared)} ratios compared, {len(fallen)} fell by more than {arguments.tolerance:.0%}")
    if not shared:
        console.print(f"{arguments.new} and {arguments.recorded} have no case in common")
    return int(bool(fallen) or not shared)


if __name__ == "__main__":
    sys.exit(main())
