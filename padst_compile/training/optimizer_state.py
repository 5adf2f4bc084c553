"""Optimizer state by the names of parameters, so that it can be saved and loaded by any number of ranks.

torch's `get_optimizer_state_dict` takes a step of an optimizer without state, which would run the hooks of the training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from padst_compile.errors import ResumeError

Names = dict[int, str]  # of parameters, by identity


def parameter_names(model: nn.Module) -> Names:
    """The name of every parameter, without what `torch.compile` puts into it."""
    return {id(parameter): name.replace("_orig_mod.", "") for name, parameter in model.named_parameters()}


def tensors_of(optimizer: torch.optim.Optimizer, names: Names) -> dict[str, torch.Tensor]:
    """All tensors of the state, under `<parameter>.<entry>`: the tensors themselves."""
    return {
        f"{name}.{entry}": value
        for name, parameter in _parameters(optimizer, names).items()
        for entry, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, torch.Tensor)
    }


def rest_of(optimizer: torch.optim.Optimizer, names: Names) -> dict[str, Any]:
    """What is not in `tensors_of`: entries that are no tensors, and the groups with the names of their parameters."""
    found = _parameters(optimizer, names)
    own_names = {id(parameter): name for name, parameter in found.items()}
    plain = {
        name: {entry: value for entry, value in optimizer.state[parameter].items() if not isinstance(value, torch.Tensor)}
        for name, parameter in found.items()
        if parameter in optimizer.state
    }
    groups = [
        {**group, "params": [own_names[id(parameter)] for parameter in group["params"]]} for group in optimizer.param_groups
    ]
    return {"kind": type(optimizer).__name__, "plain": plain, "groups": groups}


def check(optimizer: torch.optim.Optimizer, names: Names, rest: Mapping[str, Any]) -> None:
    """Compare an optimizer with `rest_of` another.

    Raises:
        ResumeError: another kind, or other parameters.
    """
    own = rest_of(optimizer, names)
    if own["kind"] != rest["kind"]:
        raise ResumeError(f"the checkpoint holds the state of an optimizer {rest['kind']}, this one is {own['kind']}")
    mine, theirs = ([group["params"] for group in groups] for groups in (own["groups"], rest["groups"]))
    if mine != theirs:
        odd = sorted({name for group in mine for name in group} ^ {name for group in theirs for name in group})
        how = f"they differ in {', '.join(odd[:3])}" if odd else "the same ones in other groups or in another order"
        raise ResumeError(f"the checkpoint's optimizer holds other parameters than this one: {how}")


def room_for(
    optimizer: torch.optim.Optimizer, names: Names, stored: Mapping[str, tuple[Sequence[int], torch.dtype]]
) -> dict[str, torch.Tensor]:
    """Tensors to read a state into, sharded as the parameters are.

    Args:
        optimizer: that will get them.
        names: of the parameters.
        stored: size and dtype by the names of `tensors_of`.
    """
    parameters = _parameters(optimizer, names)
    room = {}
    for name, (size, dtype) in stored.items():
        parameter = parameters[name.rpartition(".")[0]].detach()
        like = tuple(size) == tuple(parameter.shape)
        room[name] = torch.empty_like(parameter, dtype=dtype) if like else torch.empty(tuple(size), dtype=dtype, device="cpu")
    return room


def load(optimizer: torch.optim.Optimizer, names: Names, tensors: Mapping[str, torch.Tensor], rest: Mapping[str, Any]) -> None:
    """Give the optimizer a state that `check` has found to fit."""
    numbers = {name: number for number, name in enumerate(_parameters(optimizer, names))}
    state: dict[int, dict[str, Any]] = {numbers[name]: dict(plain) for name, plain in rest["plain"].items()}
    for name, tensor in tensors.items():
        parameter, _, entry = name.rpartition(".")
        state[numbers[parameter]][entry] = tensor
    groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in rest["groups"]]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _parameters(optimizer: torch.optim.Optimizer, names: Names) -> dict[str, torch.Tensor]:
    """By name, in the optimizer's order; one that the model does not have is called by its place."""
    return {
        names.get(id(parameter), f"group {number} parameter {place}"): parameter
        for number, group in enumerate(optimizer.param_groups)
        for place, parameter in enumerate(group["params"])
    }
