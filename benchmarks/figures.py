"""Writes the figures of README.md and of the documentation from the recorded results, so that no number there was typed.

python benchmarks/figures.py            rewrite the blocks between the markers
python benchmarks/figures.py --check    exit 1 if a block is not what the results say

README has the ratios with random permutations, one column per machine; docs/measurements.md everything, and docs/study.md the
accuracy study.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from peers import DENSE, DENSE_TUNED
from ratios import NONE, RANDOM, RESULTS, TITLES, Recorded, best_dense, device_of, files_of, recorded, where

from padst_compile.files import replace_text
from padst_compile.structures import structure_from_dict

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks" / "accuracy"))

from statistics_of_seeds import estimate  # noqa: E402  # of the accuracy study, a folder of scripts of its own
from values import against_control, control_of, groups, in_words, values_of  # noqa: E402

START, END = "<!-- figures -->\n", "<!-- /figures -->\n"
STUDY = RESULTS / "accuracy-study.jsonl"
IN_SHORT = ("models", "layers", "training-layers", "training", "end-to-end")


def summary() -> str:
    """How many times as fast as the best dense, for each case that has random permutations, machines side by side."""
    files = [file for file in recorded() if file.title in [TITLES[kind] for kind in IN_SHORT]]
    machines = list(dict.fromkeys(device_of(file.machine) for file in files))
    lines = ["| | " + " | ".join(machines) + " |", "|-|" + "-:|" * len(machines)]
    for title in dict.fromkeys(file.title for file in files):
        lines.append(f"| **{title}** |" + " |" * len(machines))
        lines += _ratios([file for file in files if file.title == title], machines)
    return "\n".join([*lines, ""])


def _ratios(files: list[Recorded], machines: list[str]) -> list[str]:
    """A line per case."""
    found: dict[str, dict[str, float]] = {}
    for file in files:
        for case in file.cases:
            if RANDOM in case.ratios:
                found.setdefault(case.name, {})[device_of(file.machine)] = case.ratios[RANDOM]
    lines = []
    for name, ratios in found.items():
        cells = " | ".join(f"{ratios[machine]:.1f}x" if machine in ratios else "" for machine in machines)
        lines.append(f"| {name} | {cells} |")
    return lines


def tables() -> str:
    """Every recorded result, with times."""
    parts = []
    for name, section in SECTIONS.items():
        parts += [section(json.loads(path.read_text()), path.relative_to(ROOT)) for path in files_of(name)]
    return "\n".join(parts)


def study() -> str:
    """Every task at every sparsity."""
    rows = [json.loads(line) for line in STUDY.read_text().splitlines()]
    return "\n".join(_study(*group) for group in groups(rows))


BLOCKS = {ROOT / "README.md": summary, ROOT / "docs" / "measurements.md": tables, ROOT / "docs" / "study.md": study}


def _study(task: str, sparsity: float, rows: list[dict[str, Any]]) -> str:
    """One task at one sparsity, and dense."""
    values, lines = values_of(rows), []
    for method in dict.fromkeys(row["method"] for row in rows):
        found = values.get(method, {})
        difference = against_control(method, values) if found else None
        against = "" if difference is None else f"{in_words(difference, signed=True)} against {control_of(method, values)}"
        diverged = sum(row["method"] == method and row["value"] is None for row in rows)
        runs = f"{len(found) + diverged}" + (f", {diverged} diverged" if diverged else "")
        lines.append(f"| {method} | {in_words(estimate(list(found.values()))) if found else ''} | {against} | {runs} |")
    metric = rows[0]["metric"]
    heading = (
        f"**Accuracy, {task}, {sparsity:.0%}** (validation {metric}; means over seeds with 95 % intervals, differences paired "
        f"by seed, a star where the interval excludes zero; from `{STUDY.relative_to(ROOT)}`)"
    )
    return "\n".join([heading, "", f"| | {metric} | difference | seeds |", "|-|-:|-:|-:|", *lines, ""])


def _heading(title: str, machine: dict[str, Any], source: Path) -> str:
    extra = ", ".join(filter(None, [machine["vector"], "AMX" if machine["amx"] else ""]))
    return (
        f"**{title}** ({machine['cpu']}, {extra}; {machine['threads']} thread; torch {machine['torch']}; median milliseconds "
        f"of one call; from `{source}`)"
    )


def _training(data: dict[str, Any], source: Path) -> str:
    rows = [
        f"| {c['layer']} ({c['dtype']}, {c['tokens']} tokens) | {c['structure']}, 90 % | {c['dense']:.2f} | {c['sparse']:.2f} "
        f"| {c['speedup']:.2f}x |"
        for c in data["cases"]
    ]
    heading = _heading("Layers, forward and backward", data["machine"], source)
    columns = "| | sparse as | dense, default | sparse, random permutations | random against dense |"
    return "\n".join([heading, "", columns, "|-|-|-:|-:|-:|", *rows, ""])


def _steps(data: dict[str, Any], source: Path) -> str:
    rows = [
        f"| {c['model']} ({_size(c)}) | {c['structure']}, 90 %, {_order(c)} | {c['dense']:.0f} "
        f"| {c['sparse']:.0f} | {c['speedup']:.2f}x | {c['update_share']:.2%} | {c['hook_share']:.2%} | {c['memory']:.3f}x |"
        for c in data["cases"]
    ]
    heading = _heading("Training steps, with AdamW and RigL every 100 steps", data["machine"], source)
    columns = (
        "| | sparse as | dense, default | sparse | sparse against dense | time in updates | time in other hooks "
        "| weights, gradients, AdamW state of the sparse layers against dense |"
    )
    return "\n".join([heading, "", columns, "|-|-|-:|-:|-:|-:|-:|-:|", *rows, ""])


def _order(case: dict[str, Any]) -> str:
    return "no permutations" if case["permutation"] == "none" else f"{case['permutation']} permutations"


def _size(case: dict[str, Any]) -> str:
    return f"batch {case['batch']}" + (f", {case['tokens']} tokens" if case["tokens"] else "")


def _models(data: dict[str, Any], source: Path) -> str:
    return _comparisons("Models", data, source)


def _layers(data: dict[str, Any], source: Path) -> str:
    return _comparisons("Layers", data, source)


def _comparisons(title: str, data: dict[str, Any], source: Path) -> str:
    heading = _heading(title, data["machine"], source)
    columns = (
        "| | sparse as | dense, default | dense, freezing | sparse, random permutations | sparse, no permutation "
        "| random against best dense | none against best dense | time of random against none |"
    )
    lines = [
        heading,
        "",
        columns,
        "|-|-|-:|-:|-:|-:|-:|-:|-:|",
        *(_row(comparison) for comparison in data["comparisons"]),
        "",
    ]
    return "\n".join(lines)


def _row(c: dict[str, Any]) -> str:
    ms = c["milliseconds"]
    best = min(ms["dense default"], ms["dense freezing"])
    plain = ms["padst, no permutation"]
    sizes = f"{c['dtype']}, batch {c['batch']}" + (f", {c['tokens']} tokens" if c["tokens"] else "")
    structure = structure_from_dict(c["spec"]["structure"]).to_string()
    return (
        f"| {c['model']} ({sizes}) | {structure}, {100 * c['spec']['sparsity']:.0f} % | {ms['dense default']:.2f} "
        f"| {ms['dense freezing']:.2f} | {ms['padst']:.2f} | {plain:.2f} | {best / ms['padst']:.2f}x | {best / plain:.2f}x "
        f"| {c['permutation_ratio']:.3f}x |"
    )


def _kernels(data: dict[str, Any], source: Path) -> str:
    """Layers beside everything else that could run them."""
    names = list(dict.fromkeys(name for case in data["cases"] for name in case["milliseconds"]))
    rest = [name for name in names if name not in (DENSE, DENSE_TUNED, "padst", NONE)]
    heading = (
        f"**Layers beside their peers** ({where(data['machine'])}; median milliseconds of one call, with cold caches; fraction "
        f"of ideal: speed-up over the best dense times density; from `{source}`)"
    )
    columns = ["", "dense", "padst, random permutations", "against best dense", "fraction of ideal", *rest]
    lines = ["| " + " | ".join(columns) + " |", "|-|" + "-:|" * (len(columns) - 1)]
    return "\n".join([heading, "", *lines, *(_beside(case, rest) for case in data["cases"]), ""])


def _beside(case: dict[str, Any], rest: list[str]) -> str:
    taken, best = case["milliseconds"], best_dense(case)
    speedup = best / taken["padst"]
    others = [f"{taken[name]:.2f}" if name in taken else "" for name in rest]
    name = f"{case['in_features']} -> {case['out_features']} ({case['dtype']}, {case['tokens']} tokens), {case['structure']}"
    cells = [f"{name}, {case['sparsity']:.0%}", f"{best:.2f}", f"{taken['padst']:.2f}", f"{speedup:.2f}x"]
    return "| " + " | ".join([*cells, f"{speedup * case['density']:.2f}", *others]) + " |"


SECTIONS = {"models": _models, "layers": _layers, "kernels": _kernels, "training-layers": _training, "training": _steps}


def main() -> int:
    """Rewrite or check the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where a page differs")
    arguments = parser.parse_args()
    differ = False
    for page, render in BLOCKS.items():
        text = page.read_text()
        before, rest = text.split(START)
        _, after = rest.split(END)
        wanted = before + START + render() + END + after
        differ = differ or wanted != text
        if not arguments.check:
            replace_text(page, wanted)
    return int(differ and arguments.check)


if __name__ == "__main__":
    sys.exit(main())
