"""Comparisons as a table for people and as JSON for the record."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from padst_compile.benchmarking.machine import describe_machine
from padst_compile.benchmarking.run import DENSE_DEFAULT, DENSE_FREEZING, SPARSE, UNPERMUTED, Comparison
from padst_compile.files import replace_text
from padst_compile.structures import structure_from_dict

_SCHEMA = 1


def comparison_table(comparisons: Sequence[Comparison], title: str) -> Table:
    """Rows of comparisons: times in milliseconds, ratios to best dense, default and no permutation, and the check."""
    table = Table(title=title, title_justify="left")
    table.add_column("model")
    table.add_column("sparse as")
    for column in ("dense default", "dense freezing", "padst", "vs best dense", "vs default", "bytes", "compile"):
        table.add_column(column, justify="right")
    table.add_column("verified")
    if any(c.permutation_ratio is not None for c in comparisons):
        table.add_column("time with permutations / without", justify="right")
    for c in comparisons:
        table.add_row(
            _model(c),
            _spec(c),
            _milliseconds(c, DENSE_DEFAULT),
            _milliseconds(c, DENSE_FREEZING),
            _milliseconds(c, SPARSE),
            f"{c.speedup:.2f}x",
            f"{c.speedup_over_default:.2f}x",
            f"{c.bytes_ratio:.3f}x",
            f"{c.compile_seconds[SPARSE] / c.compile_seconds[DENSE_DEFAULT]:.2f}x",
            _verified(c),
            *([] if c.permutation_ratio is None else [f"{c.permutation_ratio:.3f}x"]),
        )
        if c.permutation_ratio is not None:
            table.add_row("", "the same, no permutation", "", "", _milliseconds(c, UNPERMUTED))
    return table


def write_results(comparisons: Sequence[Comparison], path: Path) -> Path:
    """Write comparisons and the machine they ran on as JSON; the file is replaced atomically."""
    data: dict[str, Any] = {
        "schema": _SCHEMA,
        "machine": describe_machine(),
        "comparisons": [comparison.to_dict() for comparison in comparisons],
    }
    return write_json(data, path)


def write_json(data: Any, path: Path) -> Path:
    """Write JSON, replacing the file atomically; folders are made where they are missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(data, indent=1) + "\n")
    return path


def _model(c: Comparison) -> str:
    sizes = f"batch {c.batch}" + (f", {c.tokens} tokens" if c.tokens is not None else "")
    return f"{c.model} ({c.dtype}, {sizes})"


def _spec(c: Comparison) -> str:
    structure = structure_from_dict(c.spec["structure"]).to_string()
    return f"{structure} {100 * c.spec['sparsity']:.4g} %, permutation {c.spec['permutation']}"


def _milliseconds(c: Comparison, name: str) -> str:
    return f"{c.milliseconds[name]:.2f} ms" if name in c.milliseconds else ""


def _verified(c: Comparison) -> str:
    mark = "[green]yes[/green]" if c.check.passed else "[red]NO[/red]"
    return f"{mark} (error {c.check.reference_error:.1e}, bound {c.check.bound:.1e})"
