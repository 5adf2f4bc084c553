"""The two things that `padst train` trains for: the class of an image, and the next token of a text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from padst_compile.recipes.config import TrainConfig
from padst_compile.recipes.data import Data, Sampling
from padst_compile.recipes.images import ImageData, load_images
from padst_compile.recipes.models import IMAGE_KINDS, image_model, kind_of, language_model
from padst_compile.recipes.text import TextData, load_text


@dataclasses.dataclass(frozen=True)
class Task:
    """A data set and the dense model that learns it.

    Args:
        data: batches of it.
        build: the model with the random weights that the configuration's seed gives, in training mode.
    """

    data: Data
    build: Callable[[], nn.Module]


def make_task(config: TrainConfig) -> Task:
    """The task of a run: its data, read into memory, and its model, which is built when asked for.

    Raises:
        UnknownModelError: a model that cannot be trained.
        TrainingDataError: data that is not there or cannot be read.
        MissingPackageError: a package for this kind of data is missing.
    """
    if kind_of(config.model) in IMAGE_KINDS:
        images = _images(config)
        return Task(images, lambda: image_model(config.model, classes=images.classes, size=images.size, seed=config.seed))
    text = _text(config)
    return Task(text, lambda: language_model(config.model, classes=text.classes, context=text.context, seed=config.seed))


def example_of(data: Data, device: torch.device) -> torch.Tensor:
    """One input of a model, to capture its graph with."""
    return next(iter(data.validation_batches())).inputs[:1].to(device)


def _images(config: TrainConfig) -> ImageData:
    return load_images(
        Path(config.data),
        _path(config.validation),
        _sampling(config),
        size=config.image_size,
        augment=config.augment,
        threads=config.threads or torch.get_num_threads(),
    )


def _text(config: TrainConfig) -> TextData:
    return load_text(
        Path(config.data),
        _path(config.validation),
        _sampling(config),
        tokens=config.tokens,
        context=config.context,
    )


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)


def _sampling(config: TrainConfig) -> Sampling:
    return Sampling(config.batch, config.seed, config.eval_limit)
