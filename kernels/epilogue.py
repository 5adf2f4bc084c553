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
def finish(sums, bias, gate, residual, features, feature_mask, places, mask, ACTIVATION: tl.constexpr):
    """`act(sums + bias) * gate + residual` for a tile of float32 sums, in float32.

    Args:
        sums: the tile, in any orientation.
        bias: pointer to the bias, or None.
        gate: pointer to a tensor laid out like the output, or None.
        residual: pointer to a tensor laid out like the output, or None.
        features: the output feature of each sum, in a shape that broadcasts to the tile's ([1, outputs], say).
        feature_mask: which features exist, in the shape of `features`.
        places: offset of each sum in the output, in elements; int64 where the output may be large.
        mask: which sums exist, in the shape of the tile.
        ACTIVATION: one of `ACTIVATIONS`.
    """
    if bias is not None:
        sums += tl.load(bias + features, mask=feature_mask, other=0.0).to(tl.float32)
    sums = activate(sums, ACTIVATION)
    if gate is not None:
        sums *= tl.load(gate + places, mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        sums += tl.load(residual + places, mask=mask, other=0.0).to(tl.float32)
    return sums
