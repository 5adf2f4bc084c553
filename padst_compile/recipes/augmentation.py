"""Random changes of training images: a mirror and a shift, as usual for small images."""

from __future__ import annotations

import torch
from torch.nn import functional as F

_PADDING_SHARE = 8  # images of 32 pixels are shifted by up to 4


def flip_and_crop(images: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Mirror half of the images and cut each from a black frame, at a random place.

    Args:
        images: uint8 `[batch, 3, height, width]`; left as they are.
        random: what the changes depend on.

    Returns:
        The same shape and dtype.
    """
    count, _, height, width = images.shape
    padding = max(height, width) // _PADDING_SHARE
    mirrored = torch.rand(count, generator=random) < 0.5  # noqa: PLR2004  # half of them
    images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    padded = F.pad(images, (padding,) * 4)
    top, left = torch.randint(2 * padding + 1, (2, count, 1), generator=random)
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    return padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
