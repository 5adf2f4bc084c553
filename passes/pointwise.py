"""Functions of one tensor that act on every element alike, so that they commute with any permutation."""

from __future__ import annotations

import operator

import torch
from torch import fx, nn
from torch.nn import functional as F

from padst_compile.passes.graph import mutates

_aten = torch.ops.aten
_UNARY_FUNCTIONS = {
    F.gelu, F.relu, F.silu, F.sigmoid, F.tanh, F.hardswish, F.mish, F.softplus, F.elu, F.leaky_relu,
    torch.relu, torch.sigmoid, torch.tanh, torch.neg, torch.exp, torch.square, operator.neg,
    _aten.gelu.default, _aten.relu.default, _aten.silu.default, _aten.sigmoid.default, _aten.tanh.default, _aten.neg.default,
}  # fmt: skip
_SCALAR_FUNCTIONS = {
    operator.add, operator.sub, operator.mul, operator.truediv, operator.pow, torch.add, torch.sub, torch.mul, torch.div,
    torch.pow, _aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor, _aten.div.Tensor, _aten.pow.Tensor_Scalar,
}  # fmt: skip
_METHODS = {"relu", "sigmoid", "tanh", "neg", "exp", "square", "contiguous", "float", "half", "bfloat16", "double"}
_MODULES = (
    nn.GELU, nn.ReLU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Mish, nn.Softplus, nn.ELU, nn.LeakyReLU, nn.Identity,
)  # fmt: skip


def is_unary_pointwise(node: fx.Node) -> bool:
    """Whether a call computes each element of its result from the same element of its one tensor argument."""
    tensors = node.all_input_nodes
    if len(tensors) != 1 or mutates(node):
        return False
    if node.op == "call_function":
        if node.target in (F.dropout, _aten.dropout.default):
            return _inactive_dropout(node)
        return node.target in _UNARY_FUNCTIONS or (node.target in _SCALAR_FUNCTIONS and _other_is_number(node))
    if node.op == "call_method":
        return node.target in _METHODS
    if node.op == "call_module":
        module = node.graph.owning_module.get_submodule(str(node.target)) if node.graph.owning_module else None
        return type(module) in _MODULES or (type(module) is nn.Dropout and not module.training)
    return False


def _other_is_number(node: fx.Node) -> bool:
    return len(node.args) == 2 and all(isinstance(arg, (fx.Node, int, float)) for arg in node.args)


def _inactive_dropout(node: fx.Node) -> bool:
    """Dropout draws its mask by position: it commutes only where it does nothing."""
    probability = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)
    training = node.args[2] if len(node.args) > 2 else node.kwargs.get("training", True)
    return bool(probability == 0) or training is False
