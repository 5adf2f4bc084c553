"""How the C++ block kernel cuts its work: how many tokens at once, by default and as a search tries."""

from __future__ import annotations

import torch

from padst_compile.kernels.launch import Problem, Tile, tile_for
from padst_compile.structures import Block, Structure

KERNEL = "native_block"

_TOKENS = (16, 32, 48, 64, 96, 128)
_MOST_TOKENS = 1 << 16
_DTYPES = {dtype: str(dtype).removeprefix("torch.") for dtype in (torch.float32, torch.bfloat16, torch.float16)}


def default_tile(problem: Problem) -> Tile:
    """The kernel's own choice."""
    return _tile(0)


def tiles(problem: Problem) -> list[Tile]:
    """All tiles worth timing; each of them is right for every size."""
    return [_tile(tokens) for tokens in _TOKENS]


def usual_tokens(problem: Problem) -> int:
    """How many tokens the kernel takes by default (`kTokenTile` in `block_product.h`), for reckoning."""
    return 32 if problem.dtype == "float32" else 64


def token_tile(
    structure: Structure,
    x: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    input_permutation: torch.Tensor | None,
    output_permutation: torch.Tensor | None,
    out_features: int,
) -> int:
    """The op's argument `token_tile` for a call with these operands, those of `padst::structured_linear`; 0 for its default."""
    if not isinstance(structure, Block):
        return 0
    tokens = x.numel() // x.shape[-1]
    sides = ("in" if input_permutation is not None else "", "out" if output_permutation is not None else "")
    problem = Problem(
        kernel=KERNEL,
        structure=structure.to_string(),
        in_features=x.shape[-1],
        out_features=out_features,
        active=values.numel(),
        tokens=1 << (max(1, min(tokens, _MOST_TOKENS)) - 1).bit_length(),
        dtype=_DTYPES[x.dtype],
        permuted="+".join(filter(None, sides)),
        epilogue="" if bias is None else "bias",
        device="cpu",
    )
    return tile_for(problem, default_tile).tokens


def _tile(tokens: int) -> Tile:
    return Tile(tokens, outputs=0, depth=0)
