"""What follows the sums of a Triton kernel, in float32: bias, activation, gate, residual.

    y = act(sums + bias) * gate + residual

With a gate this is SwiGLU (silu) and GeGLU (gelu): one product is the gate of the other. The names of activations are those
of the C++ kernels (`native/activation.h`).
"""

import triton
import triton.language as tl

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """The activation of float32 values; NaN stays NaN."""
    if ACTIVATION == "relu":
        z = tl.where(z < 0.0, 0.0, z)
    elif ACTIVATION == "gelu":
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 z (1 + tanh u) = z sigmoid(2 u) with u = sqrt(2 / pi) (z + 0.044715 z^3)
        z = z / (1.0 + tl.exp(-z * (1.5957691216057308 + 0.07135481627159735 * z * z)))
    elif ACTIVATION == "silu":
        z = z / (1.0 + tl.exp(-z))
    else:
        tl.static_assert(ACTIVATION == "none")
    return z


@triton.jit
def write_tile(
    y, sums, bias, gate, residual, table, token, feature, token_mask, feature_mask, token_stride, feature_stride,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Write `act(sums + bias) * gate + residual` for a tile of sums, computed in float32.

    Args:
        y: pointer to the output.
        sums: float32 [tokens, outputs].
        bias: pointer to the bias, or None.
        gate: pointer to a tensor laid out like the output, or None.
        residual: pointer to a tensor laid out like the output, or None.
        table: pointer to int32 [features], the output that each feature is written to, or None for the same.
        token: of each row of the tile.
        feature: of each column of the tile.
        token_mask: which tokens exist.
        feature_mask: which features exist.
        token_stride: of the output, in elements, like the next one.
        feature_stride: of the output.
        ACTIVATION: one of `ACTIVATIONS`.
    """
    target = feature
    if table is not None:
        target = tl.load(table + feature, mask=feature_mask, other=0)
    places = (token.to(tl.int64) * token_stride)[:, None] + (target.to(tl.int64) * feature_stride)[None, :]
    mask = token_mask[:, None] & feature_mask[None, :]
    if bias is not None:
        sums += tl.load(bias + target[None, :], mask=feature_mask[None, :], other=0.0).to(tl.float32)
    sums = activate(sums, ACTIVATION)
    if gate is not None:
        sums *= tl.load(gate + places, mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        sums += tl.load(residual + places, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + places, sums.to(y.dtype.element_ty), mask=mask)
