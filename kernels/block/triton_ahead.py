"""The product with inputs that come one by one: each step loads what the next one multiplies, while it multiplies itself.

A copy to shared memory that does not wait moves 4 bytes at least. Inputs of 16 bits that are gathered one at a time cannot be
copied so, and the compiler leaves their loads where they are: each step waits for its own, and only weights are in flight.
Here the loop carries a tile of inputs in registers, and indices are read two steps ahead. That costs registers, hence programs
that run at once; which form is faster is for the tuner to measure.
"""

import triton
import triton.language as tl

from padst_compile.kernels.block.triton_parts import entry_of, load_tile, outputs_of, row_range, tile_of
from padst_compile.kernels.dot import dot
from padst_compile.kernels.epilogue import write_tile


@triton.jit
def block_ahead_kernel(
    x,
    values,
    row_pointers,
    columns,
    order,
    bias,
    gate,
    residual,
    input_table,
    output_table,
    y,
    tokens,
    in_features,
    out_features,
    row_count,
    x_token_stride,
    x_feature_stride,
    y_token_stride,
    y_feature_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCKS_PER_ROW: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TOKENS_ADJACENT: tl.constexpr,
    EVEN_INPUTS: tl.constexpr,
    EVEN_OUTPUTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of `TOKENS` by `OUTPUTS`, as `triton.block_linear_kernel` computes it, whose arguments these are."""
    steps: tl.constexpr = (COLUMNS + DEPTH - 1) // DEPTH
    value_input_stride: tl.constexpr = 1 if TRANSPOSED else ROWS
    value_output_stride: tl.constexpr = COLUMNS if TRANSPOSED else 1
    token_tile, row, part = tile_of(tl.program_id(0), tokens, row_count, ROWS, TOKENS, OUTPUTS, GROUP)
    token = token_tile * TOKENS + tl.arange(0, TOKENS)
    token_mask = token < tokens
    place_in_row, feature, feature_mask = outputs_of(row, part, out_features, ROWS, OUTPUTS)
    inner = tl.arange(0, DEPTH)
    x += (tl.minimum(token, tokens - 1).to(tl.int64) * x_token_stride)[:, None]
    values += (inner * value_input_stride)[:, None] + (place_in_row * value_output_stride)[None, :]

    first, last = row_range(row_pointers, row, BLOCKS_PER_ROW)

    begin = first * steps
    source = _sources(columns, input_table, begin, last, inner, in_features, COLUMNS, DEPTH)
    x_tile = _inputs(x, source, x_feature_stride, EVEN_INPUTS)
    source = _sources(columns, input_table, begin + 1, last, inner, in_features, COLUMNS, DEPTH)
    column, slot = entry_of(columns, first, last), entry_of(order, first, last)
    sums = tl.zeros((TOKENS, OUTPUTS), tl.float32)
    for step in tl.range(begin, last * steps):
        start = (step % steps) * DEPTH
        value_pointers = values + (slot.to(tl.int64) * (ROWS * COLUMNS) + start * value_input_stride)
        exists = (start + inner < COLUMNS) & (column * COLUMNS + start + inner < in_features)
        value_tile = load_tile(value_pointers, exists[:, None], feature_mask[None, :], EVEN_INPUTS, EVEN_OUTPUTS)
        next_tile = _inputs(x, source, x_feature_stride, EVEN_INPUTS)
        sums = dot(x_tile, value_tile, sums, PRECISION)
        x_tile = next_tile
        following = (step + 1) // steps
        column, slot = entry_of(columns, following, last), entry_of(order, following, last)
        source = _sources(columns, input_table, step + 2, last, inner, in_features, COLUMNS, DEPTH)

    write_tile(
        y, sums, bias, gate, residual, output_table, token, feature, token_mask, feature_mask,
        y_token_stride, y_feature_stride, ACTIVATION,
    )  # fmt: skip


@triton.jit
def _sources(columns, table, step, last, inner, in_features, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    """The features that a step reads, int64; -1 where a block or the features end before its inputs do."""
    steps: tl.constexpr = (COLUMNS + DEPTH - 1) // DEPTH
    place_in_block = (step % steps) * DEPTH + inner
    source = entry_of(columns, step // steps, last) * COLUMNS + place_in_block
    exists = (place_in_block < COLUMNS) & (source < in_features)
    if table is not None:
        source = tl.load(table + source, mask=exists, other=0)
    return tl.where(exists, source, -1).to(tl.int64)


@triton.jit
def _inputs(x, source, x_feature_stride, WHOLE: tl.constexpr):
    """A tile of inputs; zeros for those that do not exist, of which there are none if `WHOLE`."""
    return load_tile(x + source[None, :] * x_feature_stride, True, (source >= 0)[None, :], True, WHOLE)
