"""Triton kernels for free diagonals: one shifted multiply-add per diagonal, on CUDA cores.

Along a diagonal the weights, the inputs and the outputs are all neighbours, so loads are contiguous in either layout without
any index table. Inputs that were permuted are gathered, which costs nothing where activations are feature-major.

S.T is made of diagonals too, so the input gradient is the same kernel with the sides exchanged. Call the side with fewer
features the short one, of `length`, the other the long one, of `period`: a diagonal of offset o ties place k of the short side
to `(k + o) % period` of the long one, and its weight lies at k.

Sums are in float32. No kernel adds to what another program writes, so results are the same in every run.

What the kernels take: `x`, `short`, `long` and `y` point to activations, whose strides are given beside them; `values` to
[diagonals, length] and `offsets` to ascending int32 [diagonals], both contiguous; `read` is the input permutation, `write` the
inverse of the output permutation, and `bias`, `gate` and `residual` are those of `epilogue.write_tile`: each of them a pointer
or None. TOKENS, OUTPUTS and DEPTH are those of the tile: powers of two.
"""

import dataclasses
import math

import torch
import triton
import triton.language as tl

from padst_compile.kernels import triton_support
from padst_compile.kernels.diagonal.tiles import default_tile
from padst_compile.kernels.epilogue import write_tile
from padst_compile.kernels.extras import Extras
from padst_compile.kernels.launch import Tile, tile_for
from padst_compile.kernels.token_shares import TokenShares, partial_sums, share_tokens, total
from padst_compile.kernels.triton_product import new_outputs
from padst_compile.kernels.triton_support import Launch
from padst_compile.structures import Diagonal


@triton.jit
def _count_below(offsets, diagonals, bound, period, CHUNK: tl.constexpr):
    """How many diagonals there are below `bound` >= 0, where each comes again every `period`."""
    turns = bound // period
    count = turns * diagonals
    for start in range(0, diagonals, CHUNK):
        place = start + tl.arange(0, CHUNK)
        offset = tl.load(offsets + place, mask=place < diagonals, other=period)
        count += tl.sum((offset < bound - turns * period).to(tl.int32), 0)
    return count


