"""Parts that the block kernels share."""

import triton
import triton.language as tl


@triton.jit
def swizzle(program, token_tiles, output_tiles, GROUP: tl.constexpr):
    """Token tile and output tile of a program: all output tiles of `GROUP` token tiles before those of the next."""
    per_group = GROUP * output_tiles
    first = (program // per_group) * GROUP
    size = tl.minimum(token_tiles - first, GROUP)
    place = program % per_group
    return first + place % size, place // size


@triton.jit
def tile_of(program, tokens, row_count, ROWS: tl.constexpr, TOKENS: tl.constexpr, OUTPUTS: tl.constexpr, GROUP: tl.constexpr):
    """What a program computes: a tile of tokens, and of which block row which part."""
    parts: tl.constexpr = (ROWS + OUTPUTS - 1) // OUTPUTS
    token_tile, output_tile = swizzle(program, tl.cdiv(tokens, TOKENS), row_count * parts, GROUP)
    return token_tile, output_tile // parts, output_tile % parts


@triton.jit
def outputs_of(row, part, out_features, ROWS: tl.constexpr, OUTPUTS: tl.constexpr):
    """Of a part of a block row: the places of its outputs in the row, their features, and which of these exist."""
    place_in_row = part * OUTPUTS + tl.arange(0, OUTPUTS)
    feature = row * ROWS + place_in_row
    return place_in_row, feature, (place_in_row < ROWS) & (feature < out_features)


@triton.jit
def load_tile(pointers, row_mask, column_mask, WHOLE_ROWS: tl.constexpr, WHOLE_COLUMNS: tl.constexpr):
    """A tile with zeros where a mask is false; a mask that is known to be true everywhere costs nothing."""
    if WHOLE_ROWS and WHOLE_COLUMNS:
        tile = tl.load(pointers)
    elif WHOLE_ROWS:
        tile = tl.load(pointers, mask=column_mask, other=0.0)
    elif WHOLE_COLUMNS:
        tile = tl.load(pointers, mask=row_mask, other=0.0)
    else:
        tile = tl.load(pointers, mask=row_mask & column_mask, other=0.0)
    return tile


@triton.jit
def row_range(row_pointers, row, BLOCKS_PER_ROW: tl.constexpr):
    """The first block of a block row, and the one behind its last; pointers are read if `BLOCKS_PER_ROW` is 0."""
    if BLOCKS_PER_ROW > 0:
        first = row * BLOCKS_PER_ROW
        last = first + BLOCKS_PER_ROW
    else:
        first = tl.load(row_pointers + row)
        last = tl.load(row_pointers + row + 1)
    return first, last


@triton.jit
def entry_of(index, block, last):
    """The entry of a block in `index`, or the block itself where there is none; 0 from `last` on."""
    entry = block
    if index is not None:
        entry = tl.load(index + block, mask=block < last, other=0)
    return entry
