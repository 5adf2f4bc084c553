"""Picks, per call, the native or Triton kernel where there is one, else the ATen path."""

from __future__ import annotations

import functools
import importlib
from typing import Any, Literal, TypeAlias, TypeGuard

import torch

from padst_compile.errors import InvalidTopologyError
from padst_compile.kernels import native, remembered, triton_support
from padst_compile.kernels.block import aten as block_aten
from padst_compile.kernels.diagonal.blocks import BlockTables, block_size, block_tables
from padst_compile.kernels.diagonal.transpose import transpose as diagonal_transpose
from padst_compile.kernels.formats import Format, format_of, register_format, registered_kernel
from padst_compile.kernels.native.tiles import token_tile
from padst_compile.kernels.permute import gather_features
from padst_compile.kernels.triton_product import TritonProduct
from padst_compile.structures import NM, Block, Diagonal, Shape, Structure, Topology

SparseKernel: TypeAlias = Literal["native", "triton", "registered", "aten"]

register_format(Block.kind, block_aten.BlockFormat())

# Where each structure's Triton kernels are: a module with a `PRODUCT` (`TritonProduct`). Imported at first use.
_TRITON_PRODUCTS = {
    "block": "padst_compile.kernels.block.triton_op",
    "nm": "padst_compile.kernels.nm.triton_op",
    "diagonal": "padst_compile.kernels.diagonal.triton_op",
}

_SMALLEST_BLOCK = 16  # side of the blocks from which on their kernels are faster than those for diagonals
_LEAST_TOKENS = 512  # with which reordering the weights takes less than it saves


def kernel_for(structure: Structure, device: torch.device, dtype: torch.dtype) -> SparseKernel:
    """What multiplies this structure here: a kernel that somebody registered, C++ ("native"), Triton, or ATen."""
    if registered_kernel(structure, device, dtype) is not None:
        return "registered"
    if triton_product(structure, device, dtype) is not None:
        return "triton"
    return "native" if has_native_kernel(structure, device, dtype) else "aten"


def kernel_op(structure: Structure, kernel: SparseKernel) -> Any:
    """The op of a native or Triton kernel: `(x, values, *topology, bias, input_permutation, output_permutation, out, *sizes)`.

    Behind these stand `activation="none"`, `residual=None` and `gate=None`.
    """
    return _triton_product(structure.kind).op if kernel == "triton" else native_op(structure)


def triton_product(structure: Structure, device: torch.device, dtype: torch.dtype) -> TritonProduct | None:
    """The Triton kernels that multiply this structure here, if any do."""
    if structure.kind not in _TRITON_PRODUCTS or not triton_support.usable(device, dtype):
        return None
    product = _triton_product(structure.kind)
    return product if product.supports(structure, dtype) else None


@functools.cache
def _triton_product(kind: str) -> TritonProduct:
    product: TritonProduct = importlib.import_module(_TRITON_PRODUCTS[kind]).PRODUCT
    return product


