"""The product with small blocks: a step of the loop multiplies several blocks of a row at once.

Blocks of a row lie behind each other in memory, each with its inputs first, so several of them are one tile of weights, as
deep as all their inputs together. The inputs are gathered: runs as long as a block is wide, which are copied 16 bytes at a
time. So blocks 16 wide take a quarter of the steps, with products of tiles as deep as tensor cores like them.
"""

import triton
import triton.language as tl

from padst_compile.kernels.block.triton_parts import load_tile, outputs_of, row_range, tile_of
from padst_compile.kernels.dot import dot
from padst_compile.kernels.epilogue import write_tile


@triton.jit
def block_joined_kernel(
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
    EVEN_OUTPUTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    RUN: tl.constexpr,
):
    """One tile of `TOKENS` by `OUTPUTS`, as `triton.block_linear_kernel` computes it, whose arguments these are.

    Blocks divide the inputs. `DEPTH` may be any power of two from 16; `RUN` is one that divides `COLUMNS`.
    """
    value_input_stride: tl.constexpr = 1 if TRANSPOSED else ROWS
    value_output_stride: tl.constexpr = COLUMNS if TRANSPOSED else 1
    token_tile, row, part = tile_of(tl.program_id(0), tokens, row_count, ROWS, TOKENS, OUTPUTS, GROUP)
    token = token_tile * TOKENS + tl.arange(0, TOKENS)
    token_mask = token < tokens
    place_in_row, feature, feature_mask = outputs_of(row, part, out_features, ROWS, OUTPUTS)
    inner = tl.arange(0, DEPTH)
    read_token = token if TOKENS_ADJACENT else tl.minimum(token, tokens - 1)
    x += (read_token.to(tl.int64) * x_token_stride)[:, None]
    values += (place_in_row * value_output_stride)[None, :]

    first, last = row_range(row_pointers, row, BLOCKS_PER_ROW)
    depth = (last - first) * COLUMNS

    # The inputs and weights that a step multiplies are found in the step before, so that their loads can be in flight.
    source = _sources(columns + first, input_table, inner, depth, COLUMNS, RUN)
    weight = _weights(order, first, inner, depth, ROWS, COLUMNS, value_input_stride)
    sums = tl.zeros((TOKENS, OUTPUTS), tl.float32)
    for start in tl.range(0, depth, DEPTH):
        exists = start + inner < depth
        x_pointers = x + source[None, :] * x_feature_stride
        x_tile = load_tile(x_pointers, token_mask[:, None], exists[None, :], not TOKENS_ADJACENT, False)
        value_tile = load_tile(values + weight[:, None], exists[:, None], feature_mask[None, :], False, EVEN_OUTPUTS)
        sums = dot(x_tile, value_tile, sums, PRECISION)
        following = start + DEPTH + inner
        source = _sources(columns + first, input_table, following, depth, COLUMNS, RUN)
        weight = _weights(order, first, following, depth, ROWS, COLUMNS, value_input_stride)

    write_tile(
        y, sums, bias, gate, residual, output_table, token, feature, token_mask, feature_mask,
        y_token_stride, y_feature_stride, ACTIVATION,
    )  # fmt: skip


@triton.jit
def _sources(columns, table, position, depth, COLUMNS: tl.constexpr, RUN: tl.constexpr):
    """The features that the inputs of a row at `position` read, int64; `columns` points to the row's."""
    exists = position < depth
    source = tl.load(columns + position // COLUMNS, mask=exists, other=0) * COLUMNS + position % COLUMNS
    if table is None:
        source = tl.max_contiguous(tl.multiple_of(source, RUN), RUN)  # what the compiler cannot see behind a load
    else:
        source = tl.load(table + source, mask=exists, other=0)
    return source.to(tl.int64)


@triton.jit
def _weights(order, first, position, depth, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIDE: tl.constexpr):
    """Where the weights of the inputs of a row at `position` start in the values, int64."""
    slot = first + position // COLUMNS
    if order is not None:
        slot = tl.load(order + slot, mask=position < depth, other=0)
    return slot.to(tl.int64) * (ROWS * COLUMNS) + position % COLUMNS * STRIDE
