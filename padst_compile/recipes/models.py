"""Models to train, by name, with random weights, sized for their data.

timm:vit_tiny_patch16_224,patch_size=4   a timm model; images of the data's size and classes
mixer:num_blocks=8,embed_dim=256         timm's MLP-Mixer, whose named variants fix their patch size
hf:gpt2,n_layer=6,n_embd=384,n_head=6    a transformers model that predicts the next token
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from padst_compile.benchmarking.models import parse_setting, require_package
from padst_compile.errors import UnknownFieldError, UnknownModelError, did_you_mean
from padst_compile.recipes.seeding import seed_of

IMAGE_KINDS = ("timm", "mixer")
TEXT_KINDS = ("hf",)


def kind_of(name: str) -> str:
    """The part of a model's name before the colon.

    Raises:
        UnknownModelError: none that can be trained.
    """
    kind, colon, _ = name.partition(":")
    if not colon or kind not in (*IMAGE_KINDS, *TEXT_KINDS):
        raise UnknownModelError(
            f"cannot train model {name!r}; write timm:NAME,key=value or mixer:key=value for images, hf:TYPE,key=value for text"
        )
    return kind


def image_model(name: str, *, classes: int, size: int, seed: int) -> nn.Module:
    """A classifier: images float32 `[batch, 3, size, size]` -> logits `[batch, classes]`.

    Raises:
        UnknownModelError: no such model, or settings that it does not take.
    """
    base, *changes = name.partition(":")[2].split(",")
    timm = require_package("timm", name)
    sizes = {"num_classes": classes, "img_size": size}
    if kind_of(name) == "mixer":
        from timm.models.mlp_mixer import MlpMixer

        settings = _settings(filter(None, (base, *changes)), name)
        _check_names(settings, inspect.signature(MlpMixer).parameters, name)
        return _made(name, seed, lambda: MlpMixer(**{"patch_size": 4, **sizes, **settings}))
    if not timm.is_model(base):
        raise UnknownModelError(f"timm has no model {base!r}{did_you_mean(base, timm.list_models())}")
    settings = {**sizes, **_settings(changes, name)}

    def create() -> nn.Module:
        try:
            return timm.create_model(base, pretrained=False, **settings)  # type: ignore[no-any-return]  # timm is untyped
        except TypeError as error:
            if "'img_size'" not in str(error):
                raise
        del settings["img_size"]  # a convolutional network takes images of any size
        return timm.create_model(base, pretrained=False, **settings)  # type: ignore[no-any-return]  # timm is untyped

    return _made(name, seed, create)


def language_model(name: str, *, classes: int, context: int, seed: int) -> nn.Module:
    """A causal language model: tokens int64 `[batch, length]` -> an output with logits `[batch, length, classes]`.

    Raises:
        UnknownModelError: no such model, or one that does not predict the next token.
        UnknownFieldError: a setting that its configuration does not have.
    """
    model_type, *changes = name.partition(":")[2].split(",")
    transformers = require_package("transformers", name)
    known = transformers.CONFIG_MAPPING
    if model_type not in known:
        raise UnknownModelError(f"transformers has no model type {model_type!r}{did_you_mean(model_type, list(known))}")
    settings = _settings(changes, name)
    default = known[model_type]()
    _check_names(settings, {**default.to_dict(), **default.attribute_map}, name)
    own = {"vocab_size": classes, "bos_token_id": None, "eos_token_id": None, "use_cache": False}
    length = default.attribute_map.get("max_position_embeddings", "max_position_embeddings")
    config = known[model_type](**{length: context, **own, **settings})
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING or getattr(config, "is_encoder_decoder", False):
        raise UnknownModelError(f"{name!r} does not predict the next token of a text; hf:gpt2 and hf:llama do")
    return _made(name, seed, lambda: transformers.AutoModelForCausalLM.from_config(config)).train()


def _made(name: str, seed: int, build: Callable[[], nn.Module]) -> nn.Module:
    """With random weights that depend on the seed alone, and without a trace in the global generator."""
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(seed, "weights"))
            return build()
    except (TypeError, ValueError, AssertionError) as error:
        raise UnknownModelError(f"cannot build {name!r}: {error}") from error


def _settings(changes: Iterable[str], name: str) -> dict[str, Any]:
    return dict(parse_setting(change, name) for change in changes)


def _check_names(settings: Mapping[str, Any], known: Iterable[str], name: str) -> None:
    choices = list(known)
    for key in settings:
        if key not in choices:
            raise UnknownFieldError(f"setting of {name!r}:", key, choices)
