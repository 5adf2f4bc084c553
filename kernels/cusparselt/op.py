"""`padst::two_of_four_pack` and `padst::two_of_four_linear`: a product on sparse tensor cores, for inference.

On a GPU cuSPARSELt packs and multiplies, in its own format; elsewhere the reference does. The library takes sizes in multiples
of 8 and 16: what a layer lacks is filled up with zeros. Which of its algorithms multiplies is asked for at each launch.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from padst_compile.kernels import triton_support
from padst_compile.kernels.cusparselt import reference
from padst_compile.kernels.cusparselt.tiles import algorithm, default_tile
from padst_compile.kernels.launch import tile_for
from padst_compile.kernels.permute import gather_features
from padst_compile.kernels.triton_product import check_index, check_like, check_operands
from padst_compile.structures.base import padded

KERNEL = "cusparselt_linear"
DTYPES = (torch.float16, torch.bfloat16)
_STRUCTURE = "nm:2:4"  # as which it runs whatever is packed
_FEATURES, _TOKENS = 16, 8  # what sizes must be multiples of, `_DTYPE_SHAPE_CONSTRAINTS` in torch/sparse/semi_structured.py
_ALIGNMENT = 16  # bytes that the library reads at once


@torch.library.custom_op("padst::two_of_four_pack", mutates_args=())
def two_of_four_pack(weight: torch.Tensor) -> torch.Tensor:
    """A weight as sparse tensor cores read it.

    Args:
        weight: `[out, in]` float16 or bfloat16, of any size; 2:4 along the inputs, which is not checked on a GPU.

    Returns:
        `[out', columns]` of the same dtype, `out'` the next multiple of 16.

    Raises:
        RuntimeError: another dtype; on the CPU, not 2:4.
    """
    if weight.dtype not in DTYPES:
        raise RuntimeError(f"only weights in float16 and bfloat16 are packed as 2:4, got {weight.dtype}")
    whole = padded(weight, _whole(weight.shape[0], _FEATURES), _whole(weight.shape[1], _FEATURES)).contiguous()
    if not weight.is_cuda:
        return reference.compress(whole)
    with triton_support.on_device(weight):
        return torch._cslt_compress(whole)


@two_of_four_pack.register_fake
def _two_of_four_pack_fake(weight: torch.Tensor) -> torch.Tensor:
    rows, columns = (_whole(size, _FEATURES) for size in weight.shape)
    return weight.new_empty((rows, columns // reference.INPUTS_PER_WORD * reference.PACKED_PER_WORD))


@torch.library.custom_op("padst::two_of_four_linear", mutates_args=())
def two_of_four_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor | None,
    input_permutation: torch.Tensor | None,
    out_features: int,
) -> torch.Tensor:
    """`permute(x, input_permutation) @ weight.T + bias`; inputs are permuted by a gather of its own.

    Args:
        x: `[..., in_features]` float16 or bfloat16, with any strides.
        packed: of `two_of_four_pack`, same dtype and device.
        bias: `[out_features]` or None.
        input_permutation: int32 `[in_features]` or None.
        out_features: rows of the weight.

    Returns:
        Contiguous `[..., out_features]` in the dtype of `x`.

    Raises:
        RuntimeError: an argument does not fit.
    """
    _check(x, packed, bias, input_permutation, out_features)
    if x.numel() == 0:
        return x.new_empty((*x.shape[:-1], out_features))
    rows = x.reshape(-1, x.shape[-1])
    tokens = rows.shape[0]
    if input_permutation is not None:
        rows = gather_features(rows, input_permutation)
    rows = padded(rows, _whole(tokens, _TOKENS), _whole(rows.shape[1], _FEATURES)).contiguous()
    if bias is not None:
        more = packed.shape[0] - out_features
        bias = F.pad(bias, (0, more)) if more else bias.contiguous()
    y = _multiplied(rows, packed, bias)[:tokens, :out_features].contiguous()
    # Autograd forbids writing in place to a view that a custom op returns, as `ReLU(inplace=True)` behind a layer would.
    result: torch.Tensor = torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], out_features))
    return result


@two_of_four_linear.register_fake
def _two_of_four_linear_fake(
    x: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor | None,
    input_permutation: torch.Tensor | None,
    out_features: int,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _multiplied(rows: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Of whole multiples: `rows` [tokens, in] -> [tokens, out], contiguous."""
    epilogue = "" if bias is None else "bias"
    problem = triton_support.problem(KERNEL, _STRUCTURE, rows, packed, packed.shape[0], epilogue=epilogue)
    chosen = algorithm(tile_for(problem, default_tile))
    if not rows.is_cuda:
        return reference.two_of_four_linear(rows, packed, bias)
    if rows.data_ptr() % _ALIGNMENT:
        rows = rows.clone()
    with triton_support.on_device(rows):
        return torch._cslt_sparse_mm(packed, rows.t(), bias=bias, transpose_result=True, alg_id=chosen)


def _check(
    x: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor | None,
    input_permutation: torch.Tensor | None,
    out_features: int,
) -> None:
    check_operands(x, packed, out_features)
    if x.dtype not in DTYPES:
        raise RuntimeError(f"sparse tensor cores multiply float16 and bfloat16, got {x.dtype}")
    if packed.dim() != 2 or packed.shape[0] != _whole(out_features, _FEATURES):
        raise RuntimeError(f"packed must be [{_whole(out_features, _FEATURES)}, …], got {list(packed.shape)}")
    check_index("input_permutation", input_permutation, x.device, x.shape[-1])
    check_like("bias", bias, (out_features,), x)


def _whole(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
