"""The `padst` command: demo, explain, bench, tune, train, doctor."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from padst_compile.autotune.cache import cache_folder, results_folder, write_shipped
from padst_compile.autotune.effort import BUDGETS, Effort
from padst_compile.autotune.environment import environment
from padst_compile.autotune.lookup import library
from padst_compile.benchmarking.machine import describe_machine
from padst_compile.benchmarking.models import ModelCase, build_model
from padst_compile.benchmarking.report import comparison_table, write_json, write_results
from padst_compile.benchmarking.run import Comparison, Settings, compare
from padst_compile.command_errors import reported
from padst_compile.conversion import sparse_layers, sparsify
from padst_compile.doctor import examine
from padst_compile.drawing.picture import draw, picture
from padst_compile.drawing.svg import to_svg
from padst_compile.errors import DrawingError, MissingDeviceError, UnknownFieldError
from padst_compile.explain import explain as explain_model
from padst_compile.explanation_page import write_page
from padst_compile.spec import SparsitySpec
from padst_compile.structures import parse
from padst_compile.train_command import train
from padst_compile.tuning import sources, tuning_table
from padst_compile.tuning import tune as tune_layers
from padst_compile.user_modules import import_modules

app = typer.Typer(
    help="Permuted structured-sparse linear layers for PyTorch.", no_args_is_help=True, pretty_exceptions_enable=False
)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_DEMO_MODELS = ("timm:vit_base_patch16_224", "hf:gpt2")

ModelName = Annotated[
    str, typer.Argument(help="timm:NAME, hf:TYPE[,key=value…] or linear:IN:OUT; built from its configuration")
]
StructureName = Annotated[
    str,
    typer.Option(help="block:64, block:32x64, nm:1:10, nm:1:10:8, diagonal, diagonal:16, unstructured, or a registered one"),
]
Sparsity = Annotated[float | None, typer.Option(help="fraction of zeros; N:M has its own")]
PermutationName = Annotated[str, typer.Option(help="none, random, kaleidoscope, search or learned")]
Side = Annotated[str, typer.Option(help="input, output or smaller")]
Batch = Annotated[int, typer.Option(min=1, help="images or sequences")]
Tokens = Annotated[int, typer.Option(min=1, help="length of a sequence; rows for linear:")]
DtypeName = Annotated[str, typer.Option(help=", ".join(_DTYPES))]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; all cores if not given")]
Imports = Annotated[
    list[str] | None,
    typer.Option("--import", help="module to import before, which registers what is named; may be repeated", metavar="MODULE"),
]
Targets = Annotated[list[str] | None, typer.Option(help="layers to make sparse, a pattern; may be repeated; all if not given")]
JsonPath = Annotated[Path | None, typer.Option("--json", help="write the result here")]
Repetitions = Annotated[int, typer.Option(min=1, help="timed calls of each candidate")]


@app.command()
def demo(
    repetitions: Repetitions = 9,
    threads: Threads = None,
    json_path: JsonPath = None,
) -> None:
    """Sparsify ViT-B/16 and GPT-2 small, compile, check against float64, and time them beside dense."""
    with reported():
        _set_threads(threads)
        spec = SparsitySpec(structure=parse("block:64"), sparsity=0.9, permutation="random")
        settings = Settings(repetitions=repetitions)
        comparisons = [_compare(build_model(name), spec, settings) for name in _DEMO_MODELS]
    path = write_results(comparisons, json_path or cache_folder() / "demo.json")
    _report(comparisons, "sparse beside dense, same process, interleaved medians", path)


@app.command()
def bench(
    model: ModelName,
    structure: StructureName = "block:64",
    sparsity: Sparsity = None,
    permutation: PermutationName = "none",
    side: Side = "input",
    batch: Batch = 1,
    tokens: Tokens = 256,
    dtype: DtypeName = "float32",
    threads: Threads = None,
    imports: Imports = None,
    repetitions: Repetitions = 15,
    compare_with: Annotated[str, typer.Option("--compare", help="none: also time the model without permutations")] = "",
    json_path: JsonPath = None,
) -> None:
    """Time a sparse model beside the same dense model at its best (torch.compile default and freezing)."""
    with reported():
        import_modules(imports or ())
        if compare_with not in ("", "none"):
            raise UnknownFieldError("value of --compare", compare_with, ("none",))
        _set_threads(threads)
        spec = _spec(structure, sparsity, permutation, side)
        settings = Settings(_dtype(dtype), batch, repetitions, unpermuted=compare_with == "none")
        comparisons = [_compare(build_model(model, batch=batch, tokens=tokens), spec, settings)]
    path = write_results(comparisons, json_path) if json_path is not None else None
    _report(comparisons, "medians of interleaved calls", path)


@app.command()
def explain(
    model: ModelName,
    structure: StructureName = "block:64",
    sparsity: Sparsity = None,
    permutation: PermutationName = "random",
    side: Side = "input",
    batch: Batch = 1,
    tokens: Tokens = 256,
    dtype: DtypeName = "float32",
    threads: Threads = None,
    targets: Targets = None,
    imports: Imports = None,
    json_path: JsonPath = None,
    page: Annotated[Path | None, typer.Option("--html", help="write a page with all of it here")] = None,
    graph: Annotated[
        Path | None, typer.Option("--graph", "--draw", help="draw a block before and after: a file .svg, .png or .dot")
    ] = None,
    block: Annotated[str | None, typer.Option(help="module to draw; the first block if not given")] = None,
) -> None:
    """Say what the compiler does with each layer and each permutation of a model, and why."""
    console = Console()
    with reported():
        import_modules(imports or ())
        _set_threads(threads)
        case = build_model(model, batch=batch, tokens=tokens)
        sparse = sparsify(case.model.to(_dtype(dtype)), _spec(structure, sparsity, permutation, side, targets))
        with console.status(f"{model}: capturing and running the passes"), torch.no_grad():
            explanation = explain_model(sparse, *case.inputs_as(_dtype(dtype)), **case.kwargs)
            if graph is not None:
                draw(sparse, graph, *case.inputs_as(_dtype(dtype)), block=block, **case.kwargs)
            if page is not None:
                drawn = _svg(sparse, block, case.inputs_as(_dtype(dtype)), case.kwargs)
                sparsified = f"{structure}, permutation {permutation} of the {side} side, batch {batch}, {dtype}"
                facts = {"sparsified as": sparsified, **{k: str(v) for k, v in describe_machine().items() if v is not None}}
                write_page(page, explanation, model, facts, drawn)
    explanation.render(console)
    for what, file in (("drawn in", graph), ("page in", page)):
        if file is not None:
            console.print(f"{what} {file}", soft_wrap=True)
    if json_path is not None:
        console.print(f"written to {write_json(explanation.to_dict(), json_path)}")


@app.command()
def tune(
    model: ModelName,
    structure: StructureName = "block:64",
    sparsity: Sparsity = None,
    permutation: PermutationName = "random",
    side: Side = "input",
    effort: Annotated[
        str, typer.Option(help="quick: a few candidates; full: the whole search space; cached: list what is known")
    ] = "quick",
    batch: Batch = 1,
    tokens: Tokens = 256,
    dtype: DtypeName = "float32",
    threads: Threads = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    targets: Targets = None,
    imports: Imports = None,
    json_path: JsonPath = None,
    export: Annotated[
        Path | None, typer.Option(help="write all results for this device here, as the package ships them in autotune/configs")
    ] = None,
) -> None:
    """Measure what runs each layer of a model fastest in inference, and keep it for all later compilations."""
    console = Console(width=None if sys.stdout.isatty() else 200)
    with reported():
        import_modules(imports or ())
        _set_threads(threads)
        case = build_model(model, batch=batch, tokens=tokens).on(_device(device))
        sparse = sparsify(case.model.to(_dtype(dtype)), _spec(structure, sparsity, permutation, side, targets))
        effort = _tuning_effort(effort)
        layers = sum(1 for _ in sparse_layers(sparse))
        with Progress(console=Console(stderr=True)) as progress, torch.no_grad():
            task = progress.add_task(f"tuning {model}", total=layers)
            tuned = tune_layers(
                sparse, *case.inputs_as(_dtype(dtype)), effort=effort, progress=lambda: progress.advance(task), **case.kwargs
            )
    console.print(tuning_table(tuned, f"{model}, {dtype}, {effort}"))
    console.print(f"{sources(tuned)}; kept in {results_folder()}", soft_wrap=True)
    if json_path is not None:
        result = {"model": model, "effort": effort, "machine": describe_machine(), **tuned.to_dict()}
        console.print(f"written to {write_json(result, json_path)}", soft_wrap=True)
    if export is not None:
        results = library().cache.results_of(environment(device).processor)
        console.print(f"{write_shipped(export, results)} results written to {export}", soft_wrap=True)


app.command()(train)


@app.command()
def doctor(json_path: JsonPath = None) -> None:
    """Report what this machine can do, and what to install for the rest."""
    console = Console()
    with console.status("looking around; the first time builds the native kernels"):
        findings = examine()
    table = Table(title="padst doctor", title_justify="left")
    for column in ("topic", "status", "found", "what to do"):
        table.add_column(column, overflow="fold")
    colours = {"ok": "green", "missing": "yellow", "note": "white"}
    for finding in findings:
        colour = colours[finding.status]
        table.add_row(finding.topic, f"[{colour}]{finding.status}[/{colour}]", finding.detail, finding.fix)
    console.print(table)
    if json_path is not None:
        console.print(f"written to {write_json([finding.to_dict() for finding in findings], json_path)}")


def _svg(model: torch.nn.Module, block: str | None, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """A block of the model; nothing if there is none that can be drawn, unless it was asked for by name."""
    try:
        return to_svg(picture(model, block, inputs, kwargs))
    except DrawingError:
        if block is not None:
            raise
        return ""


def _compare(case: ModelCase, spec: SparsitySpec, settings: Settings) -> Comparison:
    console = Console(stderr=True)
    with console.status(case.name) as status:

        def progress(text: str) -> None:
            status.update(text)
            if not console.is_terminal:
                console.print(text)

        return compare(case, spec, settings, progress)


def _report(comparisons: list[Comparison], title: str, path: Path | None) -> None:
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(comparison_table(comparisons, title))
    for note in dict.fromkeys(c.note for c in comparisons if c.note):
        console.print(note)
    if path is not None:
        console.print(f"written to {path}", soft_wrap=True)
    wrong = [c.model for c in comparisons if not c.check.passed]
    if wrong:
        console.print(f"[red]outputs differ from the reference: {', '.join(wrong)}[/red]")
        raise typer.Exit(1)


def _spec(
    structure: str, sparsity: float | None, permutation: str, side: str, targets: list[str] | None = None
) -> SparsitySpec:
    chosen = parse(structure)
    if sparsity is None and chosen.natural_sparsity() is None:
        sparsity = 0.9
    fields: dict[str, Any] = {"permutation": permutation, "permutation_side": side}
    if targets:
        fields["targets"] = tuple(targets)
    return SparsitySpec(structure=chosen, sparsity=sparsity, **fields)


def _dtype(name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise UnknownFieldError("dtype", name, _DTYPES)
    return _DTYPES[name]


def _device(name: str) -> torch.device:
    if name not in ("cpu", "cuda"):
        raise UnknownFieldError("device", name, ("cpu", "cuda"))
    if name == "cuda" and not torch.cuda.is_available():
        raise MissingDeviceError("--device cuda: PyTorch finds no GPU here; `padst doctor` says more")
    return torch.device(name)


def _tuning_effort(name: str) -> Effort:
    if name not in (known := (*BUDGETS, "cached")):
        raise UnknownFieldError("value of --effort", name, known)
    return cast("Effort", name)


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    app()
