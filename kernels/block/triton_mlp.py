"""Two block-sparse layers in one kernel: `Y = act(X @ S1.T + b1) @ S2.T + b2 + residual`, the hidden tensor in registers.

At the widths of ViT-B both layers wait for memory, and most of what they move is the hidden tensor. Here a program computes a
tile of tokens by outputs; for every block of S2 in its row it computes the hidden tile that the block reads, from the blocks
of S1 in that row. A hidden tile is computed once for each block in its column of S2: 1.2 times on average for 768 outputs, 64
wide blocks and one block in ten. So the sparser S2, the less is computed twice, and the more of the time was memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from padst_compile.kernels import triton_support
from padst_compile.kernels.block.triton import Blocks
from padst_compile.kernels.block.triton_parts import load_tile, outputs_of, tile_of
from padst_compile.kernels.dot import dot
from padst_compile.kernels.epilogue import activate, write_tile
from padst_compile.kernels.launch import Tile
from padst_compile.kernels.triton_support import Launch


@triton.jit
def block_mlp_kernel(
    x,
    first_values,
    first_pointers,
    first_columns,
    first_bias,
    second_values,
    second_pointers,
    second_columns,
    second_bias,
    residual,
    y,
    tokens,
    in_features,
    hidden_features,
    out_features,
    row_count,
    x_token_stride,
    x_feature_stride,
    y_token_stride,
    y_feature_stride,
    COLUMNS: tl.constexpr,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of `TOKENS` by `OUTPUTS`; the grid has one axis, of token tiles times output tiles.

    Args:
        x: pointer to [tokens, in_features].
        first_values: pointer to [blocks, COLUMNS, HIDDEN] of S1.
        first_pointers: pointer to int32 [hidden rows + 1].
        first_columns: pointer to int32 [blocks].
        first_bias: pointer to [hidden_features], or None.
        second_values: pointer to [blocks, HIDDEN, ROWS] of S2.
        second_pointers: pointer to int32 [row_count + 1].
        second_columns: pointer to int32 [blocks].
        second_bias: pointer to [out_features], or None.
        residual: pointer to a tensor laid out like `y`, or None.
        y: pointer to [tokens, out_features].
        tokens: rows of `x` and `y`.
        in_features: columns of `x`.
        hidden_features: rows of S1.
        out_features: rows of S2.
        row_count: block rows of S2.
        x_token_stride: of `x`, in elements, like the three after it.
        x_feature_stride: of `x`.
        y_token_stride: of `y`.
        y_feature_stride: of `y`.
        COLUMNS: inputs of a block of S1.
        HIDDEN: outputs of a block of S1, and inputs of one of S2.
        ROWS: outputs of a block of S2.
        ACTIVATION: see `epilogue.activate`.
        PRECISION: how float32 is multiplied ("ieee", "tf32", "tf32x3").
        EVEN: whether blocks divide all features, and tiles divide blocks.
        TOKENS: tokens of the tile; a power of two from 16, like the next three.
        OUTPUTS: outputs of the tile.
        DEPTH: inputs of a step.
        WIDTH: at least `HIDDEN`.
        GROUP: token tiles that run next to each other.
    """
    steps: tl.constexpr = (COLUMNS + DEPTH - 1) // DEPTH
    token_tile, row, part = tile_of(tl.program_id(0), tokens, row_count, ROWS, TOKENS, OUTPUTS, GROUP)
    token = token_tile * TOKENS + tl.arange(0, TOKENS)
    token_mask = token < tokens
    inner, unit = tl.arange(0, DEPTH), tl.arange(0, WIDTH)
    place_in_row, feature, feature_mask = outputs_of(row, part, out_features, ROWS, OUTPUTS)
    # Tokens that do not exist read the last one that does.
    x += (tl.minimum(token, tokens - 1).to(tl.int64) * x_token_stride)[:, None]
    first_values += (inner * HIDDEN)[:, None] + unit[None, :]
    second_values += (unit * ROWS)[:, None] + place_in_row[None, :]

    sums = tl.zeros((TOKENS, OUTPUTS), tl.float32)
    for block in range(tl.load(second_pointers + row), tl.load(second_pointers + row + 1)):
        hidden_row = tl.load(second_columns + block)
        neuron = hidden_row * HIDDEN + unit
        neuron_mask = (unit < HIDDEN) & (neuron < hidden_features)
        begin, end = tl.load(first_pointers + hidden_row), tl.load(first_pointers + hidden_row + 1)
        column = tl.load(first_columns + begin, mask=begin < end, other=0)
        hidden = tl.zeros((TOKENS, WIDTH), tl.float32)
        for step in tl.range(begin * steps, end * steps):
            start = (step % steps) * DEPTH
            source = column * COLUMNS + start + inner
            exists = (start + inner < COLUMNS) & (source < in_features)
            x_pointers = x + (source.to(tl.int64) * x_feature_stride)[None, :]
            value_pointers = first_values + (tl.cast(step // steps, tl.int64) * (COLUMNS * HIDDEN) + start * HIDDEN)
            x_tile = load_tile(x_pointers, token_mask[:, None], exists[None, :], True, EVEN)
            value_tile = load_tile(value_pointers, exists[:, None], neuron_mask[None, :], EVEN, EVEN)
            hidden = dot(x_tile, value_tile, hidden, PRECISION)
            following = (step + 1) // steps
            column = tl.load(first_columns + following, mask=following < end, other=0)
        if first_bias is not None:
            hidden += tl.load(first_bias + neuron, mask=neuron_mask, other=0.0).to(tl.float32)[None, :]
        hidden = activate(hidden, ACTIVATION)
        value_pointers = second_values + tl.cast(block, tl.int64) * (HIDDEN * ROWS)
        weights = load_tile(value_pointers, neuron_mask[:, None], feature_mask[None, :], EVEN, EVEN)
        # Rounded as the hidden tensor would be on its way through memory.
        sums = dot(hidden.to(y.dtype.element_ty), weights, sums, PRECISION)

    write_tile(
        y, sums, second_bias, None, residual, None, token, feature, token_mask, feature_mask,
        y_token_stride, y_feature_stride, "none",
    )  # fmt: skip


def block_mlp(
    x: torch.Tensor,
    first: Blocks,
    second: Blocks,
    hidden_features: int,
    out_features: int,
    *,
    activation: str = "gelu",
    first_bias: torch.Tensor | None = None,
    second_bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """`act(x @ S1.T + first_bias) @ S2.T + second_bias + residual`.

    Args:
        x: [tokens, in_features], features adjacent; float32, float16 or bfloat16.
        first: S1 [hidden_features, in_features], with row pointers, stored in order.
        second: S2 [out_features, hidden_features], likewise; its blocks have as many columns as those of S1 have rows.
        hidden_features: rows of S1.
        out_features: rows of S2.
        activation: one of `epilogue.ACTIVATIONS`.
        first_bias: [hidden_features] or None.
        second_bias: [out_features] or None.
        residual: [tokens, out_features] or None.

    Returns:
        Contiguous [tokens, out_features] in the dtype of `x`. The hidden tensor is rounded to that dtype, as in memory.
    """
    y = x.new_empty(x.shape[0], out_features)
    if y.numel() == 0:
        return y
    residual = None if residual is None else residual.contiguous()
    biases = first_bias, second_bias
    precision = triton_support.precision(x.dtype)
    launch = mlp_launch(x, first, second, hidden_features, y, biases, residual, activation, precision)
    with triton_support.on_device(x):
        launch()
    return y


def mlp_launch(
    x: torch.Tensor,
    first: Blocks,
    second: Blocks,
    hidden_features: int,
    y: torch.Tensor,
    biases: tuple[torch.Tensor | None, torch.Tensor | None],
    residual: torch.Tensor | None,
    activation: str,
    precision: str,
) -> Launch:
    """The launch of `block_mlp_kernel` that writes `y`.

    The blocks must meet, see `triton_mlp_op.why_not`.
    """
    columns, width, rows = first.structure.columns, first.structure.rows, second.structure.rows
    tile, hidden_side = default_tile(x, columns, rows), _side(width)
    (tokens, in_features), out_features = x.shape, y.shape[1]
    sizes = ((in_features, columns), (columns, tile.depth), (hidden_features, hidden_side), (width, hidden_side))
    even = all(size % part == 0 for size, part in (*sizes, (out_features, rows), (rows, tile.outputs)))
    row_count = -(-out_features // rows)
    arguments = {
        "x": x,
        "first_values": first.values,
        "first_pointers": first.row_pointers,
        "first_columns": first.columns,
        "first_bias": biases[0],
        "second_values": second.values,
        "second_pointers": second.row_pointers,
        "second_columns": second.columns,
        "second_bias": biases[1],
        "residual": residual,
        "y": y,
        "tokens": tokens,
        "in_features": in_features,
        "hidden_features": hidden_features,
        "out_features": out_features,
        "row_count": row_count,
        "x_token_stride": x.stride(0),
        "x_feature_stride": x.stride(1),
        "y_token_stride": y.stride(0),
        "y_feature_stride": y.stride(1),
        "COLUMNS": columns,
        "HIDDEN": width,
        "ROWS": rows,
        "ACTIVATION": activation,
        "PRECISION": precision,
        "EVEN": even,
        "TOKENS": tile.tokens,
        "OUTPUTS": tile.outputs,
        "DEPTH": tile.depth,
        "WIDTH": hidden_side,
        "GROUP": tile.group,
    }
    programs = -(-tokens // tile.tokens) * row_count * -(-rows // tile.outputs)
    return Launch(block_mlp_kernel, (programs,), arguments, tile.warps, tile.stages)


def default_tile(x: torch.Tensor, columns: int, rows: int) -> Tile:
    """Half as many sums as in one layer, twice: of the hidden tile and of the outputs."""
    half = x.element_size() == 2
    tokens = min(128 if half else 64, triton_support.token_bucket(max(16, x.shape[0])))
    return Tile(tokens, min(64, _side(rows)), min(64 if half else 32, _side(columns)), warps=4 if half and tokens <= 64 else 8)


def _side(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())
