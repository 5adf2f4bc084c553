"""What was recorded that is no ratio against dense, as tables for the report."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

Data = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Listing:
    """A table.

    Args:
        title: of what it shows.
        file: that it was read from.
        machine: where it was measured; None for what depends on none.
        note: what the columns mean.
        columns: their heads.
        rows: as many cells each.
    """

    title: str
    file: str
    machine: dict[str, Any] | None
    note: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def listings(folder: Path) -> Iterator[Listing]:
    """Every such file in a folder."""
    for pattern, read in _READERS.items():
        for path in sorted(folder.glob(pattern)):
            data = json.loads(path.read_text())
            title, note, columns, rows = read(data)
            yield Listing(title, path.name, data.get("machine"), note, columns, tuple(rows))


_Parts = tuple[str, str, tuple[str, ...], Iterator[tuple[str, ...]]]


def _mlp(data: Data) -> _Parts:
    columns = ("dtype", "zeros", "tokens", "second layer permuted", "two kernels", "one kernel", "two / one")
    rows = (
        (
            c["dtype"], f"{c['sparsity']:.0%}", str(c["tokens"]), "yes" if c["permuted"] else "no", f"{c['two']:.3f}",
            f"{c['one']:.3f}", f"{c['two'] / c['one']:.2f}",
        )
        for c in data["cases"]
    )  # fmt: skip
    return "Two layers in one kernel", "Milliseconds of a call.", columns, rows


def _epilogues(data: Data) -> _Parts:
    bare, *more = data["cases"][0]["milliseconds"]
    rows = (
        (
            c["structure"], c["dtype"], f"{c['milliseconds'][bare]:.2f}",
            *(f"{c['milliseconds'][name] / c['milliseconds'][bare]:.2f}" for name in more),
        )
        for c in data["cases"]
    )  # fmt: skip
    note = "Milliseconds of the bare product, 768 -> 3072, 90 %, 1576 tokens, and how many times as long it takes with more."
    return "What is fused into a kernel", note, ("structure", "dtype", bare, *more), rows


def _training_matrix(data: Data) -> _Parts:
    columns = (
        "run",
        "loss, eager",
        "loss, compiled",
        "accuracy, eager",
        "accuracy, compiled",
        "logits off",
        "may be",
        "density",
    )
    rows = (
        (
            c["cell"], *(f"{c[form]['loss']:.4f}" for form in ("eager", "compiled")),
            *(f"{c[form]['accuracy']:.2%}" for form in ("eager", "compiled")), f"{c['logit_error']:.1e}", f"{c['bound']:.1e}",
            f"{c['density']:.3f}",
        )
        for c in data["cases"]
    )  # fmt: skip
    note = f"Each trained for {data['steps']} steps, then finalized; errors are fractions of the largest logit."
    return "Trained models, eager and compiled", note, columns, rows


def _permute_costs(data: Data) -> _Parts:
    places = tuple(data["cases"][0]["nanoseconds"])
    rows = (
        (
            f"{c['structure']}, {c['in_features']} -> {c['out_features']}", str(c["tokens"]), f"{c['kernel_milliseconds']:.2f}",
            *(f"{c['nanoseconds'][place]:.2f}" for place in places),
        )
        for c in data["cases"]
    )  # fmt: skip
    note = "Milliseconds of the kernel; nanoseconds that a permutation adds for each element moved, by where it is put."
    return "What a permutation costs", note, ("layer", "tokens", "kernel", *places), rows


def _pass_time(data: Data) -> _Parts:
    rows = (
        (str(c["depth"]), f"{c['passes']:.2f}", f"{c['compile']:.1f}" if "compile" in c else "") for c in data["cases"]
    )  # fmt: skip
    note = "Seconds, by depth of a ViT-B/16; the last column is a whole compilation with empty caches."
    return "Time of the passes", note, ("depth", "all passes", "compilation"), rows


def _one_shot(data: Data) -> _Parts:
    columns = ("structure", "zeros", "scores", "permutation", "magnitude kept", "loss", "seconds")
    rows = (
        (
            c["structure"], f"{c['sparsity']:.0%}", c["init"], c["permutation"], f"{c['kept']:.3f}", f"{c['loss']:.3f}",
            f"{c['seconds']:.1f}",
        )
        for c in data["cases"]
    )  # fmt: skip
    note = (
        f"{data['model']}, {data['steps']} steps; validation loss of the dense model {data['dense']:.3f}. Weights are ranked "
        'by magnitude, or by magnitude times input norm ("activation").'
    )
    return "One shot: a trained model made sparse without training", note, columns, rows


def _mutants(data: Data) -> _Parts:
    outcomes = tuple(data["total"])
    rows = (
        (module, *(str(found.get(outcome, 0)) for outcome in outcomes))
        for module, found in {**data["modules"], "all": data["total"]}.items()
    )
    note = f"Small changes of the passes by mutmut {data['mutmut']}, and what became of them under {', '.join(data['tests'])}."
    return f"Mutation testing: score {data['score']:.3f}", note, ("module", *outcomes), rows


def _block_sharing(data: Data) -> _Parts:
    counts = ("shared", "shared_in_order", "pair_stored", "pair_traffic", "square_stored")
    rows = (
        (
            f"{c['in_features']} -> {c['out_features']}", f"{c['side']}", f"{c['sparsity']:.0%}", c["mask"],
            *(f"{c[count]:.2f}" for count in counts),
        )
        for c in data["cases"]
    )  # fmt: skip
    note = (
        "Counts. Share of its block columns that a block row has in common with the one before, as drawn and in the best order "
        "found; what tiles of two block rows store and read from the shared cache, and what blocks of twice the side store, "
        "each over the blocks as they are."
    )
    columns = ("layer", "block", "zeros", "mask", "shared", "in order", "pairs store", "pairs read", "squares store")
    return "What neighbouring blocks share", note, columns, rows


_READERS: dict[str, Callable[[Data], _Parts]] = {
    "*-mlp.json": _mlp,
    "*-epilogues.json": _epilogues,
    "*-training-matrix.json": _training_matrix,
    "*-permute-costs.json": _permute_costs,
    "*-pass-time.json": _pass_time,
    "one-shot.json": _one_shot,
    "mutants.json": _mutants,
    "block-sharing.json": _block_sharing,
}