@triton.jit
def diagonal_kernel(
    x, values, offsets, read, write, bias, gate, residual, y,
    tokens, rows, length, period, diagonals, x_token_stride, x_feature_stride, y_token_stride, y_feature_stride,
    TO_SHORT: tl.constexpr, ACTIVATION: tl.constexpr,
    TOKENS: tl.constexpr, OUTPUTS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile of tokens times some rows, from the long side to the short one or back; `write` says where rows go in y."""
    row_tiles = tl.cdiv(rows, OUTPUTS)
    token = tl.program_id(0) // row_tiles * TOKENS + tl.arange(0, TOKENS)
    lowest = tl.program_id(0) % row_tiles * OUTPUTS
    row = lowest + tl.arange(0, OUTPUTS)
    token_mask, row_mask = token < tokens, row < rows
    x += token.to(tl.int64)[:, None, None] * x_token_stride
    if TO_SHORT:
        first, last = 0, diagonals
    else:
        # Row r meets the diagonals in (r - length, r], around the period: only those that some row here meets are visited.
        first = _count_below(offsets, diagonals, period + lowest - length + 1, period, 1024)
        last = _count_below(offsets, diagonals, period + lowest + OUTPUTS, period, 1024)
        last = tl.minimum(last, first + diagonals)

    # Outputs come last, because along them neighbours in the tile are neighbours in memory.
    sums = tl.zeros((TOKENS, DEPTH, OUTPUTS), dtype=tl.float32)
    for start in range(first, last, DEPTH):
        turn = start + tl.arange(0, DEPTH)
        diagonal = turn % tl.maximum(diagonals, 1)
        offset = tl.load(offsets + diagonal, mask=turn < last, other=0)[:, None]
        if TO_SHORT:
            source = row[None, :] + offset
            source = tl.where(source >= period, source - period, source)
            place = row[None, :]
        else:
            source = row[None, :] - offset
            source = tl.where(source < 0, source + period, source)
            place = source
        live = row_mask[None, :] & (turn < last)[:, None] & (place < length)
        weights = tl.load(values + diagonal[:, None] * length + place, mask=live, other=0.0)
        column = source if read is None else tl.load(read + source, mask=live, other=0)
        places = x + column.to(tl.int64)[None, :, :] * x_feature_stride
        inputs = tl.load(places, mask=token_mask[:, None, None] & live[None, :, :], other=0.0)
        sums += inputs.to(tl.float32) * weights.to(tl.float32)[None, :, :]

    write_tile(
        y, tl.sum(sums, 1), bias, gate, residual, write, token, row, token_mask, row_mask,
        y_token_stride, y_feature_stride, ACTIVATION,
    )  # fmt: skip


@triton.jit
def diagonal_value_gradient_kernel(
    short, long, offsets, result,
    tokens, length, period, diagonals, share,
    short_token_stride, short_feature_stride, long_token_stride, long_feature_stride, result_share_stride,
    TOKENS: tl.constexpr, OUTPUTS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Some places of some diagonals, summed over one share of the tokens."""
    place = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    diagonal = tl.program_id(1) * DEPTH + tl.arange(0, DEPTH)
    place_mask, diagonal_mask = place < length, diagonal < diagonals
    live = diagonal_mask[:, None] & place_mask[None, :]
    source = place[None, :] + tl.load(offsets + diagonal, mask=diagonal_mask, other=0)[:, None]
    source = tl.where(source >= period, source - period, source)
    short += place.to(tl.int64)[None, :] * short_feature_stride
    long += source.to(tl.int64)[None, :, :] * long_feature_stride

    sums = tl.zeros((TOKENS, DEPTH, OUTPUTS), dtype=tl.float32)
    begin = tl.program_id(2) * share
    end = tl.minimum(begin + share, tokens)
    for first in range(begin, end, TOKENS):
        token = first + tl.arange(0, TOKENS)
        token_mask, step = token < end, token.to(tl.int64)
        near = tl.load(short + step[:, None] * short_token_stride, mask=token_mask[:, None] & place_mask[None, :], other=0.0)
        places = long + step[:, None, None] * long_token_stride
        far = tl.load(places, mask=token_mask[:, None, None] & live[None, :, :], other=0.0)
        sums += near.to(tl.float32)[:, None, :] * far.to(tl.float32)

    result += tl.program_id(2).to(tl.int64) * result_share_stride + diagonal[:, None] * length + place[None, :]
    tl.store(result, tl.sum(sums, 0).to(result.dtype.element_ty), mask=live)


_NOTHING = Extras()


def diagonal_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    offsets: torch.Tensor,
    out_features: int,
    extras: Extras = _NOTHING,
    *,
    feature_major: bool = False,
) -> torch.Tensor:
    """`act(permute(permute(x, input_permutation) @ S.T, output_permutation) + bias) * gate + residual`.

    Args:
        x: [..., in_features] with any strides; float32, float16 or bfloat16.
        values: contiguous [diagonals, min(in_features, out_features)] in the dtype of `x`.
        offsets: contiguous int32 [diagonals], ascending.
        out_features: rows of S.
        extras: bias [out_features], int32 permutations, and gate and residual [tokens, out_features], all optional.
        feature_major: whether tokens shall be adjacent in the result.

    Returns:
        [..., out_features] in the dtype of `x`, and no view.
    """
    result = new_outputs(x, out_features, feature_major=feature_major)
    if result.numel() == 0:
        return result
    x, y = x.reshape(-1, x.shape[-1]), result.view(-1, out_features)
    problem = triton_support.problem(
        "diagonal_forward",
        Diagonal().to_string(),
        x,
        values,
        out_features,
        permuted=extras.permuted,
        epilogue=extras.epilogue,
        output_layout="feature" if feature_major else "token",
    )
    to_short = x.shape[1] >= out_features
    launch = linear_launch(x, values, offsets, y, extras, tile_for(problem, default_tile), to_short=to_short)
    with triton_support.on_device(x):
        launch()
    return result


def diagonal_input_gradient(grad: torch.Tensor, values: torch.Tensor, offsets: torch.Tensor, in_features: int) -> torch.Tensor:
    """`grad @ S`, contiguous [tokens, in_features]; the same bits at every call.

    Args:
        grad: [tokens, out_features] with any strides.
        values: contiguous [diagonals, min(in_features, out_features)] in the dtype of `grad`.
        offsets: contiguous int32 [diagonals], ascending.
        in_features: columns of S.
    """
    result = grad.new_empty(grad.shape[0], in_features)
    if result.numel() == 0:
        return result
    problem = triton_support.problem("diagonal_input_gradient", Diagonal().to_string(), grad, values, grad.shape[1])
    tile = tile_for(dataclasses.replace(problem, in_features=in_features), default_tile)
    launch = linear_launch(grad, values, offsets, result, _NOTHING, tile, to_short=in_features < grad.shape[1])
    with triton_support.on_device(grad):
        launch()
    return result


