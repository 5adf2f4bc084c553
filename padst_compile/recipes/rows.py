"""Rows of numbers by step, one JSON object per line, in a file that survives the end of its writer at any moment."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from padst_compile.files import replace_text
from padst_compile.recipes.writing import writing


class Rows:
    """A file of rows, each with a "step". One process writes it at a time.

    Args:
        path: of the file; made at the first row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row; when this returns, it outlives the process.

        Raises:
            RunFolderError: it cannot be written; so do the others below that write.
        """
        with writing(self.path), self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """All whole rows; a line that a killed process left unfinished is no row."""
        rows = []
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            try:
                row = json.loads(line)
            except ValueError:
                break
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
        return rows

    def keep_until(self, step: int) -> None:
        """Drop the rows of later steps, which a run that continues from a checkpoint writes again."""
        kept = [row for row in self.read() if row["step"] <= step]
        if self.path.exists():
            with writing(self.path):
                replace_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def flush(self) -> None:
        """Put the rows on the disk, where they outlive a power failure."""
        if self.path.exists():
            with writing(self.path), self.path.open("a") as file:
                os.fsync(file.fileno())
