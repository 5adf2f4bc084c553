"""How long the passes take, by depth of a ViT-B/16, beside Inductor on the same graph: writes results/cpu-pass-time.json.

The kernels are not timed against dense here (`kernels="sparse"`), because those measurements are cached between compilations.
"""

from __future__ import annotations

import time
from typing import Any

import suite
import timm
import torch
from rich.console import Console
from torch._inductor.utils import fresh_cache

import padst_compile as padst
from padst_compile.backend import padst as backend
from padst_compile.benchmarking.machine import describe_machine
from padst_compile.benchmarking.report import write_json

DEPTHS = (12, 24, 48)


def measure(depth: int, *, with_inductor: bool) -> dict[str, Any]:
    """Seconds of all passes (the fastest of three), and until the first result of a compiled call with empty caches."""
    model = timm.create_model("vit_base_patch16_224", depth=depth, pretrained=False).eval()
    padst.sparsify(model, padst.SparsitySpec(padst.Block(64), 0.9, permutation="random"))
    images = torch.randn(1, 3, 224, 224)
    options = {"kernels": "sparse"}
    with torch.no_grad():
        explanations = [padst.explain(model, images, options=options) for _ in range(3)]
        seconds: dict[str, Any] = {"depth": depth, "passes": min(e.pass_seconds for e in explanations)}
        if with_inductor:
            seconds["compile"] = _compile_seconds(model, images, options)
    return seconds


def _compile_seconds(model: torch.nn.Module, images: torch.Tensor, options: dict[str, Any]) -> float:
    torch._dynamo.reset()
    with fresh_cache():
        start = time.perf_counter()
        torch.compile(model, backend=backend, options=options)(images)
        return time.perf_counter() - start


def main() -> None:
    """Measure, print, record."""
    given = suite.arguments(__doc__, "pass-time.json", quick="one depth, nothing written")
    quick = given.quick
    torch.set_num_threads(1)
    console = Console()
    cases = []
    for depth in DEPTHS[:1] if quick else DEPTHS:
        cases.append(measure(depth, with_inductor=depth == DEPTHS[0]))
        console.print(cases[-1])
    if not quick:
        console.print(f"written to {write_json({'schema': 1, 'machine': describe_machine(), 'cases': cases}, given.out)}")


if __name__ == "__main__":
    main()