def linear_launch(
    x: torch.Tensor,
    values: torch.Tensor,
    offsets: torch.Tensor,
    y: torch.Tensor,
    extras: Extras,
    tile: Tile,
    *,
    to_short: bool,
) -> Launch:
    """The launch of `diagonal_kernel` that writes `y`; `to_short` says that `y` is on the short side."""
    extras = extras.laid_out_like(y)
    tokens, rows = y.shape
    arguments = {
        "x": x,
        "values": values,
        "offsets": offsets,
        "read": extras.input_permutation,
        "write": extras.inverse_output_permutation(),
        "bias": extras.bias,
        "gate": extras.gate,
        "residual": extras.residual,
        "y": y,
        "tokens": tokens,
        "rows": rows,
        "length": min(rows, x.shape[1]),
        "period": max(rows, x.shape[1]),
        "diagonals": offsets.numel(),
        "x_token_stride": x.stride(0),
        "x_feature_stride": x.stride(1),
        "y_token_stride": y.stride(0),
        "y_feature_stride": y.stride(1),
        "TO_SHORT": to_short,
        "ACTIVATION": extras.activation,
        "TOKENS": tile.tokens,
        "OUTPUTS": tile.outputs,
        "DEPTH": tile.depth,
    }
    grid = (triton.cdiv(tokens, tile.tokens) * triton.cdiv(rows, tile.outputs),)
    return Launch(diagonal_kernel, grid, arguments, tile.warps, tile.stages)


def diagonal_value_gradient(grad: torch.Tensor, x: torch.Tensor, values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """The active entries of `grad.T @ x`, packed like `values`; the same bits at every call.

    Args:
        grad: [tokens, out_features] with any strides.
        x: [tokens, in_features] with any strides, in the dtype of `grad`.
        values: [diagonals, min(in_features, out_features)], of which only the shape and dtype matter.
        offsets: contiguous int32 [diagonals].
    """
    if x.shape[0] == 0 or values.numel() == 0:
        return torch.zeros_like(values)
    problem = triton_support.problem("diagonal_value_gradient", Diagonal().to_string(), x, values, grad.shape[1])
    tile = tile_for(problem, default_tile)
    shares = share_tokens(x.shape[0], tile.tokens, math.prod(_value_tiles(values, tile)))
    sums = partial_sums(shares, values)
    launch = value_gradient_launch(grad, x, offsets, sums, shares, tile)
    with triton_support.on_device(x):
        launch()
    return total(sums, values.dtype)


def value_gradient_launch(
    grad: torch.Tensor, x: torch.Tensor, offsets: torch.Tensor, sums: torch.Tensor, shares: TokenShares, tile: Tile
) -> Launch:
    """The launch of `diagonal_value_gradient_kernel` that writes `sums` [shares, diagonals, length]."""
    short, long = (grad, x) if x.shape[1] >= grad.shape[1] else (x, grad)
    arguments = {
        "short": short,
        "long": long,
        "offsets": offsets,
        "result": sums,
        "tokens": x.shape[0],
        "length": short.shape[1],
        "period": long.shape[1],
        "diagonals": offsets.numel(),
        "share": shares.size,
        "short_token_stride": short.stride(0),
        "short_feature_stride": short.stride(1),
        "long_token_stride": long.stride(0),
        "long_feature_stride": long.stride(1),
        "result_share_stride": sums.stride(0),
        "TOKENS": tile.tokens,
        "OUTPUTS": tile.outputs,
        "DEPTH": tile.depth,
    }
    grid = (*_value_tiles(sums[0], tile), shares.count)
    return Launch(diagonal_value_gradient_kernel, grid, arguments, tile.warps, tile.stages)


def _value_tiles(values: torch.Tensor, tile: Tile) -> tuple[int, int]:
    diagonals, length = values.shape
    return triton.cdiv(length, tile.outputs), triton.cdiv(diagonals, tile.depth)
