"""Tells transformers' configurations of sparse layers, so that a model's own `save_pretrained` writes what loading it needs.

Transformers knows weights that are stored in a special way by `config.quantization_config`, a dictionary in `config.json`. What
reads it is `padst_compile.integrations.transformers`. Models are recognised by name, so that transformers stays optional.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from padst_compile.layout import layouts_to_dict

QUANT_METHOD = "padst"
VERSION = 1
_CONFIG = "quantization_config"


def note(model: nn.Module) -> None:
    """Write the layouts of the sparse layers into the configuration of each transformers model in `model`."""
    for part in _transformers_models(model):
        layers = layouts_to_dict(part)
        if layers:
            setattr(part.config, _CONFIG, {"quant_method": QUANT_METHOD, "version": VERSION, "layers": layers})


def forget(model: nn.Module) -> None:
    """Undo `note`, for a model that is dense again."""
    for part in _transformers_models(model):
        if _method(getattr(part.config, _CONFIG, None)) == QUANT_METHOD:
            delattr(part.config, _CONFIG)


def _method(config: Any) -> object:
    return config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)


def _transformers_models(model: nn.Module) -> Iterator[Any]:
    """The outermost ones: inner ones share their configuration."""
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") or outer == "" for outer in found)
        if not inside and any(
            c.__name__ == "PreTrainedModel" and c.__module__.startswith("transformers.") for c in type(module).__mro__
        ):
            found.append(name)
            yield module
