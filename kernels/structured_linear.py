"""`padst::structured_linear`: the structured-sparse product with its permutations and bias, and its gradients.

One op serves every structure: the structure travels as its short string, its topology as a list of index tensors. So a
pass that moves permutations or biases knows one schema, and a new structure needs no new op.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from padst_compile.kernels import dispatch, gradient_tap, remembered
from padst_compile.structures import Shape, parse


@torch.library.custom_op("padst::structured_linear", mutates_args=())
def structured_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    topology: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    input_permutation: torch.Tensor | None,
    output_permutation: torch.Tensor | None,
    out_features: int,
    structure: str,
) -> torch.Tensor:
    """`permute(permute(x, input_permutation) @ S.T, output_permutation) + bias` (PA-DST section 3, `y = S Π x`).

    Args:
        x: `[..., in_features]`, floating.
        values: the active weights, packed as the structure says, same dtype as `x`.
        topology: the structure's index tensors.
        bias: `[out_features]` or None.
        input_permutation: int32 `[in_features]` or None.
        output_permutation: int32 `[out_features]` or None.
        out_features: rows of S.
        structure: short form of the structure, as in `block:64x64`.

    Returns:
        Contiguous `[..., out_features]` in the dtype of `x`.
    """
    return dispatch.forward(
        parse(structure), x, values, tuple(topology), bias, input_permutation, output_permutation, out_features
    )


@structured_linear.register_fake
def _structured_linear_fake(
    x: torch.Tensor,
    values: torch.Tensor,
    topology: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    input_permutation: torch.Tensor | None,
    output_permutation: torch.Tensor | None,
    out_features: int,
    structure: str,
) -> torch.Tensor:
    torch._check(x.dtype == values.dtype, lambda: f"x is {x.dtype} but the weights are {values.dtype}")
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.custom_op("padst::structured_input_gradient", mutates_args=())
def structured_input_gradient(
    grad: torch.Tensor,
    values: torch.Tensor,
    topology: Sequence[torch.Tensor],
    in_features: int,
    structure: str,
    input_permutation: torch.Tensor | None = None,
    output_permutation: torch.Tensor | None = None,
) -> torch.Tensor:
    """The gradient of the inputs of `structured_linear`: `permute(permute(grad, inverse(out)) @ S, inverse(in))`.

    Args:
        grad: `[..., out_features]`, of the outputs.
        values: as for `structured_linear`.
        topology: as for `structured_linear`.
        in_features: columns of S.
        structure: as for `structured_linear`.
        input_permutation: that of `structured_linear`, int32 `[in_features]` or None.
        output_permutation: that of `structured_linear`, int32 `[out_features]` or None.

    Returns:
        `[..., in_features]` in the dtype of `grad`.
    """
    rows = grad.reshape(-1, grad.shape[-1])
    around = input_permutation, output_permutation
    gradient = dispatch.input_gradient(parse(structure), rows, values, tuple(topology), in_features, *around)
    return gradient.reshape(*grad.shape[:-1], in_features)


@structured_input_gradient.register_fake
def _structured_input_gradient_fake(
    grad: torch.Tensor,
    values: torch.Tensor,
    topology: Sequence[torch.Tensor],
    in_features: int,
    structure: str,
    input_permutation: torch.Tensor | None = None,
    output_permutation: torch.Tensor | None = None,
) -> torch.Tensor:
    return grad.new_empty((*grad.shape[:-1], in_features))


@torch.library.custom_op("padst::structured_value_gradient", mutates_args=())
def structured_value_gradient(
    grad: torch.Tensor,
    x: torch.Tensor,
    values: torch.Tensor,
    topology: Sequence[torch.Tensor],
    structure: str,
    input_permutation: torch.Tensor | None = None,
    output_permutation: torch.Tensor | None = None,
) -> torch.Tensor:
    """The gradient of `values`: the active entries of `permute(grad, inverse(out)).T @ permute(x, in)`, packed like them.

    Args:
        grad: `[..., out_features]`, of the outputs of `structured_linear`.
        x: `[..., in_features]`, its inputs.
        values: the packed weights.
        topology: as for `structured_linear`.
        structure: as for `structured_linear`.
        input_permutation: that of `structured_linear`, int32 `[in_features]` or None.
        output_permutation: that of `structured_linear`, int32 `[out_features]` or None.

    Returns:
        In the shape and dtype of `values`.
    """
    rows, inputs = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    listener = gradient_tap.listener_of(topology)
    if listener is not None:  # it hears of S alone, without the permutations
        back = None if output_permutation is None else remembered.inverse(output_permutation)
        listener.products(rows, inputs, back, input_permutation)
    around = input_permutation, output_permutation
    return dispatch.value_gradient(parse(structure), rows, inputs, values, tuple(topology), *around)


@structured_value_gradient.register_fake
def _structured_value_gradient_fake(
    grad: torch.Tensor,
    x: torch.Tensor,
    values: torch.Tensor,
    topology: Sequence[torch.Tensor],
    structure: str,
    input_permutation: torch.Tensor | None = None,
    output_permutation: torch.Tensor | None = None,
) -> torch.Tensor:
    return values.new_empty(values.shape)


@torch.library.custom_op("padst::to_dense", mutates_args=())
def to_dense(
    values: torch.Tensor, topology: Sequence[torch.Tensor], out_features: int, in_features: int, structure: str
) -> torch.Tensor:
    """The dense weight `[out_features, in_features]` of a packed one."""
    parsed, shape = parse(structure), Shape(out_features, in_features)
    dispatch.check_indices(parsed, tuple(topology), shape)
    return parsed.unpack(values, tuple(topology), shape).clone()


@to_dense.register_fake
def _to_dense_fake(
    values: torch.Tensor, topology: Sequence[torch.Tensor], out_features: int, in_features: int, structure: str
) -> torch.Tensor:
    return values.new_empty((out_features, in_features))


@torch.library.custom_op("padst::to_values", mutates_args=())
def to_values(weight: torch.Tensor, topology: Sequence[torch.Tensor], values: torch.Tensor, structure: str) -> torch.Tensor:
    """The active entries of a dense `weight`, packed in the shape of `values`."""
    listener = gradient_tap.listener_of(topology)
    if listener is not None:  # the op is the gradient of `to_dense`, so the weight is one too
        listener.weight(weight)
    return parse(structure).pack(weight, tuple(topology)).clone()


@to_values.register_fake
def _to_values_fake(
    weight: torch.Tensor, topology: Sequence[torch.Tensor], values: torch.Tensor, structure: str
) -> torch.Tensor:
    return weight.new_empty(values.shape)


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, values, topology, bias, input_permutation, output_permutation, _, structure = inputs
    ctx.save_for_backward(x, values, input_permutation, output_permutation, *topology)
    ctx.structure, ctx.bias_dtype = structure, None if bias is None else bias.dtype


def _linear_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    x, values, input_permutation, output_permutation, *topology = ctx.saved_tensors
    ops = torch.ops.padst
    need_x, need_values, _, need_bias = ctx.needs_input_grad[:4]
    grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype) if need_bias else None
    around = input_permutation, output_permutation
    grad_x = grad_values = None
    if need_x:
        grad_x = ops.structured_input_gradient(grad, values, topology, x.shape[-1], ctx.structure, *around)
    if need_values:
        grad_values = ops.structured_value_gradient(grad, x, values, topology, ctx.structure, *around)
    return grad_x, grad_values, [None] * len(topology), grad_bias, None, None, None, None


def _save_dense(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    values, topology, _, _, structure = inputs
    ctx.save_for_backward(values, *topology)
    ctx.structure = structure


def _dense_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    values, *topology = ctx.saved_tensors
    grad_values = torch.ops.padst.to_values(grad, topology, values, ctx.structure)
    return grad_values, [None] * len(topology), None, None, None


structured_linear.register_autograd(_linear_backward, setup_context=_save_linear)
to_dense.register_autograd(_dense_backward, setup_context=_save_dense)


def _autocast(x: torch.Tensor, values: torch.Tensor, topology: Any, bias: torch.Tensor | None, *rest: Any) -> torch.Tensor:
    """Under autocast, compute like `F.linear` does: floating arguments in the autocast dtype (float64 stays)."""
    device = x.device.type

    def cast(tensor: torch.Tensor | None) -> torch.Tensor | None:
        lower = tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64
        return tensor.to(torch.get_autocast_dtype(device)) if lower and tensor is not None else tensor

    with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
        y: torch.Tensor = torch.ops.padst.structured_linear(cast(x), cast(values), topology, cast(bias), *rest)
        return y


_AUTOCAST_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)
_AUTOCAST_LIBRARY = torch.library.Library("padst", "FRAGMENT")
for _key in ("AutocastCPU", "AutocastCUDA"):
    _AUTOCAST_LIBRARY.impl("structured_linear", _autocast, _key)
