"""Models by name, built from their configurations with random weights: nothing is downloaded.

timm:vit_base_patch16_224        any timm model that takes images
hf:gpt2                          a transformers model type with its default configuration
hf:llama,hidden_size=256,…       … with some of it changed
linear:768:3072                  one linear layer, inputs : outputs
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from padst_compile.errors import UnknownModelError, did_you_mean


@dataclasses.dataclass(frozen=True)
class ModelCase:
    """A dense model with inputs.

    Args:
        name: as given.
        model: in eval mode.
        args: positional inputs.
        kwargs: keyword inputs.
        tokens: rows that its linear layers see, for the record; None for images.
        note: what a reader of a result must know about the inputs.
    """

    name: str
    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tokens: int | None = None
    note: str = ""

    def on(self, device: torch.device) -> ModelCase:
        """The same on a device; the model itself is moved, not a copy."""

        def moved(value: Any) -> Any:
            return value.to(device) if isinstance(value, torch.Tensor) else value

        kwargs = {name: moved(value) for name, value in self.kwargs.items()}
        return dataclasses.replace(self, model=self.model.to(device), args=tuple(map(moved, self.args)), kwargs=kwargs)

    def inputs_as(self, dtype: torch.dtype) -> tuple[Any, ...]:
        """The positional inputs with floating tensors in `dtype`."""
        return tuple(a.to(dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in self.args)


def build_model(name: str, *, batch: int = 1, tokens: int = 256, seed: int = 0) -> ModelCase:
    """Build a model and inputs for it.

    Args:
        name: see the module's docstring.
        batch: images or sequences.
        tokens: length of a sequence; rows for `linear:`.
        seed: of weights and inputs.

    Raises:
        UnknownModelError: no such model, or a package that is not installed.
    """
    kind, _, rest = name.partition(":")
    builders: dict[str, Callable[[str, str, int, int], ModelCase]] = {"timm": _timm, "hf": _transformers, "linear": _linear}
    if kind not in builders or not rest:
        raise UnknownModelError(f"cannot read model {name!r}; write timm:NAME, hf:TYPE or linear:IN:OUT")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        case = builders[kind](name, rest, batch, tokens)
        _fill_zero_weights(case.model)
    case.model.eval()
    return case


def first_tensor(output: Any) -> torch.Tensor:
    """The tensor that a model's output is about: logits or hidden states."""
    if isinstance(output, torch.Tensor):
        return output
    for key in ("logits", "last_hidden_state"):
        if getattr(output, key, None) is not None:
            return getattr(output, key)  # type: ignore[no-any-return]  # model outputs are untyped
    return first_tensor(output[0])


def _fill_zero_weights(model: nn.Module) -> None:
    """Random values for weights that an initialisation left at zero: a zero head would hide every error before it."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and not parameter.any():
                parameter.normal_(std=0.02)


def _timm(name: str, model_name: str, batch: int, tokens: int) -> ModelCase:
    timm = require_package("timm", name)
    if not timm.is_model(model_name):
        raise UnknownModelError(f"timm has no model {model_name!r}{did_you_mean(model_name, timm.list_models())}")
    model = timm.create_model(model_name, pretrained=False)
    images = torch.randn(batch, *model.pretrained_cfg["input_size"])
    return ModelCase(name, model, (images,), {})


def _transformers(name: str, text: str, batch: int, tokens: int) -> ModelCase:
    transformers = require_package("transformers", name)
    model_type, *changes = text.split(",")
    known = transformers.CONFIG_MAPPING
    if model_type not in known:
        raise UnknownModelError(f"transformers has no model type {model_type!r}{did_you_mean(model_type, list(known))}")
    config = known[model_type](**dict(parse_setting(change, name) for change in changes))
    causal = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING and not getattr(config, "is_encoder_decoder", False)
    causal = causal and model_type not in ("bert", "roberta", "electra")
    auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    model = auto.from_config(config)
    ids = torch.randint(0, config.vocab_size, (batch, tokens))
    if causal:
        # What `generate` computes of a prompt: every hidden state, the logits of the last token.
        kwargs = {"input_ids": ids, "use_cache": False, "logits_to_keep": 1}
        return ModelCase(name, model, (), kwargs, tokens, "prompt processing: logits of the last token, as generate() does")
    return ModelCase(name, model, (), {"input_ids": ids}, tokens)


def _linear(name: str, text: str, batch: int, tokens: int) -> ModelCase:
    try:
        in_features, out_features = (int(size) for size in text.replace("x", ":").split(":"))
    except ValueError as error:
        raise UnknownModelError(f"cannot read {name!r}; write linear:IN:OUT, as in linear:768:3072") from error
    layer = nn.Sequential(nn.Linear(in_features, out_features))
    return ModelCase(name, layer, (torch.randn(batch * tokens, in_features),), {}, batch * tokens)


def parse_setting(text: str, name: str) -> tuple[str, Any]:
    """Key and value of `key=value`; the value is a Python literal or, failing that, a string.

    Raises:
        UnknownModelError: `text` is nothing of the kind; the message quotes `name`.
    """
    key, equals, value = text.partition("=")
    if not equals:
        raise UnknownModelError(f"cannot read {text!r} in {name!r}; write key=value")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def require_package(package: str, name: str) -> Any:
    """The module `package`, which the model `name` needs.

    Raises:
        UnknownModelError: it is not installed.
    """
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UnknownModelError(f"{name!r} needs {package}; install padst_compile[{package}]") from error
