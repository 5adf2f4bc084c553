"""Triton kernels for N:M: a gather and a dense dot where rows share their choice, else one multiply-add per weight.

Two forms multiply. In `dot`, a program takes rows of one group: it gathers the inputs that they share and multiplies on tensor
cores, tokens on the M side, so that Hopper's wgmma takes groups of 16 rows already. In `gather`, every row reads inputs of its
own and nothing is shared, so CUDA cores multiply and the first-level cache sets the pace, one element for each product.

Activations have any strides. Where they are feature-major, neighbouring tokens are neighbours in memory: a gather of features
reads whole sectors, and permutations on either side cost nothing. Token-major gathers take 2 or 4 bytes at a time; of those, a
software pipeline has only the latter in flight, since copies that do not wait move 4 bytes at least.

Sums are in float32. No kernel adds to what another program writes, so results are the same in every run.

What the kernels take alike: `x`, `grad` and `y` point to activations, whose strides are given beside them; `values` to
[row groups, slots, VECTOR] and `offsets` to uint8 [row groups, slots], both contiguous; `read` is the input permutation, and
`bias`, `gate` and `residual` are those of `epilogue.write_tile`: each of them a pointer or None. N, M and VECTOR are those of
the structure; TOKENS, OUTPUTS and DEPTH those of the tile: powers of two, from 16 on for `dot`.

Rows that share nothing have another form in 16 bits, which a tuner compares with this one: every 1:M choice is a 2:4 one, too,
which sparse tensor cores multiply at up to twice the dense rate (`kernels/cusparselt/`).
"""

import dataclasses

import torch
import triton
import triton.language as tl

from padst_compile.kernels import triton_support
from padst_compile.kernels.dot import dot
from padst_compile.kernels.epilogue import write_tile
from padst_compile.kernels.extras import Extras
from padst_compile.kernels.launch import Problem, Tile, tile_for
from padst_compile.kernels.nm.tiles import default_tile
from padst_compile.kernels.remembered import remembered
from padst_compile.kernels.token_shares import TokenShares, partial_sums, share_tokens, total
from padst_compile.kernels.triton_product import new_outputs
from padst_compile.kernels.triton_support import Launch
from padst_compile.structures import NM


@triton.jit
def _columns(offsets, read, entries, slots, live, N: tl.constexpr, M: tl.constexpr):
    """The feature of x that each slot reads, the input permutation composed in."""
    columns = tl.load(offsets + entries, mask=live, other=0).to(tl.int32) + slots // N * M
    if read is not None:
        columns = tl.load(read + columns, mask=live, other=0)
    return columns


