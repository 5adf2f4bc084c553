"""What the kernels for diagonals must compile to: every tile of the search spaces of some problems."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from padst_compile.kernels import meta_arguments
from padst_compile.kernels.diagonal.tiles import default_tile, tiles
from padst_compile.kernels.diagonal.triton import linear_launch, value_gradient_launch
from padst_compile.kernels.extras import Extras
from padst_compile.kernels.launch import Problem, Tile
from padst_compile.kernels.offline_case import DEVICES, Case, Target, reads_runs_of_tokens
from padst_compile.kernels.token_shares import TokenShares
from padst_compile.kernels.triton_support import Launch, token_bucket


def offline_cases(target: Target) -> Iterator[Case]:
    """Every tile that a tuner may choose for the problems below; CUDA cores multiply, from registers."""
    for problem in _problems(DEVICES[target]):
        for tile in dict.fromkeys([default_tile(problem), *tiles(problem)]):
            yield Case(problem, tile, launch_of(problem, tile), vector_loads=reads_runs_of_tokens(problem, tile))


def launch_of(problem: Problem, tile: Tile) -> Launch:
    """The launch of a problem and tile, on meta tensors of its sizes."""
    sizes, dtype = (problem.in_features, problem.out_features), getattr(torch, problem.dtype)
    length = min(sizes)
    x, y = (meta_arguments.activations(problem, size, side) for side, size in enumerate(sizes))
    offsets = meta_arguments.index(problem.active // length)
    values = torch.empty(offsets.numel(), length, device="meta", dtype=dtype)
    if problem.kernel == "diagonal_value_gradient":
        sums = torch.empty(2, *values.shape, device="meta")
        return value_gradient_launch(y, x, offsets, sums, TokenShares(2, problem.tokens // 2), tile)
    if problem.kernel == "diagonal_input_gradient":
        return linear_launch(y, values, offsets, x, Extras(), tile, to_short=sizes[0] < sizes[1])
    return linear_launch(x, values, offsets, y, meta_arguments.extras(problem), tile, to_short=sizes[0] >= sizes[1])


def _problems(device: str) -> Iterator[Problem]:
    """Layers of ViT-B/16 at batch 256 and a decoding step, in both directions and layouts."""
    up, down = (768, 3072), (3072, 768)
    yield _problem(up, 50432, "float32", device, epilogue="bias+gelu")
    yield _problem(down, 50432, "float32", device, permuted="in+out", epilogue="bias+residual")
    yield _problem(up, 50432, "float32", device, permuted="in+out", epilogue="bias+gelu", layout="feature/feature")
    yield _problem(down, 50432, "bfloat16", device, epilogue="bias", layout="feature/token")
    yield _problem(up, 50432, "bfloat16", device, epilogue="bias+gelu", layout="token/feature")
    yield _problem(down, 1, "bfloat16", device, epilogue="bias+silu+gate")
    for sides in (up, down):
        for dtype in ("float32", "bfloat16"):
            yield _problem(sides, 50432, dtype, device, kernel="diagonal_input_gradient")
            yield _problem(sides, 50432, dtype, device, kernel="diagonal_value_gradient")


def _problem(
    sides: tuple[int, int],
    tokens: int,
    dtype: str,
    device: str,
    *,
    kernel: str = "diagonal_forward",
    permuted: str = "",
    epilogue: str = "",
    layout: str = "token/token",
) -> Problem:
    """A layer with one diagonal in ten."""
    active = max(sides) // 10 * min(sides)
    return Problem(
        kernel, "diagonal", *sides, active, token_bucket(tokens), dtype, "ieee", permuted, epilogue, layout, device
    )  # fmt: skip
