"""The 2:4 format and its product as anyone would write them down; sizes are those of cuSPARSELt, its order of bits is not.

Of each window of four inputs two are stored, the active ones and, where these are fewer, some zeros; and for each of the two
its place in the window, in two bits. All stored entries of a weight come first, then all places: 16 inputs take 8 entries and
one word of 16 bits, so that a packed weight is a tensor of its own dtype with 9/16 of its columns.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from padst_compile.kernels.cusparselt.legality import MOST, WINDOW

INPUTS_PER_WORD = 16
PACKED_PER_WORD = 9  # entries of 16 bits: eight that are stored, and the word


def is_two_of_four(weight: torch.Tensor) -> bool:
    """Whether no aligned window of four inputs of `weight` `[out, in]`, `in` a multiple of 4, holds more than two numbers."""
    return bool((_windows(weight).count_nonzero(-1) <= MOST).all())


def compress(weight: torch.Tensor) -> torch.Tensor:
    """`weight` `[out, in]` of a 16-bit dtype, `in` a multiple of 16 -> `[out, in / 16 * 9]` of the same dtype.

    Raises:
        RuntimeError: it is not 2:4.
    """
    if not is_two_of_four(weight):
        raise RuntimeError("the weight is not 2:4: more than two of four neighbouring inputs are active")
    windows, rows = _windows(weight), weight.shape[0]
    active_first = torch.sort((windows == 0).to(torch.uint8), dim=-1, stable=True).indices
    places = active_first[..., :MOST].sort(-1).values
    kept = _windows(weight.view(torch.int16)).gather(-1, places)  # bits: moved as a number, NaN may change its own
    shifts = torch.arange(0, 16, 2, device=weight.device)
    words = (places.reshape(rows, -1, 8) << shifts).sum(-1).to(torch.int16)
    return torch.cat([kept.reshape(-1), words.reshape(-1)]).view(weight.dtype).view(rows, -1)


def decompress(packed: torch.Tensor) -> torch.Tensor:
    """The dense weight `[out, in]` of what `compress` made."""
    rows, columns = packed.shape
    words_per_row = columns // PACKED_PER_WORD
    bits = packed.view(torch.int16).reshape(-1)
    kept, words = bits.split([rows * words_per_row * 8, rows * words_per_row])
    shifts = torch.arange(0, 16, 2, device=packed.device)
    places = (words.long()[:, None] >> shifts & 3).view(-1, MOST)
    windows = bits.new_zeros(places.shape[0], WINDOW).scatter_(-1, places, kept.view(-1, MOST))
    return windows.view(rows, words_per_row * INPUTS_PER_WORD).view(packed.dtype)


def two_of_four_linear(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`x` [tokens, in] -> `x @ weight.T + bias` [tokens, out]."""
    return F.linear(x, decompress(packed), bias)


def _windows(weight: torch.Tensor) -> torch.Tensor:
    return weight.reshape(weight.shape[0], -1, WINDOW)
