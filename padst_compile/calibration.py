"""What a model's linear layers read, measured on example batches: for scores that know more than magnitudes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from padst_compile.errors import CalibrationError


def input_norms(model: nn.Module, names: Iterable[str], batches: Iterable[Any]) -> dict[str, torch.Tensor]:
    """The 2-norm of each input feature of some layers, over all tokens of all batches (Wanda, Sun et al. 2024, equation 1).

    The model runs in evaluation mode without gradients, and is left as it was.

    Args:
        model: dense.
        names: of the layers.
        batches: each a tensor, a tuple of arguments or a mapping of keyword arguments of the model, on its device.

    Returns:
        Per layer float32 `[in_features]`, on the device of its input.

    Raises:
        CalibrationError: no batches, a layer that none reaches, or inputs that are not finite.
    """
    squares: dict[str, torch.Tensor] = {}
    modes = {module: module.training for module in model.modules()}
    handles = [model.get_submodule(name).register_forward_pre_hook(_adds_to(squares, name)) for name in names]
    try:
        model.eval()
        with torch.no_grad():
            count = sum(_run(model, batch) for batch in batches)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    if not count:
        raise CalibrationError("the calibration holds no batches; a loader that was read once may be empty")
    for name in names:
        if name not in squares:
            raise CalibrationError(f"no calibration batch reaches layer {name!r}; leave it out with ignore, or use others")
        if not bool(squares[name].isfinite().all()):
            raise CalibrationError(f"the inputs of layer {name!r} are not finite on the calibration batches")
    return {name: total.sqrt().float() for name, total in squares.items()}


def _run(model: nn.Module, batch: Any) -> int:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, (tuple, list)):
        model(*batch)
    else:
        model(batch)
    return 1


def _adds_to(squares: dict[str, torch.Tensor], name: str) -> Any:
    def add(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        total = inputs[0].detach().double().square().flatten(0, -2).sum(0)
        squares[name] = squares[name] + total if name in squares else total

    return add