@triton.jit
def nm_dot_kernel(
    x, values, offsets, read, write, bias, gate, residual, y,
    tokens, out_features, slots, x_token_stride, x_feature_stride, y_token_stride, y_feature_stride,
    N: tl.constexpr, M: tl.constexpr, VECTOR: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    TOKENS: tl.constexpr, OUTPUTS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile of tokens times (part of) one group of rows; `write` is the inverse of the output permutation."""
    parts: tl.constexpr = (VECTOR + OUTPUTS - 1) // OUTPUTS
    row_tiles = tl.cdiv(out_features, VECTOR) * parts
    # Neighbouring programs read the same tokens, which then come from the second-level cache.
    token = tl.program_id(0) // row_tiles * TOKENS + tl.arange(0, TOKENS)
    group = tl.program_id(0) % row_tiles // parts
    member = tl.program_id(0) % parts * OUTPUTS + tl.arange(0, OUTPUTS)
    row = group * VECTOR + member
    token_mask, row_mask = token < tokens, (member < VECTOR) & (row < out_features)
    x += token.to(tl.int64)[:, None] * x_token_stride
    offsets += group * slots
    values += group * slots * VECTOR + member[None, :]

    slot = tl.arange(0, DEPTH)
    live = slot < slots
    # One step ahead: a load that waits for an index in the same step could not be in flight with the step before.
    column = _columns(offsets, read, slot, slot, live, N, M)
    sums = tl.zeros((TOKENS, OUTPUTS), dtype=tl.float32)
    for _ in range(0, slots, DEPTH):
        weights = tl.load(values + slot[:, None] * VECTOR, mask=live[:, None] & row_mask[None, :], other=0.0)
        inputs = tl.load(
            x + column.to(tl.int64)[None, :] * x_feature_stride, mask=token_mask[:, None] & live[None, :], other=0.0
        )  # fmt: skip
        slot += DEPTH
        live = slot < slots
        column = _columns(offsets, read, slot, slot, live, N, M)
        sums = dot(inputs, weights, sums, PRECISION)

    write_tile(
        y, sums, bias, gate, residual, write, token, row, token_mask, row_mask, y_token_stride, y_feature_stride, ACTIVATION
    )  # fmt: skip


@triton.jit
def nm_gather_kernel(
    x, values, offsets, read, order, bias, gate, residual, y,
    tokens, out_features, slots, x_token_stride, x_feature_stride, y_token_stride, y_feature_stride,
    N: tl.constexpr, M: tl.constexpr, VECTOR: tl.constexpr, ACTIVATION: tl.constexpr,
    TOKENS: tl.constexpr, OUTPUTS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile of tokens times any rows, which are taken in the order of the outputs; `order` is the output permutation."""
    feature_tiles = tl.cdiv(out_features, OUTPUTS)
    token = tl.program_id(0) // feature_tiles * TOKENS + tl.arange(0, TOKENS)
    feature = tl.program_id(0) % feature_tiles * OUTPUTS + tl.arange(0, OUTPUTS)
    token_mask, feature_mask = token < tokens, feature < out_features
    row = feature if order is None else tl.load(order + feature, mask=feature_mask, other=0)
    x += token.to(tl.int64)[:, None, None] * x_token_stride
    first = (row // VECTOR * slots)[:, None]

    slot = tl.arange(0, DEPTH)[None, :]
    live = feature_mask[:, None] & (slot < slots)
    column = _columns(offsets, read, first + slot, slot, live, N, M)
    sums = tl.zeros((TOKENS, OUTPUTS, DEPTH), dtype=tl.float32)
    for _ in range(0, slots, DEPTH):
        weights = tl.load(values + (first + slot) * VECTOR + (row % VECTOR)[:, None], mask=live, other=0.0)
        inputs = tl.load(
            x + column.to(tl.int64)[None, :, :] * x_feature_stride, mask=token_mask[:, None, None] & live[None, :, :], other=0.0
        )  # fmt: skip
        slot += DEPTH
        live = feature_mask[:, None] & (slot < slots)
        column = _columns(offsets, read, first + slot, slot, live, N, M)
        sums += inputs.to(tl.float32) * weights.to(tl.float32)[None, :, :]

    write_tile(
        y, tl.sum(sums, 2), bias, gate, residual, None, token, feature, token_mask, feature_mask,
        y_token_stride, y_feature_stride, ACTIVATION,
    )  # fmt: skip


@triton.jit
def nm_input_gradient_kernel(
    grad, values, starts, entries, result,
    tokens, in_features, out_features, slots, grad_token_stride, grad_feature_stride,
    VECTOR: tl.constexpr, TOKENS: tl.constexpr, OUTPUTS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile of tokens times some columns of S. Column c has the entries `entries[starts[c]:starts[c + 1]]`."""
    feature_tiles = tl.cdiv(in_features, OUTPUTS)
    token = tl.program_id(0) // feature_tiles * TOKENS + tl.arange(0, TOKENS)
    feature = tl.program_id(0) % feature_tiles * OUTPUTS + tl.arange(0, OUTPUTS)
    token_mask, feature_mask = token < tokens, feature < in_features
    grad += token.to(tl.int64)[:, None, None] * grad_token_stride
    start = tl.load(starts + feature, mask=feature_mask, other=0)
    count = (tl.load(starts + feature + 1, mask=feature_mask, other=0) - start) * VECTOR

    item = tl.arange(0, DEPTH)[None, :]
    live = item < count[:, None]
    entry = tl.load(entries + start[:, None] + item // VECTOR, mask=live, other=0)
    sums = tl.zeros((TOKENS, OUTPUTS, DEPTH), dtype=tl.float32)
    for _ in range(0, tl.max(count, 0), DEPTH):
        member = item % VECTOR
        row = entry // slots * VECTOR + member
        exists = live & (row < out_features)  # a last group of rows may be shorter
        weights = tl.load(values + entry * VECTOR + member, mask=exists, other=0.0)
        places = grad + row.to(tl.int64)[None, :, :] * grad_feature_stride
        outputs = tl.load(places, mask=token_mask[:, None, None] & exists[None, :, :], other=0.0)
        item += DEPTH
        live = item < count[:, None]
        entry = tl.load(entries + start[:, None] + item // VECTOR, mask=live, other=0)
        sums += outputs.to(tl.float32) * weights.to(tl.float32)[None, :, :]

    places = token.to(tl.int64)[:, None] * in_features + feature[None, :]
    mask = token_mask[:, None] & feature_mask[None, :]
    tl.store(result + places, tl.sum(sums, 2).to(result.dtype.element_ty), mask=mask)


@triton.jit
def nm_dot_value_gradient_kernel(
    grad, x, offsets, result,
    tokens, out_features, slots, share,
    grad_token_stride, grad_feature_stride, x_token_stride, x_feature_stride, result_share_stride,
    N: tl.constexpr, M: tl.constexpr, VECTOR: tl.constexpr, PRECISION: tl.constexpr,
    TOKENS: tl.constexpr, OUTPUTS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Some slots of (part of) one group of rows, summed over one share of the tokens."""
    parts: tl.constexpr = (VECTOR + OUTPUTS - 1) // OUTPUTS
    group = tl.program_id(0) // parts
    member = tl.program_id(0) % parts * OUTPUTS + tl.arange(0, OUTPUTS)
    row = group * VECTOR + member
    slot = tl.program_id(1) * DEPTH + tl.arange(0, DEPTH)
    row_mask, slot_mask = (member < VECTOR) & (row < out_features), slot < slots
    column = _columns(offsets + group * slots, None, slot, slot, slot_mask, N, M)
    x += column.to(tl.int64)[:, None] * x_feature_stride
    grad += row.to(tl.int64)[None, :] * grad_feature_stride

    sums = tl.zeros((DEPTH, OUTPUTS), dtype=tl.float32)
    begin = tl.program_id(2) * share
    end = tl.minimum(begin + share, tokens)
    for first in range(begin, end, TOKENS):
        token = first + tl.arange(0, TOKENS)
        token_mask, step = token < end, token.to(tl.int64)
        inputs = tl.load(x + step[None, :] * x_token_stride, mask=slot_mask[:, None] & token_mask[None, :], other=0.0)
        outputs = tl.load(grad + step[:, None] * grad_token_stride, mask=token_mask[:, None] & row_mask[None, :], other=0.0)
        sums = dot(inputs, outputs, sums, PRECISION)

    places = (group * slots + slot)[:, None] * VECTOR + member[None, :]
    result += tl.program_id(2).to(tl.int64) * result_share_stride + places
    tl.store(result, sums.to(result.dtype.element_ty), mask=slot_mask[:, None] & (member < VECTOR)[None, :])


@triton.jit
def nm_gather_value_gradient_kernel(
    grad, x, offsets, result,
    tokens, out_features, slots, share,
    grad_token_stride, grad_feature_stride, x_token_stride, x_feature_stride, result_share_stride,
    N: tl.constexpr, M: tl.constexpr, VECTOR: tl.constexpr,
    TOKENS: tl.constexpr, OUTPUTS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Some slots of some rows, summed over one share of the tokens. Rows that only pad the last group get zeros."""
    rows = tl.cdiv(out_features, VECTOR) * VECTOR
    row = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    slot = tl.program_id(1) * DEPTH + tl.arange(0, DEPTH)[None, :]
    row_mask, stored = row < out_features, (row < rows)[:, None] & (slot < slots)
    entry = (row // VECTOR * slots)[:, None] + slot
    live = row_mask[:, None] & (slot < slots)
    column = _columns(offsets, None, entry, slot, live, N, M)
    x += column.to(tl.int64)[None, :, :] * x_feature_stride
    grad += row.to(tl.int64)[None, :] * grad_feature_stride

    sums = tl.zeros((TOKENS, OUTPUTS, DEPTH), dtype=tl.float32)
    begin = tl.program_id(2) * share
    end = tl.minimum(begin + share, tokens)
    for first in range(begin, end, TOKENS):
        token = first + tl.arange(0, TOKENS)
        token_mask, step = token < end, token.to(tl.int64)
        inputs = tl.load(x + step[:, None, None] * x_token_stride, mask=token_mask[:, None, None] & live[None, :, :], other=0.0)
        outputs = tl.load(grad + step[:, None] * grad_token_stride, mask=token_mask[:, None] & row_mask[None, :], other=0.0)
        sums += inputs.to(tl.float32) * outputs.to(tl.float32)[:, :, None]

    places = entry * VECTOR + (row % VECTOR)[:, None]
    result += tl.program_id(2).to(tl.int64) * result_share_stride + places
    tl.store(result, tl.sum(sums, 0).to(result.dtype.element_ty), mask=stored)


_NOTHING = Extras()


def nm_linear(
    structure: NM,
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
        structure: N:M of S.
        x: [..., in_features] with any strides; float32, float16 or bfloat16.
        values: contiguous [row_groups, slots, vector] in the dtype of `x`.
        offsets: contiguous uint8 [row_groups, slots].
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
        "nm_forward",
        structure.to_string(),
        x,
        values,
        out_features,
        permuted=extras.permuted,
        epilogue=extras.epilogue,
        output_layout="feature" if feature_major else "token",
    )
    launch = linear_launch(structure, x, values, offsets, y, extras, problem, tile_for(problem, default_tile))
    with triton_support.on_device(x):
        launch()
    return result


def linear_launch(
    structure: NM,
    x: torch.Tensor,
    values: torch.Tensor,
    offsets: torch.Tensor,
    y: torch.Tensor,
    extras: Extras,
    problem: Problem,
    tile: Tile,
) -> Launch:
    """The launch that writes `y`: of `nm_dot_kernel` or `nm_gather_kernel`, as the variant of the tile says."""
    extras = extras.laid_out_like(y)
    dot = tile.variant == "dot"
    order = {"write": extras.inverse_output_permutation()} if dot else {"order": extras.output_permutation}
    arguments = {
        "x": x,
        "values": values,
        "offsets": offsets,
        "read": extras.input_permutation,
        **order,
        "bias": extras.bias,
        "gate": extras.gate,
        "residual": extras.residual,
        "y": y,
        "tokens": x.shape[0],
        "out_features": y.shape[1],
        "slots": offsets.shape[1],
        "x_token_stride": x.stride(0),
        "x_feature_stride": x.stride(1),
        "y_token_stride": y.stride(0),
        "y_feature_stride": y.stride(1),
        **_constants(structure, tile),
        "ACTIVATION": extras.activation,
        **({"PRECISION": problem.precision} if dot else {}),
    }
    row_tiles = _group_tiles(values, tile) if dot else triton.cdiv(y.shape[1], tile.outputs)
    grid = (triton.cdiv(x.shape[0], tile.tokens) * row_tiles,)
    return Launch(nm_dot_kernel if dot else nm_gather_kernel, grid, arguments, tile.warps, tile.stages)


def nm_input_gradient(
    structure: NM, grad: torch.Tensor, values: torch.Tensor, offsets: torch.Tensor, in_features: int
) -> torch.Tensor:
    """`grad @ S`, contiguous [tokens, in_features]; the same bits at every call.

    Args:
        structure: N:M of S.
        grad: [tokens, out_features] with any strides.
        values: contiguous [row_groups, slots, vector] in the dtype of `grad`.
        offsets: uint8 [row_groups, slots].
        in_features: columns of S.
    """
    result = grad.new_empty(grad.shape[0], in_features)
    if result.numel() == 0:
        return result
    problem = triton_support.problem("nm_input_gradient", structure.to_string(), grad, values, grad.shape[1])
    tile = tile_for(dataclasses.replace(problem, in_features=in_features), default_tile)
    lists = remembered(
        (transposed_lists, structure, in_features), (offsets,), lambda: transposed_lists(structure, offsets, in_features)
    )
    launch = input_gradient_launch(structure, grad, values, lists, result, tile)
    with triton_support.on_device(grad):
        launch()
    return result


def input_gradient_launch(
    structure: NM,
    grad: torch.Tensor,
    values: torch.Tensor,
    lists: tuple[torch.Tensor, torch.Tensor],
    result: torch.Tensor,
    tile: Tile,
) -> Launch:
    """The launch of `nm_input_gradient_kernel` that writes `result`; `lists` as `transposed_lists` makes them."""
    arguments = {
        "grad": grad,
        "values": values,
        "starts": lists[0],
        "entries": lists[1],
        "result": result,
        "tokens": grad.shape[0],
        "in_features": result.shape[1],
        "out_features": grad.shape[1],
        "slots": values.shape[1],
        "grad_token_stride": grad.stride(0),
        "grad_feature_stride": grad.stride(1),
        "VECTOR": structure.vector,
        "TOKENS": tile.tokens,
        "OUTPUTS": tile.outputs,
        "DEPTH": tile.depth,
    }
    grid = (triton.cdiv(grad.shape[0], tile.tokens) * triton.cdiv(result.shape[1], tile.outputs),)
    return Launch(nm_input_gradient_kernel, grid, arguments, tile.warps, tile.stages)


def transposed_lists(structure: NM, offsets: torch.Tensor, in_features: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which entries of `offsets` each input meets: `starts` int32 [in_features + 1], `entries` int32 [row_groups * slots].

    Made on the device of the offsets by a stable sort: nothing waits for it, and the order is the same in every run.
    """
    in_order, entries = torch.sort(structure.input_columns((offsets,)).flatten(), stable=True)
    bounds = torch.arange(in_features + 1, device=offsets.device)
    return torch.searchsorted(in_order, bounds, out_int32=True), entries.int()


def nm_value_gradient(
    structure: NM, grad: torch.Tensor, x: torch.Tensor, values: torch.Tensor, offsets: torch.Tensor
) -> torch.Tensor:
    """The active entries of `grad.T @ x`, packed like `values`; the same bits at every call.

    Args:
        structure: N:M of S.
        grad: [tokens, out_features] with any strides.
        x: [tokens, in_features] with any strides, in the dtype of `grad`.
        values: [row_groups, slots, vector], of which only the shape and dtype matter.
        offsets: contiguous uint8 [row_groups, slots].
    """
    if x.shape[0] == 0:
        return torch.zeros_like(values)
    problem = triton_support.problem("nm_value_gradient", structure.to_string(), x, values, grad.shape[1])
    tile = tile_for(problem, default_tile)
    programs = _value_row_tiles(values, tile) * triton.cdiv(offsets.shape[1], tile.depth)
    shares = share_tokens(x.shape[0], tile.tokens, programs)
    sums = partial_sums(shares, values)
    launch = value_gradient_launch(structure, grad, x, offsets, sums, shares, problem, tile)
    with triton_support.on_device(x):
        launch()
    return total(sums, values.dtype)


def value_gradient_launch(
    structure: NM,
    grad: torch.Tensor,
    x: torch.Tensor,
    offsets: torch.Tensor,
    sums: torch.Tensor,
    shares: TokenShares,
    problem: Problem,
    tile: Tile,
) -> Launch:
    """The launch that writes `sums` [shares, row_groups, slots, vector]: of the `dot` or the `gather` kernel."""
    dot = tile.variant == "dot"
    arguments = {
        "grad": grad,
        "x": x,
        "offsets": offsets,
        "result": sums,
        "tokens": x.shape[0],
        "out_features": grad.shape[1],
        "slots": offsets.shape[1],
        "share": shares.size,
        "grad_token_stride": grad.stride(0),
        "grad_feature_stride": grad.stride(1),
        "x_token_stride": x.stride(0),
        "x_feature_stride": x.stride(1),
        "result_share_stride": sums.stride(0),
        **_constants(structure, tile),
        **({"PRECISION": problem.precision} if dot else {}),
    }
    grid = (_value_row_tiles(sums[0], tile), triton.cdiv(offsets.shape[1], tile.depth), shares.count)
    kernel = nm_dot_value_gradient_kernel if dot else nm_gather_value_gradient_kernel
    return Launch(kernel, grid, arguments, tile.warps, tile.stages)


def _group_tiles(values: torch.Tensor, tile: Tile) -> int:
    """Programs along the rows where each takes rows of one group."""
    row_groups, _, vector = values.shape
    return row_groups * triton.cdiv(vector, tile.outputs)


def _value_row_tiles(values: torch.Tensor, tile: Tile) -> int:
    if tile.variant == "dot":
        return _group_tiles(values, tile)
    row_groups, _, vector = values.shape
    return triton.cdiv(row_groups * vector, tile.outputs)


def _constants(structure: NM, tile: Tile) -> dict[str, int]:
    return {
        "N": structure.n,
        "M": structure.m,
        "VECTOR": structure.vector,
        "TOKENS": tile.tokens,
        "OUTPUTS": tile.outputs,
        "DEPTH": tile.depth,
    }
