"""Single layers at 90 %, sparse beside dense, one thread: writes results/cpu-layers.json."""

from __future__ import annotations

import suite
import torch

from padst_compile.benchmarking.models import build_model
from padst_compile.benchmarking.run import Comparison, Settings, compare

CASES = [
    ("linear:768:3072", "block:64", torch.float32, 1576),
    ("linear:3072:768", "block:64", torch.float32, 1576),
    ("linear:768:3072", "block:32", torch.float32, 1576),
    ("linear:768:3072", "block:16", torch.float32, 1576),
    ("linear:768:3072", "nm:1:10", torch.float32, 1576),
    ("linear:768:3072", "diagonal", torch.float32, 1576),
    ("linear:768:3072", "block:64", torch.float32, 197),
    ("linear:3072:768", "block:64", torch.float32, 197),
    ("linear:768:3072", "block:64", torch.float32, 16),
    ("linear:768:3072", "block:64", torch.bfloat16, 1576),
    ("linear:3072:768", "block:64", torch.bfloat16, 1576),
]


def measure(model: str, structure: str, dtype: torch.dtype, tokens: int, *, repetitions: int) -> Comparison:
    """One layer with a random input permutation, and without."""
    settings = Settings(dtype=dtype, repetitions=repetitions, unpermuted=True)
    return compare(build_model(model, tokens=tokens), suite.spec(structure), settings)


if __name__ == "__main__":
    suite.run(__doc__, CASES, measure, repetitions=31, name="layers")
