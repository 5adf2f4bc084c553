"""One comparison: a dense model at its best, and the same model sparse, measured in turns in one process."""

from __future__ import annotations

import copy
import dataclasses
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch._inductor.config as inductor_config
from torch import nn
from torch._inductor.utils import fresh_cache

from padst_compile.autotune.measure import interleaved_medians, interleaved_samples
from padst_compile.backend import padst
from padst_compile.benchmarking.check import Check, check_compiled
from padst_compile.benchmarking.models import ModelCase, first_tensor
from padst_compile.conversion import sparse_layers, sparsify
from padst_compile.explain import dense_bytes, sparse_bytes
from padst_compile.kernels import native
from padst_compile.spec import SparsitySpec

Progress = Callable[[str], None]
Compile = Callable[[Callable[..., Any]], Callable[..., Any]]

_PAIRS = 4  # pairs of calls per repetition: they are short beside the dense ones

DENSE_DEFAULT, DENSE_FREEZING, SPARSE, UNPERMUTED = "dense default", "dense freezing", "padst", "padst, no permutation"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What one comparison measured.

    Args:
        model: its name.
        spec: JSON form of the specification.
        dtype: of weights and activations.
        batch: images or sequences.
        tokens: length of a sequence, or None.
        note: about the inputs.
        milliseconds: median time of one call, by candidate.
        permutation_ratio: time with permutations over time without, the median over pairs of calls that ran one after the
            other with nothing between them; None where it was not measured.
        compile_seconds: time until the first result, by candidate, with empty compiler caches.
        check: errors of the sparse model.
        bytes_ratio: values, indices and biases over the dense weights and biases of the sparsified layers.
    """

    model: str
    spec: dict[str, Any]
    dtype: str
    batch: int
    tokens: int | None
    note: str
    milliseconds: dict[str, float]
    permutation_ratio: float | None
    compile_seconds: dict[str, float]
    check: Check
    bytes_ratio: float

    @property
    def best_dense(self) -> str:
        """The faster of the dense candidates."""
        return min((DENSE_DEFAULT, DENSE_FREEZING), key=lambda name: self.milliseconds.get(name, float("inf")))

    @property
    def speedup(self) -> float:
        """Best dense time over sparse time."""
        return self.milliseconds[self.best_dense] / self.milliseconds[SPARSE]

    @property
    def speedup_over_default(self) -> float:
        """Time of torch.compile's default over sparse time."""
        return self.milliseconds[DENSE_DEFAULT] / self.milliseconds[SPARSE]

    def to_dict(self) -> dict[str, Any]:
        """JSON form, with the ratios."""
        ratios = {
            "speedup": self.speedup,
            "speedup_over_default": self.speedup_over_default,
            "best_dense": self.best_dense,
        }
        return {**dataclasses.asdict(self), "check": self.check.to_dict(), **ratios}


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to measure.

    Args:
        dtype: of weights and activations.
        batch: for the record.
        repetitions: timed calls of each candidate.
        unpermuted: also measure the same model without permutations, and then the two of them alone: the difference is small,
            and whoever runs after a dense model finds the caches full of its weights.
    """

    dtype: torch.dtype = torch.float32
    batch: int = 1
    repetitions: int = 15
    unpermuted: bool = False


def compare(case: ModelCase, spec: SparsitySpec, settings: Settings, progress: Progress = lambda _: None) -> Comparison:
    """Compile the dense model twice (default, freezing) and the sparse one, check it, and time all of them in turns.

    Args:
        case: the dense model; a copy is sparsified.
        spec: how.
        settings: how to measure.
        progress: told what happens next.

    Raises:
        PadstError: what `sparsify` raises.
    """
    model = case.model.to(settings.dtype)
    sparse = sparsify(copy.deepcopy(model), spec)
    inputs = case.inputs_as(settings.dtype)
    torch._dynamo.reset()
    _start_compiler()
    runs: dict[str, Callable[[], Any]] = {}
    seconds: dict[str, float] = {}
    for name, candidate, compile_model in _candidates(model, sparse, spec, settings):
        progress(f"{case.name}: compiling {name}")
        start = time.perf_counter()
        with torch.no_grad():
            compiled = compile_model(own_code(candidate))
            run = _call(compiled, inputs, case.kwargs)
            with fresh_cache(), inductor_config.patch(freezing=name == DENSE_FREEZING):
                output = run()
        seconds[name] = time.perf_counter() - start
        runs[name] = run
        if name == SPARSE:
            sparse_output = first_tensor(output)
    progress(f"{case.name}: checking")
    check = check_compiled(case, sparse, sparse_output, settings.dtype)
    gc.collect()
    progress(f"{case.name}: measuring")
    medians = interleaved_medians(runs, repetitions=settings.repetitions, warmup=2)
    ratio = _paired_ratio(runs[SPARSE], runs[UNPERMUTED], _PAIRS * settings.repetitions) if settings.unpermuted else None
    layers = [layer for _, layer in sparse_layers(sparse)]
    return Comparison(
        model=case.name,
        spec=spec.to_dict(),
        dtype=str(settings.dtype).removeprefix("torch."),
        batch=settings.batch,
        tokens=case.tokens,
        note=case.note,
        milliseconds={name: median * 1e3 for name, median in medians.items()},
        permutation_ratio=ratio,
        compile_seconds=seconds,
        check=check,
        bytes_ratio=sparse_bytes(layers) / dense_bytes(layers),
    )


def _paired_ratio(run: Callable[[], Any], other: Callable[[], Any], repetitions: int) -> float:
    """The median of `run`'s time over `other`'s, call by call."""
    samples = interleaved_samples({"run": run, "other": other}, repetitions=repetitions, warmup=2)
    return statistics.median(a / b for a, b in zip(samples["run"], samples["other"], strict=True))


def _candidates(
    model: nn.Module, sparse: nn.Module, spec: SparsitySpec, settings: Settings
) -> list[tuple[str, nn.Module, Compile]]:
    def ours(run: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(run, backend=padst)

    candidates: list[tuple[str, nn.Module, Compile]] = [
        (DENSE_DEFAULT, model, torch.compile),
        (DENSE_FREEZING, copy.deepcopy(model), torch.compile),
        (SPARSE, sparse, ours),
    ]
    if settings.unpermuted:
        plain = dataclasses.replace(spec, permutation="none")
        candidates.append((UNPERMUTED, sparsify(copy.deepcopy(model), plain), ours))
    return candidates


def _start_compiler() -> None:
    """Compile something small, so that no candidate pays for what Inductor does once per process, nor for the C++ kernels."""
    native.load()
    with fresh_cache():
        torch.compile(lambda x: torch.tanh(x) + 1)(torch.ones(64))


def own_code(model: nn.Module) -> Callable[..., Any]:
    """A function that calls `model`, with a code object of its own.

    Dynamo keeps compiled code per code object and takes parameters as inputs: copies of a model that share their code
    would share the first copy's program, whatever it was compiled with.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    call.__code__ = call.__code__.replace(co_name=f"call_{id(model)}")
    return call


def _call(compiled: Callable[..., Any], inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], Any]:
    def run() -> Any:
        with torch.no_grad():
            return compiled(*inputs, **kwargs)

    return run
