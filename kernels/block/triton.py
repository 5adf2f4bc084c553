"""Block-sparse products in Triton: `Y = act(permute(permute(X) @ S.T) + bias) * gate + residual`, and both gradients.

Tokens are the M side of every product of tiles: the tensor cores of Hopper multiply 64 rows at least, and a block may have
fewer. One program computes a tile of tokens by outputs within one block row; its loop runs over the blocks of the row, or
over parts of them. The column of the next block is loaded one step ahead and carried through the loop: read at the top of
the loop, it would cost the software pipeline two of its stages. The gradient of the inputs is the same kernel on the blocks of
S.T, which it reads where they lie. `reference.py` has the product in plain words.

What keeps no pipeline in this form are inputs of 16 bits that come one by one, permuted and with features adjacent, or at odd
places: copies that do not wait move 4 bytes at least, so only weights are in flight. `triton_ahead.py` is a form for these.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from padst_compile.kernels import triton_support
from padst_compile.kernels.block.tiles import default_tile
from padst_compile.kernels.block.triton_ahead import block_ahead_kernel
from padst_compile.kernels.block.triton_joined import block_joined_kernel
from padst_compile.kernels.block.triton_parts import entry_of, load_tile, outputs_of, row_range, tile_of
from padst_compile.kernels.dot import dot
from padst_compile.kernels.epilogue import write_tile
from padst_compile.kernels.extras import Extras
from padst_compile.kernels.launch import Problem, Tile, tile_for
from padst_compile.kernels.token_shares import TokenShares, partial_sums, share_tokens, total
from padst_compile.kernels.triton_product import new_outputs
from padst_compile.kernels.triton_support import Launch
from padst_compile.structures import Block, Topology


@triton.jit
def block_linear_kernel(
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
    DESCRIPTOR: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of `TOKENS` by `OUTPUTS`; the grid has one axis, of token tiles times output tiles.

    Args:
        x: pointer to [tokens, in_features], or its descriptor in steps of `TOKENS` by `DEPTH`.
        values: pointer to [blocks, COLUMNS, ROWS], or if `TRANSPOSED` [blocks, ROWS, COLUMNS]; or the descriptor of its rows.
        row_pointers: pointer to int32 [row_count + 1]; read where `BLOCKS_PER_ROW` is 0.
        columns: pointer to int32 [blocks].
        order: pointer to int32 [blocks], where in `values` each block lies, or None for the same order.
        bias: pointer to [out_features], or None.
        gate: pointer to a tensor laid out like `y`, or None.
        residual: pointer to a tensor laid out like `y`, or None.
        input_table: pointer to int32 [in_features], the input that each column of S reads, or None.
        output_table: pointer to int32 [out_features], the output that each row of S writes, or None.
        y: pointer to [tokens, out_features].
        tokens: rows of `x` and `y`.
        in_features: columns of `x`.
        out_features: columns of `y`.
        row_count: block rows.
        x_token_stride: of `x`, in elements, like the three after it.
        x_feature_stride: of `x`.
        y_token_stride: of `y`.
        y_feature_stride: of `y`.
        ROWS: outputs of a block.
        COLUMNS: inputs of a block.
        BLOCKS_PER_ROW: blocks of every row, or 0 where rows hold different numbers of them.
        TRANSPOSED: whether blocks are stored with their outputs first.
        TOKENS_ADJACENT: whether tokens are adjacent in `x` and features are not.
        EVEN_INPUTS: whether blocks divide the inputs, and `DEPTH` divides blocks.
        EVEN_OUTPUTS: whether blocks divide the outputs, and `OUTPUTS` divides blocks.
        ACTIVATION: see `epilogue.activate`.
        PRECISION: how float32 is multiplied ("ieee", "tf32", "tf32x3").
        DESCRIPTOR: whether `x` and `values` are descriptors.
        TOKENS: tokens of the tile; a power of two from 16, like the next two.
        OUTPUTS: outputs of the tile.
        DEPTH: inputs of a step.
        GROUP: token tiles that run next to each other.
    """
    steps: tl.constexpr = (COLUMNS + DEPTH - 1) // DEPTH  # of one block
    value_input_stride: tl.constexpr = 1 if TRANSPOSED else ROWS
    value_output_stride: tl.constexpr = COLUMNS if TRANSPOSED else 1

    token_tile, row, part = tile_of(tl.program_id(0), tokens, row_count, ROWS, TOKENS, OUTPUTS, GROUP)
    token = token_tile * TOKENS + tl.arange(0, TOKENS)
    token_mask = token < tokens
    place_in_row, feature, feature_mask = outputs_of(row, part, out_features, ROWS, OUTPUTS)
    inner = tl.arange(0, DEPTH)

    if not DESCRIPTOR:
        # Tokens that do not exist read one that does, which spares the loop a mask; where tokens are adjacent, that would
        # hide from the compiler that they are.
        read_token = token if TOKENS_ADJACENT else tl.minimum(token, tokens - 1)
        x += (read_token.to(tl.int64) * x_token_stride)[:, None]
        values += (inner * value_input_stride)[:, None] + (place_in_row * value_output_stride)[None, :]

    first, last = row_range(row_pointers, row, BLOCKS_PER_ROW)

    # What the first step reads, then in each step what the next one does: its column, and its inputs where they are permuted.
    column, slot = entry_of(columns, first, last), entry_of(order, first, last)
    source = inner.to(tl.int64)
    if input_table is not None:
        source = _permuted_inputs(input_table, column, inner, in_features, COLUMNS)

    sums = tl.zeros((TOKENS, OUTPUTS), tl.float32)
    for step in tl.range(first * steps, last * steps):
        start = (step % steps) * DEPTH
        if DESCRIPTOR:
            x_tile = x.load([token_tile * TOKENS, column * COLUMNS + start])
            if TRANSPOSED:
                value_tile = values.load([slot * ROWS + part * OUTPUTS, start]).T
            else:
                value_tile = values.load([slot * COLUMNS + start, part * OUTPUTS])
        else:
            if input_table is None:
                x_pointers = x + ((column * COLUMNS + start).to(tl.int64) + source)[None, :] * x_feature_stride
            else:
                x_pointers = x + source[None, :] * x_feature_stride
            value_pointers = values + (slot.to(tl.int64) * (ROWS * COLUMNS) + start * value_input_stride)
            exists = (start + inner < COLUMNS) & (column * COLUMNS + start + inner < in_features)
            x_tile = load_tile(x_pointers, token_mask[:, None], exists[None, :], not TOKENS_ADJACENT, EVEN_INPUTS)
            value_tile = load_tile(value_pointers, exists[:, None], feature_mask[None, :], EVEN_INPUTS, EVEN_OUTPUTS)
        sums = dot(x_tile, value_tile, sums, PRECISION)

        following = (step + 1) // steps
        column, slot = entry_of(columns, following, last), entry_of(order, following, last)
        if input_table is not None:
            next_inner = ((step + 1) % steps) * DEPTH + inner
            source = _permuted_inputs(input_table, column, next_inner, in_features, COLUMNS)

    write_tile(
        y, sums, bias, gate, residual, output_table, token, feature, token_mask, feature_mask,
        y_token_stride, y_feature_stride, ACTIVATION,
    )  # fmt: skip


