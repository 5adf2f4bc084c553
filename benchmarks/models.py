"""Whole models at 90 %, sparse beside dense, one thread: writes results/cpu-models.json."""

from __future__ import annotations

import suite
import torch

from padst_compile.benchmarking.models import build_model
from padst_compile.benchmarking.run import Comparison, Settings, compare

CASES = [
    ("timm:vit_base_patch16_224", "block:64", 1),
    ("timm:vit_base_patch16_224", "block:64", 8),
    ("timm:vit_base_patch16_224", "block:64", 8, torch.bfloat16),
    ("timm:vit_base_patch16_224", "block:32", 1),
    ("timm:vit_base_patch16_224", "nm:1:10", 1),
    ("timm:vit_base_patch16_224", "diagonal", 1),
    ("hf:gpt2", "block:64", 1),
    ("hf:gpt2", "block:32", 1),
    ("hf:gpt2", "nm:1:10", 1),
    ("hf:gpt2", "diagonal", 1),
    ("timm:mixer_s16_224", "block:64", 1),
    ("timm:mixer_s16_224", "block:32", 1),
    ("timm:mixer_s16_224", "nm:1:10", 1),
    ("timm:mixer_s16_224", "diagonal", 1),
]


def measure(model: str, structure: str, batch: int, dtype: torch.dtype = torch.float32, *, repetitions: int) -> Comparison:
    """One model with random input permutations on every layer, and without."""
    settings = Settings(dtype=dtype, batch=batch, repetitions=repetitions, unpermuted=True)
    return compare(build_model(model, batch=batch), suite.spec(structure), settings)


if __name__ == "__main__":
    suite.run(__doc__, CASES, measure, repetitions=9, name="models")
