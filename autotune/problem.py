"""What is tuned: one layer, in one place of a graph."""

from __future__ import annotations

import dataclasses
from typing import Literal, TypeAlias

Kernel: TypeAlias = Literal["native", "triton", "registered", "aten", "cusparselt", "dense"]

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
        kernels: what can run the product, the default first, dense last.
        epilogue: what follows the sums ("" or "bias").
        layout: order of the activations in memory, of inputs and of outputs, as in "token/token".
        precision: how the GPU multiplies float32, see `kernels.launch.Problem`; "ieee" elsewhere.
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
    precision: str = "ieee"


@dataclasses.dataclass(frozen=True)
class MlpProblem:
    """All that the speed of two layers, one behind the other, depends on, weights aside.

    Args:
        structure: short forms of both structures, the first layer's first.
        in_features: inputs of the first layer.
        hidden_features: outputs of the first layer, inputs of the second.
        out_features: outputs of the second layer.
        active: stored values of both.
        tokens: rows of the activations, as a power of two (`token_bucket`).
        dtype: dtype of the products, as in "bfloat16".
        permuted: which tables the layers apply, of "in", "between" and "out", joined by "+".
        device: type of the device, as in "cpu".
        epilogue: the first layer's activation and what the second adds, as in "gelu+residual".
        kernels: what can run the layers, the default first: two kernels, or one.
        precision: see `LayerProblem`.
    """

    structure: str
    in_features: int
    hidden_features: int
    out_features: int
    active: int
    tokens: int
    dtype: str
    permuted: str
    device: str
    epilogue: str
    kernels: tuple[str, ...] = ("apart", "fused")
    precision: str = "ieee"


def token_bucket(tokens: int, device: str = "cpu") -> int:
    """The power of two that stands for a number of tokens: layers of like size share one measurement."""
    most = _MOST_TOKENS.get(device, _MOST_TOKENS_ELSEWHERE)
    return 1 << (max(1, min(tokens, most)) - 1).bit_length()
