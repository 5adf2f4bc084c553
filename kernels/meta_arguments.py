"""Arguments of a problem's sizes that hold no memory, to compile a launch for a GPU that is not there."""

from __future__ import annotations

import torch

from padst_compile.kernels.extras import Extras
from padst_compile.kernels.launch import Problem


def activations(problem: Problem, features: int, side: int) -> torch.Tensor:
    """`[tokens, features]` in the layout of the inputs (`side` 0) or the outputs (1)."""
    dtype = getattr(torch, problem.dtype)
    if problem.layout.split("/")[side] == "feature":
        return torch.empty(features, problem.tokens, device="meta", dtype=dtype).T
    return torch.empty(problem.tokens, features, device="meta", dtype=dtype)


def index(entries: int) -> torch.Tensor:
    """int32 `[entries]`."""
    return torch.empty(entries, device="meta", dtype=torch.int32)


def extras(problem: Problem) -> Extras:
    """What the epilogue and the permutations of a problem take."""
    parts, permuted = problem.epilogue.split("+"), problem.permuted.split("+")
    like_y = torch.empty(problem.tokens, problem.out_features, device="meta", dtype=getattr(torch, problem.dtype))
    return Extras(
        bias=like_y[0] if "bias" in parts else None,
        input_permutation=index(problem.in_features) if "in" in permuted else None,
        output_permutation=index(problem.out_features) if "out" in permuted else None,
        activation=next((part for part in parts if part not in ("", "bias", "gate", "residual")), "none"),
        gate=like_y if "gate" in parts else None,
        residual=like_y if "residual" in parts else None,
    )
