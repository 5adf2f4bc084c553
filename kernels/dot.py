"""`tl.dot` into float32, also where Triton's interpreter gets it wrong."""

import triton
import triton.language as tl

from padst_compile.kernels import triton_support

# The interpreter (3.6 to 3.9) multiplies the bit patterns of bfloat16. Products of 16-bit numbers are exact in float32.
_WIDEN = tl.constexpr(triton_support.interpreting())


@triton.jit
def dot(a, b, sums, PRECISION: tl.constexpr):
    """`sums + a @ b` in float32; PRECISION is how float32 operands are multiplied ("ieee", "tf32", "tf32x3")."""
    if _WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision=PRECISION)
