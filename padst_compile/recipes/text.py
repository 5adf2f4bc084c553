"""Text for language models: characters or bytes of a UTF-8 file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from padst_compile.errors import TrainingDataError
from padst_compile.recipes.data import Batch, Sampling, evenly, in_batches
from padst_compile.recipes.seeding import generator

_TRAINING_SHARE = 0.9  # of a file without a validation file beside it, as is usual for tiny Shakespeare


class TextData:
    """Windows of a text, drawn at random in training and side by side in validation.

    Args:
        training: token ids int32 `[tokens]`.
        validation: the same.
        vocabulary: what the ids stand for.
        sampling: batch, seed, and how many windows validate.
        context: length of a window.

    Raises:
        TrainingDataError: a text is shorter than a window and the token behind it.
    """

    def __init__(
        self,
        training: torch.Tensor,
        validation: torch.Tensor,
        vocabulary: list[str],
        sampling: Sampling,
        *,
        context: int,
    ) -> None:
        for name, tokens in (("training", training), ("validation", validation)):
            if len(tokens) <= context:
                raise TrainingDataError(
                    f"the {name} text has {len(tokens)} tokens, too few for one window of {context} and the token behind it; "
                    "use a longer text or a shorter context"
                )
        self.training, self.validation, self.vocabulary = training, validation, vocabulary
        self.sampling, self.context = sampling, context

    @property
    def classes(self) -> int:
        """Size of the vocabulary."""
        return len(self.vocabulary)

    def training_batch(self, step: int) -> Batch:
        """Windows at random places, `[batch, context]`."""
        last = len(self.training) - self.context
        starts = torch.randint(last, (self.sampling.batch,), generator=generator(self.sampling.seed, "windows", step))
        return self._windows(self.training, starts, self.sampling.batch)

    def validation_batches(self) -> Iterator[Batch]:
        """Windows side by side; what is left over at the end of the text is not used."""
        windows = (len(self.validation) - 1) // self.context
        for positions, count in in_batches(evenly(windows, self.sampling.limit), self.sampling.batch):
            yield self._windows(self.validation, positions * self.context, count)

    def describe(self) -> dict[str, Any]:
        """The vocabulary: the token with id i stands at place i."""
        tokens = [len(self.training), len(self.validation)]
        return {"kind": "text", "vocabulary": self.vocabulary, "context": self.context, "tokens": tokens}

    def _windows(self, tokens: torch.Tensor, starts: torch.Tensor, count: int) -> Batch:
        windows = tokens[starts[:, None] + torch.arange(self.context + 1)].long()
        return Batch(windows[:, :-1].contiguous(), windows[:, 1:].contiguous(), count)


def load_text(path: Path, validation: Path | None, sampling: Sampling, *, tokens: str = "characters", context: int) -> TextData:
    """Read a text.

    Args:
        path: a UTF-8 file.
        validation: another; None takes the last tenth of `path`.
        tokens: `"characters"` (those that occur) or `"bytes"`.
        sampling: see `TextData`.
        context: the same.

    Raises:
        TrainingDataError: a file that cannot be read as UTF-8, or is too short.
    """
    texts = [_read(path)] + ([] if validation is None else [_read(validation)])
    if tokens == "bytes":
        vocabulary = [chr(value) for value in range(256)]
        encoded = [torch.from_numpy(np.frombuffer(text.encode(), np.uint8).astype(np.int32)) for text in texts]
    else:
        points = [np.frombuffer(text.encode("utf-32-le"), np.uint32) for text in texts]
        used = np.unique(np.concatenate(points))
        vocabulary = [chr(point) for point in used]
        encoded = [torch.from_numpy(np.searchsorted(used, text).astype(np.int32)) for text in points]
    if validation is None:
        split = int(_TRAINING_SHARE * len(encoded[0]))
        encoded = [encoded[0][:split], encoded[0][split:]]
    return TextData(encoded[0], encoded[1], vocabulary, sampling, context=context)


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode()  # not read_text, which would translate line ends
    except OSError as error:
        raise TrainingDataError(f"cannot read the text {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TrainingDataError(
            f"{path} is not UTF-8: {error.reason} at byte {error.start}; convert it, or give the right file"
        ) from error
