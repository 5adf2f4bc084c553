"""`padst train`: its options, in groups, and what they become."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console

from padst_compile.command_errors import reported
from padst_compile.errors import TrainingConfigError
from padst_compile.recipes import TrainConfig
from padst_compile.recipes import run as run_training
from padst_compile.recipes.display import Display, result_line, result_table
from padst_compile.recipes.published import PRESETS, published
from padst_compile.recipes.shorthand import SparseTraining
from padst_compile.spec import SparsitySpec
from padst_compile.training import DSTConfig
from padst_compile.user_modules import import_modules

_SPARSE, _TOPOLOGY, _PERMUTATIONS = "Sparse layers", "Topology", "Permutations"
_OPTIMIZER, _DATA, _RUN = "Optimization", "Data", "Run"

# A preset decides these.
_PRESET_DECIDES = (
    "permutation", "side", "method", "interval", "fraction", "end", "ablation", "deadline", "distribution", "score",
    "mest_weight", "gradient_rows", "penalty_weight", "threshold", "permutation_warmup", "permutation_lr",
)  # fmt: skip

Model = Annotated[
    str,
    typer.Argument(help="timm:NAME[,key=value…] or mixer:key=value… for images, hf:TYPE[,key=value…] for text; random weights"),
]
Data = Annotated[Path, typer.Argument(help="images: a parquet file, or a folder of parquet files or of classes; a UTF-8 text")]
Out = Annotated[Path, typer.Option(help="folder of the run; the same command continues what is in it")]

Preset = Annotated[
    str | None,
    typer.Option(
        help=f"a published recipe, which decides topology and permutations: {', '.join(PRESETS)}", rich_help_panel=_SPARSE
    ),
]
StructureName = Annotated[
    str | None,
    typer.Option(help="as for bench, or dense; block:16 or what the preset is for if not given", rich_help_panel=_SPARSE),
]
Sparsity = Annotated[
    float | None, typer.Option(help="fraction of zeros of the trained model; N:M has its own", rich_help_panel=_SPARSE)
]
DistributionName = Annotated[
    str,
    typer.Option(help="of the sparsity over layers: uniform, or erk, which keeps more of small ones", rich_help_panel=_SPARSE),
]
Targets = Annotated[
    list[str] | None,
    typer.Option(help="layers to make sparse, a pattern; may be repeated; all if not given", rich_help_panel=_SPARSE),
]
Imports = Annotated[
    list[str] | None,
    typer.Option(
        "--import",
        help="module to import before, which registers what is named; may be repeated",
        metavar="MODULE",
        rich_help_panel=_SPARSE,
    ),
]

MethodName = Annotated[
    str,
    typer.Option(
        help="rigl, set, mest, magnitude, dynadiag, static, or none: weights alone are trained", rich_help_panel=_TOPOLOGY
    ),
]
Interval = Annotated[int, typer.Option(min=1, help="steps between updates of the topology", rich_help_panel=_TOPOLOGY)]
Fraction = Annotated[
    float, typer.Option(help="of the active weights that the first update replaces", rich_help_panel=_TOPOLOGY)
]
End = Annotated[float, typer.Option(help="fraction of the steps after which the topology stays", rich_help_panel=_TOPOLOGY)]
ScoreName = Annotated[str, typer.Option(help="of a unit: l1 or l2 norm of what it holds", rich_help_panel=_TOPOLOGY)]
GradientRows = Annotated[
    float, typer.Option(help="rigl: fraction of the output rows to estimate gradients from", rich_help_panel=_TOPOLOGY)
]
MestWeight = Annotated[float, typer.Option(help="mest: λ, of the gradient beside the weight", rich_help_panel=_TOPOLOGY)]
Ablation = Annotated[
    float | None,
    typer.Option(help="rigl: SRigL's, give up outputs of N:M layers less salient than that", rich_help_panel=_TOPOLOGY),
]

PermutationName = Annotated[
    str,
    typer.Option(help="none, random, kaleidoscope, autoshuffle, sinkhorn_ste or regroup", rich_help_panel=_PERMUTATIONS),
]
Side = Annotated[str, typer.Option(help="input, output or smaller", rich_help_panel=_PERMUTATIONS)]
Foldable = Annotated[
    bool,
    typer.Option("--foldable", help="only permutations that cost nothing in this model", rich_help_panel=_PERMUTATIONS),
]
Deadline = Annotated[
    float, typer.Option(help="fraction of the steps after which learned ones are hard", rich_help_panel=_PERMUTATIONS)
]
PermutationRate = Annotated[
    float,
    typer.Option(
        "--permutation-lr", help="of soft matrices or logits, as a multiple of the method's own", rich_help_panel=_PERMUTATIONS
    ),
]
PenaltyWeight = Annotated[float, typer.Option(help="autoshuffle: λ, of the penalty", rich_help_panel=_PERMUTATIONS)]
PermutationWarmup = Annotated[
    float, typer.Option(help="autoshuffle: fraction of the steps over which λ rises", rich_help_panel=_PERMUTATIONS)
]
Threshold = Annotated[
    float,
    typer.Option(
        help="autoshuffle: penalty, from 0 to 1, under which a permutation becomes hard", rich_help_panel=_PERMUTATIONS
    ),
]

Steps = Annotated[int, typer.Option(min=1, help="optimizer steps in all", rich_help_panel=_OPTIMIZER)]
Batch = Annotated[int, typer.Option(min=1, help="images or windows of text of a step", rich_help_panel=_OPTIMIZER)]
Rate = Annotated[
    float, typer.Option(help="highest learning rate of AdamW; a preset may multiply it", rich_help_panel=_OPTIMIZER)
]
Warmup = Annotated[
    float, typer.Option(help="fraction of the steps over which it rises; a cosine follows", rich_help_panel=_OPTIMIZER)
]
WeightDecay = Annotated[float, typer.Option(help="of matrices", rich_help_panel=_OPTIMIZER)]
Clip = Annotated[float, typer.Option(help="largest norm of the gradient", rich_help_panel=_OPTIMIZER)]
LabelSmoothing = Annotated[float, typer.Option(help="of the training loss", rich_help_panel=_OPTIMIZER)]
DtypeName = Annotated[str, typer.Option(help="float32, or bfloat16 for autocast", rich_help_panel=_OPTIMIZER)]
Seed = Annotated[int, typer.Option(help="of every random choice", rich_help_panel=_OPTIMIZER)]

Validation = Annotated[
    Path | None,
    typer.Option(help="like DATA; what lies beside it, or a tenth of it, if not given", rich_help_panel=_DATA),
]
ImageSize = Annotated[
    int | None, typer.Option(min=1, help="pixels of a side; that of the first image if not given", rich_help_panel=_DATA)
]
Augment = Annotated[bool, typer.Option(help="mirror and shift training images", rich_help_panel=_DATA)]
Context = Annotated[int, typer.Option(min=1, help="tokens of a window of text", rich_help_panel=_DATA)]
TokenKind = Annotated[str, typer.Option(help="characters or bytes", rich_help_panel=_DATA)]

LogInterval = Annotated[int, typer.Option(min=1, help="steps between rows of metrics.jsonl", rich_help_panel=_RUN)]
EvalInterval = Annotated[int, typer.Option(min=1, help="steps between validations", rich_help_panel=_RUN)]
EvalLimit = Annotated[
    int | None, typer.Option(min=1, help="at most so many validation examples; all if not given", rich_help_panel=_RUN)
]
CheckpointInterval = Annotated[int, typer.Option(min=1, help="steps between checkpoints", rich_help_panel=_RUN)]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; all cores if not given", rich_help_panel=_RUN)]
DeviceName = Annotated[str, typer.Option(help="cpu or cuda", rich_help_panel=_RUN)]
Compile = Annotated[bool, typer.Option("--compile/--no-compile", help="train with backend padst", rich_help_panel=_RUN)]


def train(
    command: typer.Context,
    model: Model,
    data: Data,
    out: Out,
    preset: Preset = None,
    structure: StructureName = None,
    sparsity: Sparsity = None,
    distribution: DistributionName = "uniform",
    targets: Targets = None,
    imports: Imports = None,
    method: MethodName = "rigl",
    interval: Interval = 100,
    fraction: Fraction = 0.3,
    end: End = 0.75,
    score: ScoreName = "l1",
    gradient_rows: GradientRows = 1.0,
    mest_weight: MestWeight = 1.0,
    ablation: Ablation = None,
    permutation: PermutationName = "none",
    side: Side = "input",
    foldable: Foldable = False,
    deadline: Deadline = 0.5,
    permutation_lr: PermutationRate = 1.0,
    penalty_weight: PenaltyWeight = 1.0,
    permutation_warmup: PermutationWarmup = 0.1,
    threshold: Threshold = 0.11,
    steps: Steps = 1000,
    batch: Batch = 64,
    lr: Rate = 1e-3,
    warmup: Warmup = 0.1,
    weight_decay: WeightDecay = 0.05,
    clip: Clip = 1.0,
    label_smoothing: LabelSmoothing = 0.0,
    dtype: DtypeName = "float32",
    seed: Seed = 0,
    validation: Validation = None,
    image_size: ImageSize = None,
    augment: Augment = True,
    context: Context = 256,
    tokens: TokenKind = "characters",
    log_interval: LogInterval = 10,
    eval_interval: EvalInterval = 200,
    eval_limit: EvalLimit = None,
    checkpoint_interval: CheckpointInterval = 200,
    threads: Threads = None,
    device: DeviceName = "cpu",
    compile_training: Compile = False,
) -> None:
    """Train a sparse model, then compile it and compare. The same command continues a run that was killed."""
    console = Console(width=None if sys.stdout.isatty() else 200)
    with reported():
        import_modules(imports or ())
        sparse = SparseTraining(
            structure or "block:16",
            sparsity=sparsity,
            permutation=permutation,
            side=side,
            foldable=foldable,
            targets=tuple(targets or ()),
            method=method,
            interval=interval,
            fraction=fraction,
            end=end,
            ablation=ablation,
            deadline=deadline,
            distribution=distribution,
            score=score,
            mest_weight=mest_weight,
            gradient_rows=gradient_rows,
            penalty_weight=penalty_weight,
            threshold=threshold,
            permutation_warmup=permutation_warmup,
            permutation_lr=permutation_lr,
        )
        if preset is None:
            specification, dst = sparse.resolve(steps=steps, seed=seed)
        else:
            _check_left_out(command, preset)
            specification, dst, factor = _recipe(preset, structure, sparse, steps=steps, seed=seed)
            lr *= factor
        config = TrainConfig(
            model,
            str(data.resolve()),
            None if validation is None else str(validation.resolve()),
            sparsity=specification,
            dst=dst,
            steps=steps,
            batch=batch,
            lr=lr,
            warmup=warmup,
            weight_decay=weight_decay,
            clip=clip,
            label_smoothing=label_smoothing,
            image_size=image_size,
            augment=augment,
            context=context,
            tokens=cast("Any", tokens),  # the configuration checks names
            dtype=cast("Any", dtype),
            seed=seed,
            log_interval=log_interval,
            eval_interval=eval_interval,
            eval_limit=eval_limit,
            checkpoint_interval=checkpoint_interval,
            threads=threads,
            device=cast("Any", device),
            compile=compile_training,
        )
        with Display(Console(stderr=True, width=None if sys.stderr.isatty() else 200)) as display:
            result = run_training(config, out, display)
    console.print(result_table(result))
    console.print(result_line(result), soft_wrap=True, highlight=False)
    console.print(f"kept in {out}", soft_wrap=True, markup=False)
    if not result.passed:
        raise typer.Exit(1)


def _check_left_out(command: typer.Context, preset: str) -> None:
    """Refuse what a preset decides; values that are defaults were not given."""
    for name in _PRESET_DECIDES:
        source = command.get_parameter_source(name)
        if source is not None and source.name != "DEFAULT":
            option = next(parameter.opts[0] for parameter in command.command.params if parameter.name == name)
            raise TrainingConfigError(f"preset {preset!r} decides {option}; leave one of them out")


def _recipe(
    preset: str, structure: str | None, sparse: SparseTraining, *, steps: int, seed: int
) -> tuple[SparsitySpec, DSTConfig, float]:
    """What a preset makes sparse, how it trains, and by how much it multiplies the learning rate."""
    recipe = published(preset, structure, sparse.sparsity, steps=steps, seed=seed)
    changes: dict[str, Any] = {"targets": sparse.targets} if sparse.targets else {}
    if sparse.foldable:
        changes["permutation_group"] = "foldable"
    return dataclasses.replace(recipe.spec, **changes), recipe.config, recipe.learning_rate_factor