@triton.jit
def block_value_gradient_kernel(
    x,
    grad,
    row_pointers,
    columns,
    sums,
    tokens,
    in_features,
    out_features,
    row_count,
    blocks,
    share,
    x_token_stride,
    x_feature_stride,
    grad_token_stride,
    grad_feature_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HALVINGS: tl.constexpr,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """A tile of `DEPTH` by `OUTPUTS` of one active block of `x.T @ grad`, over one share of the tokens.

    The grid has two axes: tiles of all blocks, and shares of the tokens. Every program writes a place of its own.

    Args:
        x: pointer to [tokens, in_features].
        grad: pointer to [tokens, out_features].
        row_pointers: pointer to int32 [row_count + 1].
        columns: pointer to int32 [blocks].
        sums: pointer to [shares, blocks, COLUMNS, ROWS].
        tokens: rows of `x` and `grad`.
        in_features: columns of `x`.
        out_features: columns of `grad`.
        row_count: block rows.
        blocks: active blocks.
        share: tokens of one share, a multiple of `TOKENS`.
        x_token_stride: of `x`, in elements, like the three after it.
        x_feature_stride: of `x`.
        grad_token_stride: of `grad`.
        grad_feature_stride: of `grad`.
        ROWS: outputs of a block.
        COLUMNS: inputs of a block.
        HALVINGS: how often `row_count` must be halved to reach one.
        PRECISION: how float32 is multiplied ("ieee", "tf32", "tf32x3").
        TOKENS: tokens of a step; a power of two from 16, like the next two.
        OUTPUTS: outputs of the tile.
        DEPTH: inputs of the tile.
    """
    output_parts: tl.constexpr = (ROWS + OUTPUTS - 1) // OUTPUTS
    parts: tl.constexpr = output_parts * ((COLUMNS + DEPTH - 1) // DEPTH)
    block, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    row = _row_of_block(row_pointers, block, row_count, HALVINGS)
    column = tl.load(columns + block)

    inner = (part // output_parts) * DEPTH + tl.arange(0, DEPTH)
    place_in_row = (part % output_parts) * OUTPUTS + tl.arange(0, OUTPUTS)
    source, feature = column * COLUMNS + inner, row * ROWS + place_in_row
    source_mask = (inner < COLUMNS) & (source < in_features)
    feature_mask = (place_in_row < ROWS) & (feature < out_features)

    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, tokens)
    token = tl.arange(0, TOKENS)
    x += (source.to(tl.int64) * x_feature_stride)[:, None] + (token.to(tl.int64) * x_token_stride)[None, :]
    grad += (token.to(tl.int64) * grad_token_stride)[:, None] + (feature.to(tl.int64) * grad_feature_stride)[None, :]
    tile = tl.zeros((DEPTH, OUTPUTS), tl.float32)
    for start in tl.range(begin, end, TOKENS):
        exists = start + token < end
        x_tile = tl.load(x + tl.cast(start, tl.int64) * x_token_stride, mask=source_mask[:, None] & exists[None, :], other=0.0)
        grad_tile = tl.load(
            grad + tl.cast(start, tl.int64) * grad_token_stride, mask=exists[:, None] & feature_mask[None, :], other=0.0
        )
        tile = dot(x_tile, grad_tile, tile, PRECISION)

    # Padding of edge blocks is written too, as zeros.
    slot = tl.program_id(1).to(tl.int64) * blocks + block
    places = slot * (COLUMNS * ROWS) + (inner * ROWS)[:, None] + place_in_row[None, :]
    mask = (inner < COLUMNS)[:, None] & (place_in_row < ROWS)[None, :]
    tl.store(sums + places, tile.to(sums.dtype.element_ty), mask=mask)


@triton.jit
def _permuted_inputs(table, column, inner, in_features, COLUMNS: tl.constexpr):
    """The inputs that `inner` of block column `column` read, int64; 0 beyond the block or the features."""
    place = column * COLUMNS + inner
    return tl.load(table + place, mask=(inner < COLUMNS) & (place < in_features), other=0).to(tl.int64)


@triton.jit
def _row_of_block(row_pointers, block, row_count, HALVINGS: tl.constexpr):
    """The last row whose pointer is at most `block`, by bisection: the row that holds the block."""
    low, high = 0, row_count
    for _ in tl.static_range(HALVINGS):
        middle = (low + high) // 2
        before = tl.load(row_pointers + middle) <= block
        low, high = tl.where(before, middle, low), tl.where(before, high, middle)
    return low


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The blocks of a product, as `block_linear_kernel` reads them.

    Args:
        structure: of a block, as the product sees it.
        values: contiguous [blocks, columns, rows], or if `transposed` [blocks, rows, columns].
        row_pointers: int32 [block rows + 1].
        columns: int32 [blocks].
        order: int32 [blocks], where each block lies in `values`, or None for the same order.
        transposed: whether blocks are stored with their outputs first.
        equal_rows: whether every block row is known to hold equally many, whatever the pointers point to.
    """

    structure: Block
    values: torch.Tensor
    row_pointers: torch.Tensor
    columns: torch.Tensor
    order: torch.Tensor | None = None
    transposed: bool = False
    equal_rows: bool = False


_NOTHING = Extras()
_LONGEST_RUN = 16  # elements: 16 bytes and more in every dtype


def block_linear(
    x: torch.Tensor,
    blocks: Blocks,
    out_features: int,
    extras: Extras = _NOTHING,
    *,
    kernel: str = "block_forward",
    feature_major: bool = False,
) -> torch.Tensor:
    """`act(permute(permute(x, input_permutation) @ S.T, output_permutation) + bias) * gate + residual`.

    Args:
        x: [..., in_features] with any strides; float32, float16 or bfloat16.
        blocks: S, in the dtype of `x`.
        out_features: rows of S.
        extras: bias [out_features], int32 permutations, and gate and residual [tokens, out_features], all optional.
        kernel: the name of the problem.
        feature_major: whether tokens shall be adjacent in the result.

    Returns:
        [..., out_features] in the dtype of `x`, and no view.
    """
    result = new_outputs(x, out_features, feature_major=feature_major)
    if result.numel() == 0:
        return result
    x, y = x.reshape(-1, x.shape[-1]), result.view(-1, out_features)
    problem = triton_support.problem(
        kernel,
        blocks.structure.to_string(),
        x,
        blocks.values,
        out_features,
        permuted=extras.permuted,
        epilogue=extras.epilogue,
        output_layout="feature" if feature_major else "token",
    )
    launch = linear_launch(x, blocks, y, extras, problem, tile_for(problem, default_tile))
    with triton_support.on_device(x):
        launch()
    return result


def linear_launch(x: torch.Tensor, blocks: Blocks, y: torch.Tensor, extras: Extras, problem: Problem, tile: Tile) -> Launch:
    """The launch that writes `y`; the variants "descriptor" and "joined" fall back to "pointer" where they do not fit."""
    extras = extras.laid_out_like(y)
    rows, columns = blocks.structure.rows, blocks.structure.columns
    (tokens, in_features), out_features = x.shape, y.shape[1]
    row_count = -(-out_features // rows)
    whole = in_features % columns == 0
    joined = tile.variant == "joined" and whole
    even_inputs = whole and columns % tile.depth == 0
    descriptor = tile.variant == "descriptor" and even_inputs and _describable(x, blocks, extras)
    arguments = {
        "x": TensorDescriptor.from_tensor(x, [tile.tokens, tile.depth]) if descriptor else x,
        "values": _describe_values(blocks, tile) if descriptor else blocks.values,
        "row_pointers": blocks.row_pointers,
        "columns": blocks.columns,
        "order": blocks.order,
        "bias": extras.bias,
        "gate": extras.gate,
        "residual": extras.residual,
        "input_table": extras.input_permutation,
        "output_table": extras.inverse_output_permutation(),
        "y": y,
        "tokens": tokens,
        "in_features": in_features,
        "out_features": out_features,
        "row_count": row_count,
        "x_token_stride": x.stride(0),
        "x_feature_stride": x.stride(1),
        "y_token_stride": y.stride(0),
        "y_feature_stride": y.stride(1),
        "ROWS": rows,
        "COLUMNS": columns,
        "BLOCKS_PER_ROW": _constant_count(blocks, row_count, tile, joined=joined),
        "TRANSPOSED": blocks.transposed,
        "TOKENS_ADJACENT": triton_support.layout(x) == "feature",
        "EVEN_OUTPUTS": out_features % rows == 0 and rows % tile.outputs == 0,
        "ACTIVATION": extras.activation,
        "PRECISION": problem.precision,
        "TOKENS": tile.tokens,
        "OUTPUTS": tile.outputs,
        "DEPTH": tile.depth,
        "GROUP": tile.group,
    }
    programs = -(-tokens // tile.tokens) * row_count * -(-rows // tile.outputs)
    if joined:
        arguments["RUN"] = math.gcd(columns, _LONGEST_RUN)
        return Launch(block_joined_kernel, (programs,), arguments, tile.warps, tile.stages)
    arguments["EVEN_INPUTS"] = even_inputs
    if tile.variant == "ahead":
        return Launch(block_ahead_kernel, (programs,), arguments, tile.warps, tile.stages)
    arguments["DESCRIPTOR"] = descriptor
    return Launch(block_linear_kernel, (programs,), arguments, tile.warps, tile.stages)


def block_value_gradient(
    structure: Block, x: torch.Tensor, grad: torch.Tensor, values: torch.Tensor, topology: Topology
) -> torch.Tensor:
    """The active blocks of `grad.T @ x`, packed like `values`; the same bits at every call.

    Args:
        structure: of the blocks.
        x: [tokens, in_features], any strides.
        grad: [tokens, out_features], any strides, in the dtype of `x`.
        values: [blocks, columns, rows], of which only the shape and dtype matter.
        topology: row pointers and columns.
    """
    if x.shape[0] == 0 or values.numel() == 0:
        return torch.zeros_like(values)
    problem = triton_support.problem("block_value_gradient", structure.to_string(), x, values, grad.shape[1])
    tile = tile_for(problem, default_tile)
    shares = share_tokens(x.shape[0], tile.tokens, values.shape[0] * _tiles_per_block(structure, tile))
    sums = partial_sums(shares, values)
    launch = value_gradient_launch(structure, x, grad, topology, sums, shares, problem, tile)
    with triton_support.on_device(x):
        launch()
    return total(sums, values.dtype)


def value_gradient_launch(
    structure: Block,
    x: torch.Tensor,
    grad: torch.Tensor,
    topology: Topology,
    sums: torch.Tensor,
    shares: TokenShares,
    problem: Problem,
    tile: Tile,
) -> Launch:
    """The launch of `block_value_gradient_kernel` that writes `sums` [shares, blocks, columns, rows]."""
    row_pointers, columns = topology
    row_count = row_pointers.numel() - 1
    arguments = {
        "x": x,
        "grad": grad,
        "row_pointers": row_pointers,
        "columns": columns,
        "sums": sums,
        "tokens": x.shape[0],
        "in_features": x.shape[1],
        "out_features": grad.shape[1],
        "row_count": row_count,
        "blocks": columns.numel(),
        "share": shares.size,
        "x_token_stride": x.stride(0),
        "x_feature_stride": x.stride(1),
        "grad_token_stride": grad.stride(0),
        "grad_feature_stride": grad.stride(1),
        "ROWS": structure.rows,
        "COLUMNS": structure.columns,
        "HALVINGS": (row_count - 1).bit_length(),
        "PRECISION": problem.precision,
        "TOKENS": tile.tokens,
        "OUTPUTS": tile.outputs,
        "DEPTH": tile.depth,
    }
    grid = (columns.numel() * _tiles_per_block(structure, tile), shares.count)
    return Launch(block_value_gradient_kernel, grid, arguments, tile.warps, tile.stages)


def _constant_count(blocks: Blocks, row_count: int, tile: Tile, *, joined: bool) -> int:
    """How many blocks every row holds, where a constant makes better code, else 0.

    It does where all of a row is one step, which then needs no loop, and where blocks are joined. Before a loop over whole
    blocks it saves two loads, and takes more registers on some GPUs.
    """
    if not blocks.equal_rows:
        return 0
    count = blocks.columns.numel() // row_count
    return count if joined or count * -(-blocks.structure.columns // tile.depth) == 1 else 0


def _tiles_per_block(structure: Block, tile: Tile) -> int:
    return -(-structure.columns // tile.depth) * -(-structure.rows // tile.outputs)


def _describable(x: torch.Tensor, blocks: Blocks, extras: Extras) -> bool:
    """Whether the hardware can copy tiles of both operands: rows that start at multiples of 16 bytes, and no gather."""
    row_bytes = (x.stride(0) * x.element_size(), blocks.values.shape[2] * x.element_size())
    starts = (x.data_ptr(), blocks.values.data_ptr())
    aligned = all(number % 16 == 0 for number in (*row_bytes, *starts))
    return aligned and x.stride(1) == 1 and blocks.values.numel() > 0 and extras.input_permutation is None


def _describe_values(blocks: Blocks, tile: Tile) -> TensorDescriptor:
    rows = blocks.values.view(-1, blocks.values.shape[2])
    return TensorDescriptor.from_tensor(rows, [tile.outputs, tile.depth] if blocks.transposed else [tile.depth, tile.outputs])
