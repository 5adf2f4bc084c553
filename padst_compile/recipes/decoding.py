"""Image files to pixels in memory."""

from __future__ import annotations

import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from padst_compile.errors import TrainingDataError
from padst_compile.recipes.image_sources import EncodedImages
from padst_compile.recipes.packages import require

_CHANNELS = 3


def image_size(images: EncodedImages) -> int:
    """The longer side of the first image in pixels: the size to train at where none is asked for."""
    with _open(images.files[0], images.source, 0) as image:
        return int(max(image.size))


def decode(images: EncodedImages, size: int, threads: int = 1) -> torch.Tensor:
    """All images as RGB, uint8 `[images, 3, size, size]`; those of another size are scaled (bicubic).

    Args:
        images: encoded.
        size: of both sides, in pixels.
        threads: that decode.

    Raises:
        TrainingDataError: a file that is no image, or more pixels than the memory of this machine holds.
        MissingPackageError: Pillow is missing.
    """
    total = len(images.files)
    needed, present = total * _CHANNELS * size * size, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > present:
        raise TrainingDataError(
            f"{images.source}: {total} images of {size} x {size} take {needed / 2**30:.1f} GiB in memory, "
            f"and this machine has {present / 2**30:.1f}; choose a smaller image size"
        )
    pixels = torch.empty(total, _CHANNELS, size, size, dtype=torch.uint8)

    def one(index: int) -> None:
        with _open(images.files[index], images.source, index) as image:
            try:
                rgb = image.convert("RGB")
            except OSError as error:
                raise TrainingDataError(f"{images.source}: image {index} is damaged: {error}") from error
        rgb = rgb if rgb.size == (size, size) else rgb.resize((size, size), resample=3)  # Image.Resampling.BICUBIC
        pixels[index] = torch.from_numpy(np.array(rgb)).permute(2, 0, 1)

    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(one, range(total), chunksize=256):
            pass
    return pixels


def _open(file: bytes | Path, source: str, index: int) -> Any:
    pillow = require("PIL.Image", "decoding images", "pillow")
    try:
        return pillow.open(io.BytesIO(file) if isinstance(file, bytes) else file)
    except OSError as error:  # Pillow's UnidentifiedImageError is one
        what = f"image {index}" if isinstance(file, bytes) else str(file)
        raise TrainingDataError(f"{source}: {what} is no image that Pillow can read") from error
