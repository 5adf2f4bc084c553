"""What is tuned: one layer, in one place of a graph."""

from __future__ import annotations

import dataclasses
from typing import Literal, TypeAlias

Kernel: TypeAlias = Literal["native", "triton", "registered", "aten", "dense"]

_MOST_TOKENS = {"cpu": 1 << 12}  # what a measurement may take
_MOST_TOKENS_ELSEWHERE = 1 << 16


@dataclasses.dataclass(frozen=True)
class LayerProblem:
    """All that the speed of a layer depends on, weights aside.

    Args:
        structure: short form of the structure.
        in_features: inputs.
        out_features: outputs.
        active: stored values.
        tokens: rows of the activations, as a power of two (`token_bucket`).
        dtype: dtype of the product, as in "bfloat16".
        permuted: which tables the kernel applies ("", "in", "out", "in+out").
        training: whether gradients are computed as well.
        device: type of the device, as in "cpu".
        kernels: what can run the product, the default first.
        epilogue: what follows the sums ("" or "bias").
        layout: order of the activations in memory, of inputs and of outputs, as in "token/token".
    """

    structure: str
    in_features: int
    out_features: int
    active: int
    tokens: int
    dtype: str
    permuted: str
    training: bool
    device: str
    kernels: tuple[Kernel, ...]
    epilogue: str = ""
    layout: str = "token/token"


def token_bucket(tokens: int, device: str = "cpu") -> int:
    """The power of two that stands for a number of tokens: layers of like size share one measurement."""
    most = _MOST_TOKENS.get(device, _MOST_TOKENS_ELSEWHERE)
    return 1 << (max(1, min(tokens, most)) - 1).bit_length()
