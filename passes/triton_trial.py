"""What is asked of a call of a Triton kernel before its activations are laid out anew: its launch, and a run to measure it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from padst_compile.kernels import dispatch, triton_support
from padst_compile.kernels.launch import Problem
from padst_compile.passes.context import Context
from padst_compile.passes.graph import argument, fake, rows
from padst_compile.passes.native_calls import activations, is_block_linear, is_nm_linear
from padst_compile.structures import NM, Block, Diagonal, Structure


def launch_of(node: fx.Node, facts: Context, *, reads: bool, writes: bool) -> Problem:
    """The launch of a call; `reads` and `writes` say whether its inputs and its result lie feature-major."""
    known, result, values = activations(node), fake(node), facts.value(argument(node, "values"))
    assert known is not None
    assert result is not None
    structure = _structure(node, facts)
    x = result.new_empty((rows(known), int(known.shape[-1])))
    tables = (argument(node, name) for name in ("input_permutation", "output_permutation"))
    behind = (argument(node, name) for name in ("bias", "activation", "gate", "residual"))
    problem = triton_support.problem(
        f"{structure.kind}_forward", structure.to_string(), x, values, argument(node, "out_features"),
        permuted=triton_support.permuted_name(*tables), epilogue=triton_support.epilogue_name(*behind),
    )  # fmt: skip
    return dataclasses.replace(problem, layout=f"{_name(reads)}/{_name(writes)}")


def why_token_major(node: fx.Node, facts: Context) -> str | None:
    """Why a call does not gain by inputs with tokens adjacent; None where it does."""
    known = fake(node)
    assert known is not None
    product = dispatch.triton_product(_structure(node, facts), known.device, known.dtype)
    assert product is not None
    return product.why_token_major(launch_of(node, facts, reads=True, writes=False))


def trial(node: fx.Node, facts: Context, launch: Problem) -> Callable[[], torch.Tensor]:
    """The call on random activations, in the layouts of `launch`, with the weights that it has."""
    result, (reads, writes) = fake(node), (side == "feature" for side in launch.layout.split("/"))
    assert result is not None
    device, dtype = result.device, result.dtype
    # Its own generator: compiling must not change the random numbers that a model draws.
    generator = torch.Generator(device).manual_seed(0)

    def random(features: int, *, feature_major: bool) -> torch.Tensor:
        sizes = (features, launch.tokens) if feature_major else (launch.tokens, features)
        drawn = torch.randn(sizes, device=device, generator=generator).to(dtype)
        return drawn.T if feature_major else drawn

    def given(name: str) -> Any:
        value = argument(node, name)
        if name == "x":
            return random(launch.in_features, feature_major=reads)
        if name in ("gate", "residual") and value is not None:
            return random(launch.out_features, feature_major=writes)
        return writes if name == "feature_major" else fx.map_arg(value, facts.value)

    product = node.target
    assert isinstance(product, torch._ops.OpOverload)
    arguments = [given(parameter.name) for parameter in product._schema.arguments]
    return lambda: product(*arguments)


def _structure(node: fx.Node, facts: Context) -> Structure:
    sizes = facts.value(argument(node, "values")).shape
    if is_block_linear(node):
        return Block((sizes[2], sizes[1]))
    return NM(argument(node, "n"), argument(node, "m"), sizes[2]) if is_nm_linear(node) else Diagonal()


def _name(feature_major: bool) -> str:
    return "feature" if feature_major else "token"
