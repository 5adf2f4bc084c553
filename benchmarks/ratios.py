"""What a recorded result says in ratios against dense, whichever script wrote it: for the report and for the gate."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peers import DENSE, DENSE_TUNED

from padst_compile.structures import structure_from_dict

RESULTS = Path(__file__).parent / "results"
RANDOM, NONE = "padst, random permutations", "padst, no permutation"
TITLES = {
    "models": "Models, forward",
    "layers": "Layers, forward",
    "kernels": "Layers beside their peers, cold caches",
    "training-layers": "Layers, forward and backward",
    "training": "Training steps",
    "end-to-end": "Models, end to end",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """What was measured, and how often each candidate fits into the time of the best dense one.

    Args:
        name: of the case.
        ratios: by candidate; above 1 is faster than the best dense.
        ideal: part of the density-scaled ideal that the product reaches, where it is known.
    """

    name: str
    ratios: dict[str, float]
    ideal: float | None = None


@dataclasses.dataclass(frozen=True)
class Recorded:
    """One file of results.

    Args:
        file: its name.
        title: of what it holds.
        machine: where it was measured, see `describe_machine`.
        cases: of the file.
    """

    file: str
    title: str
    machine: dict[str, Any]
    cases: tuple[Case, ...]


def recorded(folder: Path = RESULTS) -> Iterator[Recorded]:
    """Every file of ratios in a folder, in the order of `TITLES`."""
    for kind, title in TITLES.items():
        for path in files_of(kind, folder):
            data = json.loads(path.read_text())
            yield Recorded(path.name, title, data["machine"], tuple(_cases(data)))


def files_of(kind: str, folder: Path = RESULTS) -> list[Path]:
    """The files MACHINE-KIND.json of a folder; of kinds that end alike the longest counts."""
    longer = tuple(f"-{other}.json" for other in TITLES if other.endswith(f"-{kind}"))
    return [path for path in sorted(folder.glob(f"*-{kind}.json")) if not path.name.endswith(longer)]


def device_of(machine: dict[str, Any], *details: str) -> str:
    """What computed, in short; `details` are of a CPU."""
    return machine["gpu"] or ", ".join((machine["cpu"], *details, *(["AMX"] if machine["amx"] else [])))


def where(machine: dict[str, Any]) -> str:
    """A machine as a result describes it, in words."""
    device = device_of(machine, machine["vector"])
    versions = [f"{name} {machine[name]}" for name in ("torch", "triton", "timm", "transformers") if machine.get(name)]
    compiler = [machine["compiler"]] if machine.get("compiler") else []
    parts = (device, f"{machine['threads']} CPU thread(s)", f"Python {machine['python']}", *versions, *compiler)
    return ", ".join(parts)


def _cases(data: dict[str, Any]) -> Iterator[Case]:
    for case in data.get("comparisons", data.get("cases", ())):
        if "spec" in case:
            yield _comparison(case)
        elif "missing" in case:
            yield _peers(case)
        elif "speedup" in case:
            order = case.get("permutation", "random")
            candidate = {"random": RANDOM, "none": NONE}.get(order, f"padst, permutations by {order}")
            yield Case(_step_name(case), {candidate: case["speedup"]})


def _comparison(case: dict[str, Any]) -> Case:
    taken = case["milliseconds"]
    best = min(taken["dense default"], taken["dense freezing"])
    structure = structure_from_dict(case["spec"]["structure"]).to_string()
    tokens = f", {case['tokens']} tokens" if case["tokens"] else ""
    name = f"{case['model']}, {case['dtype']}, batch {case['batch']}{tokens}, {structure} {case['spec']['sparsity']:.0%}"
    return Case(name, {RANDOM: best / taken["padst"], NONE: best / taken["padst, no permutation"]})


def best_dense(case: dict[str, Any]) -> float:
    """Milliseconds of the faster dense product beside a layer's peers."""
    return min(case["milliseconds"][name] for name in (DENSE, DENSE_TUNED) if name in case["milliseconds"])


def _peers(case: dict[str, Any]) -> Case:
    taken, best = case["milliseconds"], best_dense(case)
    names = {"padst": RANDOM}
    ratios = {names.get(name, name): best / value for name, value in taken.items() if name not in (DENSE, DENSE_TUNED)}
    sizes = f"{case['in_features']} -> {case['out_features']}"
    name = f"{sizes}, {case['dtype']}, {case['tokens']} tokens, {case['structure']} {case['sparsity']:.0%}"
    return Case(name, ratios, ratios[RANDOM] * case["density"] if RANDOM in ratios else None)


def _step_name(case: dict[str, Any]) -> str:
    parts = (case.get("layer", case.get("model")), case.get("dtype"), case.get("batch") and f"batch {case['batch']}")
    tokens = f"{case['tokens']} tokens" if case.get("tokens") else None
    return ", ".join(str(part) for part in (*parts, tokens, case["structure"]) if part)