def has_native_kernel(structure: Structure, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a native kernel multiplies this structure here; builds the kernels at first use on a CPU."""
    return device.type == "cpu" and structure.kind in _NATIVE_OPS and native.load() and native.supports(structure.kind, dtype)


def native_op(structure: Structure) -> Any:
    """The native op of a structure: `(x, values, *topology, bias, input_permutation, output_permutation, out, *sizes)`."""
    return getattr(torch.ops.padst_native, _NATIVE_OPS[structure.kind]).default


def mlp_op(kernel: SparseKernel) -> Any:
    """The op that runs two block layers as one C++ or Triton kernel: the arguments of `kernel_op` of both up to `out_features`.

    Behind these stand `activation="none"` of the first and `residual=None` of the second.
    """
    if kernel == "triton":
        return importlib.import_module("padst_compile.kernels.block.triton_mlp_op").OP
    return torch.ops.padst_native.block_mlp.default


def native_sizes(structure: Structure) -> tuple[int, ...]:
    """The integers that a native op takes after `out_features`."""
    return (structure.n, structure.m) if isinstance(structure, NM) else ()


def tile_arguments(structure: Structure, kernel: SparseKernel, tokens: int) -> dict[str, Any]:
    """The keyword arguments that make an op cut its work into tiles of so many tokens; 0 leaves it to the kernel."""
    return {"token_tile": tokens} if tokens and kernel == "native" and isinstance(structure, Block) else {}


def row_arguments(kernel: SparseKernel, *, equal_rows: bool) -> dict[str, Any]:
    """The keyword arguments that tell an op of blocks that every block row holds equally many; Triton's makes use of it."""
    return {"equal_rows": True} if equal_rows and kernel == "triton" else {}


def folds_into_blocks(structure: Structure, shape: Shape, device: torch.device, dtype: torch.dtype) -> TypeGuard[Diagonal]:
    """Whether a layer's diagonals are blocks, large enough for a kernel that multiplies blocks."""
    if not isinstance(structure, Diagonal) or structure.group < _SMALLEST_BLOCK:
        return False
    if registered_kernel(structure, device, dtype) is not None:
        return False
    return kernel_for(block_size(structure, shape), device, dtype) != "aten"


def _fold_now(structure: Structure, shape: Shape, x: torch.Tensor) -> TypeGuard[Diagonal]:
    """Whether to fold for one call, which reorders the weights each time; in inference a pass does that once for all."""
    return x.numel() // x.shape[-1] >= _LEAST_TOKENS and folds_into_blocks(structure, shape, x.device, x.dtype)


def check_indices(structure: Structure, topology: Topology, shape: Shape) -> None:
    """Refuse index tensors that were overwritten with nonsense, before an index becomes an address or a wrong number.

    For all but C++ kernels, which check their indices themselves. On a GPU nothing is checked, for the host would wait.

    Raises:
        InvalidTopologyError: what is wrong.
    """
    if all(index.device.type == "cpu" for index in topology):
        wrong = structure.check_topology(topology, shape)
        if wrong is not None:
            raise InvalidTopologyError(structure.to_string(), wrong)


def forward(
    structure: Structure,
    x: torch.Tensor,
    values: torch.Tensor,
    topology: Topology,
    bias: torch.Tensor | None,
    input_permutation: torch.Tensor | None,
    output_permutation: torch.Tensor | None,
    out_features: int,
    *,
    equal_rows: bool = False,
) -> torch.Tensor:
    """`padst::structured_linear`, see there; `equal_rows` says that every block row of blocks holds equally many."""
    kernel = kernel_for(structure, x.device, x.dtype)
    fold = _fold_now(structure, Shape(out_features, x.shape[-1]), x)
    if fold or kernel != "native":
        check_indices(structure, topology, Shape(out_features, x.shape[-1]))
    if fold:
        assert isinstance(structure, Diagonal)
        tables = _block_tables(structure, topology, Shape(out_features, x.shape[-1]))
        into, out = _around_blocks(tables, input_permutation, output_permutation)
        blocks = tables.blocks(values), tables.topology
        return forward(tables.structure, x, *blocks, bias, into, out, out_features, equal_rows=True)
    if kernel in ("native", "triton"):
        around = bias, input_permutation, output_permutation, out_features
        tuned = tile_arguments(structure, kernel, token_tile(structure, x, values, *around) if kernel == "native" else 0)
        options = tuned | row_arguments(kernel, equal_rows=equal_rows)
        y: torch.Tensor = kernel_op(structure, kernel)(x, values, *topology, *around, *native_sizes(structure), **options)
        return y
    if input_permutation is not None:
        x = gather_features(x, input_permutation)
    y = _format(structure, x).forward(structure, x.reshape(-1, x.shape[-1]), values, topology, out_features)
    # Autograd forbids writing in place to a view that a custom op returns, as `ReLU(inplace=True)` behind a layer would.
    y = torch.ops.aten._unsafe_view.default(y.contiguous(), (*x.shape[:-1], out_features))
    if output_permutation is not None:
        y = gather_features(y, output_permutation)
    return (y if bias is None else y + bias).contiguous()


def input_gradient(
    structure: Structure,
    grad: torch.Tensor,
    values: torch.Tensor,
    topology: Topology,
    in_features: int,
    input_permutation: torch.Tensor | None = None,
    output_permutation: torch.Tensor | None = None,
) -> torch.Tensor:
    """`padst::structured_input_gradient` for `grad` [tokens, out], see there."""
    shape, product = Shape(grad.shape[1], in_features), _python_product(structure, grad)
    native_kernel = product is None and _beats_dense(structure, grad)
    if not native_kernel or isinstance(structure, Diagonal):
        check_indices(structure, topology, shape)
    if _fold_now(structure, shape, grad):
        tables = _block_tables(structure, topology, shape)
        into, out = _around_blocks(tables, input_permutation, output_permutation)
        return input_gradient(tables.structure, grad, tables.blocks(values), tables.topology, in_features, into, out)
    if native_kernel and isinstance(structure, Block):
        transposed = Block((structure.columns, structure.rows))
        tuned = token_tile(transposed, grad, values, None, output_permutation, input_permutation, in_features)
        around = in_features, input_permutation, output_permutation, tuned
        return torch.ops.padst_native.block_input_gradient(grad, values, *topology, *around)  # type: ignore[no-any-return]  # a tensor
    before, behind = _inverse(output_permutation), _inverse(input_permutation)
    if native_kernel and isinstance(structure, Diagonal):  # S.T is a matrix of diagonals, like S: the forward kernel
        turned, offsets = diagonal_transpose(values, topology, shape)
        return forward(Diagonal(), grad, turned, offsets, None, before, behind, in_features)
    if native_kernel and isinstance(structure, NM):
        sizes = in_features, *native_sizes(structure)
        return torch.ops.padst_native.nm_input_gradient(grad, values, *topology, *sizes, before, behind)  # type: ignore[no-any-return]  # a tensor
    gradient = (format_of(structure) if product is None else product).input_gradient(
        structure, _permuted(grad, before), values, topology, in_features
    )
    return _permuted(gradient, behind)


def value_gradient(
    structure: Structure,
    grad: torch.Tensor,
    x: torch.Tensor,
    values: torch.Tensor,
    topology: Topology,
    input_permutation: torch.Tensor | None = None,
    output_permutation: torch.Tensor | None = None,
) -> torch.Tensor:
    """`padst::structured_value_gradient` for `grad` [tokens, out] and `x` [tokens, in], see there."""
    shape, product = Shape(grad.shape[1], x.shape[1]), _python_product(structure, grad)
    fold, native_kernel = _fold_now(structure, shape, x), x.dtype == grad.dtype and _beats_dense(structure, grad)
    if fold or product is not None or not native_kernel:
        check_indices(structure, topology, shape)
    if fold:
        assert isinstance(structure, Diagonal)
        tables = _block_tables(structure, topology, shape)
        into, out = _around_blocks(tables, input_permutation, output_permutation)
        gradient = value_gradient(tables.structure, grad, x, tables.blocks(values), tables.topology, into, out)
        return tables.diagonals(gradient).reshape(values.shape)
    if product is None and native_kernel:
        around = input_permutation, output_permutation
        return _native_value_gradient(structure, grad, x, topology, *around).to(values.dtype)
    grad, x = _permuted(grad, _inverse(output_permutation)), _permuted(x, input_permutation)
    return (format_of(structure) if product is None else product).value_gradient(structure, grad, x, values, topology)


def _python_product(structure: Structure, grad: torch.Tensor) -> TritonProduct | Format[Structure] | None:
    """What computes gradients before C++ kernels are asked: a registered kernel, or Triton's."""
    registered = registered_kernel(structure, grad.device, grad.dtype)
    return triton_product(structure, grad.device, grad.dtype) if registered is None else registered


def _format(structure: Structure, x: torch.Tensor) -> Format[Structure]:
    return registered_kernel(structure, x.device, x.dtype) or format_of(structure)


def _permuted(x: torch.Tensor, indices: torch.Tensor | None) -> torch.Tensor:
    return x if indices is None else gather_features(x, indices)


def _inverse(permutation: torch.Tensor | None) -> torch.Tensor | None:
    return None if permutation is None else remembered.inverse(permutation)


def _block_tables(structure: Diagonal, topology: Topology, shape: Shape) -> BlockTables:
    return remembered.remembered((block_tables, structure, shape), topology, lambda: block_tables(structure, topology, shape))


def _around_blocks(
    tables: BlockTables, input_permutation: torch.Tensor | None, output_permutation: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The permutations of the block product that stands for diagonals: those of the layer and those of the folding."""
    into, out = tables.input_permutation, tables.output_permutation
    into = into if input_permutation is None else remembered.compose(input_permutation, into)
    return into, out if output_permutation is None else remembered.compose(out, output_permutation)


def _beats_dense(structure: Structure, grad: torch.Tensor) -> bool:
    """Whether a native kernel's gradient takes less than the dense weight's: matrix units make up for zeros in bfloat16."""
    if not has_native_kernel(structure, grad.device, grad.dtype):
        return False
    return isinstance(structure, Block) or not (grad.dtype == torch.bfloat16 and native.interleaves(torch.bfloat16))


def _native_value_gradient(
    structure: Structure,
    grad: torch.Tensor,
    x: torch.Tensor,
    topology: Topology,
    *around: torch.Tensor | None,
) -> torch.Tensor:
    ops = torch.ops.padst_native
    match structure:
        case Block():
            gradient = ops.block_value_gradient(grad, x, *topology, structure.rows, structure.columns, *around)
        case NM():
            gradient = ops.nm_value_gradient(grad, x, *topology, structure.n, structure.m, structure.vector, *around)
        case _:
            gradient = ops.diagonal_value_gradient(grad, x, *topology, *around)
    return gradient  # type: ignore[no-any-return]  # a tensor


_NATIVE_OPS = {"block": "block_linear", "nm": "nm_linear", "diagonal": "diagonal_linear"}
