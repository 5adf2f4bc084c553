"""What a training run is made of: everything that decides its numbers, and nothing else."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias, get_args

from padst_compile.errors import TrainingConfigError, UnknownFieldError
from padst_compile.spec import SparsitySpec
from padst_compile.training.config import DSTConfig

TrainingDtype: TypeAlias = Literal["float32", "bfloat16"]
Tokens: TypeAlias = Literal["characters", "bytes"]
DeviceName: TypeAlias = Literal["cpu", "cuda"]

_CHOICES = {"dtype": get_args(TrainingDtype), "tokens": get_args(Tokens), "device": get_args(DeviceName)}
_COUNTS = ("steps", "batch", "context", "eval_interval", "checkpoint_interval", "log_interval")
_OPTIONAL = ("image_size", "eval_limit", "threads", "clip")
_FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run of `padst train`.

    Args:
        model: `timm:NAME,key=value…` or `mixer:key=value…` for images, `hf:TYPE,key=value…` for text; built from its
            configuration with random weights.
        data: a path, see `image_sources.find_images` and `text.load_text`.
        validation: another; None takes what lies beside `data`, or holds a tenth of it out.
        sparsity: what to make sparse; None trains dense.
        dst: how the topology and the permutations are trained; None leaves both as they start.
        steps: optimizer steps in all.
        batch: images or windows of text of a step.
        lr: highest learning rate of AdamW.
        warmup: fraction of the steps over which it rises, linearly.
        final_lr: what the cosine behind falls to, as a fraction of `lr`.
        weight_decay: of matrices; vectors (biases, norms) have none.
        beta2: of AdamW; its first beta is 0.9.
        clip: largest norm of the gradient; None for any.
        label_smoothing: of the training loss.
        image_size: pixels of a side; None takes that of the first image.
        augment: mirror and shift training images.
        context: tokens of a window of text.
        tokens: "characters" or "bytes".
        dtype: "bfloat16" computes under autocast; weights are float32 either way.
        seed: of weights, order, augmentation and dropout; sparsity and dst have their own.
        eval_interval: steps between validations.
        eval_limit: at most so many validation examples, evenly spread; None for all.
        checkpoint_interval: steps between checkpoints.
        log_interval: steps between rows of `metrics.jsonl`.
        threads: of the CPU; None for all. Results may differ in the last digits with it.
        device: "cpu" or "cuda".
        compile: train with `torch.compile(backend="padst")`.

    Raises:
        TrainingConfigError: a value that makes no sense, or values that contradict each other.
        UnknownFieldError: a name that does not exist.
    """

    model: str
    data: str
    validation: str | None = None
    sparsity: SparsitySpec | None = None
    dst: DSTConfig | None = None
    steps: int = 1000
    batch: int = 64
    lr: float = 1e-3
    warmup: float = 0.1
    final_lr: float = 0.0
    weight_decay: float = 0.05
    beta2: float = 0.99
    clip: float | None = 1.0
    label_smoothing: float = 0.0
    image_size: int | None = None
    augment: bool = True
    context: int = 256
    tokens: Tokens = "characters"
    dtype: TrainingDtype = "float32"
    seed: int = 0
    eval_interval: int = 200
    eval_limit: int | None = None
    checkpoint_interval: int = 200
    log_interval: int = 10
    threads: int | None = None
    device: DeviceName = "cpu"
    compile: bool = False

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise UnknownFieldError(f"{name} of a training run:", str(getattr(self, name)), choices)
        self._check_numbers()
        self._check_sparse_training()

    def _check_numbers(self) -> None:
        given = [name for name in _OPTIONAL if getattr(self, name) is not None]
        for name in (*_COUNTS, *given):
            if name != "clip":
                _require_count(name, getattr(self, name))
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TrainingConfigError(f"seed must be an integer, got {self.seed!r}")
        for name in ("warmup", "beta2", "label_smoothing"):
            _require_number(name, getattr(self, name), most=1.0, below=True)
        _require_number("final_lr", self.final_lr, most=1.0)
        _require_number("weight_decay", self.weight_decay)
        for name in ("lr", "clip"):
            if name == "lr" or name in given:
                _require_number(name, getattr(self, name), above=True)

    def _check_sparse_training(self) -> None:
        if self.dst is None:
            return
        if self.sparsity is None:
            raise TrainingConfigError("dst trains sparse layers; give a sparsity specification too, or leave dst out")
        if self.dst.total_steps not in (None, self.steps):
            raise TrainingConfigError(f"dst.total_steps is {self.dst.total_steps}, and the run has {self.steps} steps")
        if self.dst.permutation is not None and self.sparsity.permutation != "learned":
            raise TrainingConfigError(
                f"{self.dst.permutation.method!r} learns permutations, and the specification has "
                f"permutation={self.sparsity.permutation!r}; set it to 'learned'"
            )

    @property
    def final_sparsity(self) -> SparsitySpec | None:
        """The specification of the trained model: gradual pruning ends with another sparsity than it began with."""
        if self.sparsity is None or self.dst is None or self.dst.final_sparsity is None:
            return self.sparsity
        return dataclasses.replace(self.sparsity, sparsity=self.dst.final_sparsity)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        data = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            "version": _FORMAT_VERSION,
            **data,
            "sparsity": None if self.sparsity is None else self.sparsity.to_dict(),
            "dst": None if self.dst is None else self.dst.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TrainConfig:
        """Read the JSON form back.

        Raises:
            TrainingConfigError: another version, or wrong values.
            UnknownFieldError: a key that does not exist.
        """
        fields = dict(data)
        if fields.pop("version", None) != _FORMAT_VERSION:
            raise TrainingConfigError(f"this is no configuration of version {_FORMAT_VERSION}: it has {data.get('version')!r}")
        known = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                raise UnknownFieldError("key in a training configuration", str(name), known)
        for name in ("model", "data"):
            if name not in fields:
                raise TrainingConfigError(f"a training configuration needs {name!r}")
        if fields.get("sparsity") is not None:
            fields["sparsity"] = SparsitySpec.from_dict(fields["sparsity"])
        if fields.get("dst") is not None:
            fields["dst"] = DSTConfig.from_dict(fields["dst"])
        return cls(**fields)


def differences(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Names of the fields in which two JSON forms differ, `sparsity.structure.size` for a nested one."""
    found = []
    for name in dict.fromkeys((*one, *other)):
        first, second = one.get(name), other.get(name)
        if isinstance(first, Mapping) and isinstance(second, Mapping):
            found += differences(first, second, f"{prefix}{name}.")
        elif first != second:
            found.append(f"{prefix}{name}")
    return found


def _require_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise TrainingConfigError(f"{name} must be a positive integer, got {value!r}")


def _require_number(name: str, value: object, most: float = math.inf, *, above: bool = False, below: bool = False) -> None:
    """Refuse what is no number from 0 to `most`; `above` and `below` leave out the ends."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    inside = number and 0.0 <= value <= most and not (above and value == 0.0) and not (below and value == most)  # type: ignore[operator]  # a number
    if not inside:
        limits = [f"{'above' if above else 'at least'} 0"]
        limits += [] if most == math.inf else [f"{'below' if below else 'at most'} {most:g}"]
        raise TrainingConfigError(f"{name} must be a number {' and '.join(limits)}, got {value!r}")
