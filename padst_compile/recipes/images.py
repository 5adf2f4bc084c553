"""Images for classification, decoded once and kept in memory as bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from padst_compile.errors import TrainingDataError
from padst_compile.recipes.augmentation import flip_and_crop
from padst_compile.recipes.data import Batch, Epochs, Sampling, evenly, in_batches
from padst_compile.recipes.decoding import decode, image_size
from padst_compile.recipes.image_sources import find_images
from padst_compile.recipes.seeding import generator

_HELD_OUT = 0.1  # share of the training images that validate where there are no validation images
_SPLIT_SEED = 0  # one split for all seeds, so that runs can be compared
_LEAST_DEVIATION = 1 / 255


@dataclasses.dataclass(frozen=True)
class LabelledImages:
    """Decoded images: pixels uint8 `[images, 3, size, size]`, labels int64 `[images]`."""

    pixels: torch.Tensor
    labels: torch.Tensor

    def at(self, indices: torch.Tensor) -> LabelledImages:
        """Some of them."""
        return LabelledImages(self.pixels[indices], self.labels[indices])


class ImageData:
    """Training and validation images.

    Args:
        training: their mean and deviation per channel normalise all images.
        validation: the same size and classes.
        sampling: batch, seed, and how many images validate.
        augment: mirror and shift training images.
        class_names: where they are known.
    """

    def __init__(
        self,
        training: LabelledImages,
        validation: LabelledImages,
        sampling: Sampling,
        *,
        augment: bool = True,
        class_names: tuple[str, ...] = (),
    ) -> None:
        self.training, self.validation = training, validation
        self.sampling, self.augment, self.class_names = sampling, augment, class_names
        self.mean, self.deviation = _statistics(training.pixels)
        self._epochs = Epochs(len(training.labels), sampling.batch, sampling.seed)

    @property
    def classes(self) -> int:
        """One more than the highest label."""
        return int(max(self.training.labels.max(), self.validation.labels.max())) + 1

    @property
    def size(self) -> int:
        """Pixels of a side."""
        return self.training.pixels.shape[-1]

    def training_batch(self, step: int) -> Batch:
        """Normalised images `[batch, 3, size, size]` of a step, augmented."""
        chosen = self.training.at(self._epochs.indices(step))
        pixels = flip_and_crop(chosen.pixels, generator(self.sampling.seed, "augment", step)) if self.augment else chosen.pixels
        return Batch(self._normalised(pixels), chosen.labels, self.sampling.batch)

    def validation_batches(self) -> Iterator[Batch]:
        """Normalised validation images as they are."""
        for positions, count in in_batches(evenly(len(self.validation.labels), self.sampling.limit), self.sampling.batch):
            chosen = self.validation.at(positions)
            yield Batch(self._normalised(chosen.pixels), chosen.labels, count)

    def describe(self) -> dict[str, Any]:
        """Size, and how pixels in [0, 1] are normalised."""
        return {
            "kind": "images",
            "classes": self.classes,
            "names": list(self.class_names),
            "size": self.size,
            "mean": self.mean.tolist(),
            "std": self.deviation.tolist(),
            "images": [len(self.training.labels), len(self.validation.labels)],
        }

    def _normalised(self, pixels: torch.Tensor) -> torch.Tensor:
        return (pixels.float() / 255 - self.mean[:, None, None]) / self.deviation[:, None, None]


def load_images(
    path: Path,
    validation: Path | None,
    sampling: Sampling,
    *,
    size: int | None = None,
    augment: bool = True,
    threads: int = 1,
) -> ImageData:
    """Find, decode and keep images.

    Args:
        path: see `find_images`.
        validation: the same; without any validation images a tenth of the training images is held out.
        sampling: see `ImageData`.
        size: pixels of a side; None for the size of the first image.
        augment: mirror and shift training images.
        threads: that decode.

    Raises:
        TrainingDataError: no images, or some that cannot be read.
        MissingPackageError: a package for this kind of data is missing.
    """
    found, beside = find_images(path, validation)
    for images in (found, beside):
        if images is not None and not images.files:
            raise TrainingDataError(f"{images.source} holds no images")
    size = size or image_size(found)
    training = LabelledImages(decode(found, size, threads), torch.tensor(found.labels))
    if beside is not None:
        held_out = LabelledImages(decode(beside, size, threads), torch.tensor(beside.labels))
    else:
        training, held_out = _split(training, str(path))
    return ImageData(training, held_out, sampling, augment=augment, class_names=found.class_names)


def _split(images: LabelledImages, source: str) -> tuple[LabelledImages, LabelledImages]:
    total = len(images.labels)
    held_out = int(_HELD_OUT * total)
    if held_out == 0:
        raise TrainingDataError(f"{source} holds {total} images, too few to hold some out; give validation images")
    order = torch.randperm(total, generator=generator(_SPLIT_SEED, "held out"))
    return images.at(order[held_out:].sort().values), images.at(order[:held_out].sort().values)


def _statistics(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each channel in [0, 1], from exact counts of the 256 values."""
    counts = torch.stack([torch.bincount(pixels[:, channel].flatten(), minlength=256) for channel in range(pixels.shape[1])])
    values = torch.arange(256, dtype=torch.float64) / 255
    shares = counts / counts.sum(1, keepdim=True).double()
    mean = shares @ values
    deviation = ((shares * (values - mean[:, None]) ** 2).sum(1)).sqrt().clamp_min(_LEAST_DEVIATION)
    return mean.float(), deviation.float()
