"""Where images come from: parquet files as on Hugging Face's hub, or folders with one subfolder per class."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from padst_compile.errors import TrainingDataError
from padst_compile.recipes.packages import require

_TRAINING_NAMES = ("train", "training")
_VALIDATION_NAMES = ("validation", "valid", "val", "test")
_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "labels", "fine_label")


@dataclasses.dataclass(frozen=True)
class EncodedImages:
    """Images as they are stored, and their classes.

    Args:
        files: the content of an image file, or the path to it, for each image.
        labels: class of each image.
        source: for messages.
        class_names: where they are known.
    """

    files: Sequence[bytes | Path]
    labels: Sequence[int]
    source: str
    class_names: tuple[str, ...] = ()


def find_images(path: Path, validation: Path | None = None) -> tuple[EncodedImages, EncodedImages | None]:
    """Training images and, where there are any, validation images.

    Args:
        path: a parquet file; a folder of parquet files with "train" and "validation" (or "val", "test") in their names; a
            folder with subfolders of these names; or a folder with one subfolder of images per class.
        validation: a parquet file or a folder of classes; None looks beside the training images, as above.

    Raises:
        TrainingDataError: nothing of the kind.
        MissingPackageError: pyarrow or torchvision is missing.
    """
    if validation is not None:
        return _read(_one_split(path, _TRAINING_NAMES) or [path]), _read(
            _one_split(validation, _VALIDATION_NAMES) or [validation]
        )
    training = _one_split(path, _TRAINING_NAMES)
    if training is None:
        return _read([path]), None
    beside = _one_split(path, _VALIDATION_NAMES)
    return _read(training), None if beside is None else _read(beside)


def _one_split(folder: Path, names: Sequence[str]) -> list[Path] | None:
    """The subfolder or the parquet files of a split; None for a path that is not divided that way."""
    if not folder.is_dir():
        return None
    for name in names:
        if (folder / name).is_dir():
            return [folder / name]
    for name in names:
        files = sorted(path for path in folder.glob("*.parquet") if name in path.name)
        if files:
            return files
    return None


def _read(paths: Sequence[Path]) -> EncodedImages:
    first = paths[0]
    if first.is_dir():
        return _read_folder(first)
    if not first.exists():
        raise TrainingDataError(f"there is no {first}; give a parquet file or a folder of images")
    return _read_parquet(paths)


def _read_folder(folder: Path) -> EncodedImages:
    """`folder/class/image.png`, classes in the order of their names."""
    datasets = require("torchvision.datasets", f"reading the images in {folder}")
    try:
        found = datasets.ImageFolder(folder)
    except FileNotFoundError as error:
        raise TrainingDataError(f"{folder} is no folder of images: {error}; it needs one subfolder per class") from error
    files = [Path(name) for name, _ in found.samples]
    return EncodedImages(files, [label for _, label in found.samples], str(folder), tuple(found.classes))


def _read_parquet(paths: Sequence[Path]) -> EncodedImages:
    parquet = require("pyarrow.parquet", f"reading {paths[0].name}")
    files: list[bytes | Path] = []
    labels: list[int] = []
    for path in paths:
        try:
            names = parquet.read_schema(path).names
            image, label = (_column(path, names, wanted) for wanted in (_IMAGE_COLUMNS, _LABEL_COLUMNS))
            table = parquet.read_table(path, columns=[image, label])
        except (OSError, ValueError) as error:  # Arrow's errors are ValueErrors
            if isinstance(error, TrainingDataError):
                raise
            raise TrainingDataError(f"{path} cannot be read as parquet: {error}") from error
        files += [_content(value, path, row) for row, value in enumerate(table[image].to_pylist())]
        labels += [_label(value, path, row) for row, value in enumerate(table[label].to_pylist())]
    return EncodedImages(files, labels, ", ".join(map(str, paths)))


def _column(path: Path, names: Sequence[str], wanted: Sequence[str]) -> str:
    found = next((name for name in wanted if name in names), None)
    if found is None:
        raise TrainingDataError(f"{path} has no column {' or '.join(map(repr, wanted))}; its columns are {', '.join(names)}")
    return found


def _content(value: Any, path: Path, row: int) -> bytes:
    """The bytes of a cell: alone, or in a struct beside a path, as the hub's Image feature stores them."""
    content = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(content, bytes):
        raise TrainingDataError(f"{path}, row {row}: an image is the bytes of an image file, got {type(content).__name__}")
    return content


def _label(value: Any, path: Path, row: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise TrainingDataError(f"{path}, row {row}: a label is an integer from 0, got {value!r}")
    return value
