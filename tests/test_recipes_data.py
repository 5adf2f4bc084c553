"""Data of `padst train`: what it reads, that batches depend on seed and step alone, and what it refuses."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from padst_compile.errors import MissingPackageError, TrainingDataError
from padst_compile.recipes import decoding
from padst_compile.recipes.augmentation import flip_and_crop
from padst_compile.recipes.data import Epochs, Sampling, evenly, in_batches
from padst_compile.recipes.images import load_images
from padst_compile.recipes.text import load_text

SIZE = 16


def picture(label: int, seed: int, size: int = SIZE) -> bytes:
    """A JPEG whose brightness tells its class."""
    random = np.random.default_rng(seed)
    pixels = np.clip(random.normal(60 + 40 * label, 20, (size, size, 3)), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="JPEG")
    return file.getvalue()


def write_parquet(path: Path, count: int, *, hub: bool = False, seed: int = 0) -> Path:
    """As plain bytes with uint8 labels, or as the hub's Image feature stores images (a struct, int64)."""
    labels = [index % 4 for index in range(count)]
    images = [picture(label, seed + index) for index, label in enumerate(labels)]
    if hub:
        cells = pa.array(
            [{"bytes": image, "path": None} for image in images], pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        )
        table = pa.table({"img": cells, "fine_label": pa.array(labels, pa.int64())})
    else:
        table = pa.table({"image": pa.array(images, pa.binary()), "label": pa.array(labels, pa.uint8())})
    pq.write_table(table, path, row_group_size=7)
    return path


@pytest.mark.parametrize("hub", [False, True])
def test_parquet_files_of_both_layouts_are_read(tmp_path: Path, hub: bool) -> None:
    train = write_parquet(tmp_path / "train.parquet", 20, hub=hub)
    test = write_parquet(tmp_path / "test.parquet", 8, hub=hub, seed=100)
    data = load_images(train, test, Sampling(6))
    assert (data.classes, data.size) == (4, SIZE)
    assert data.training.pixels.shape == (20, 3, SIZE, SIZE) and data.training.pixels.dtype == torch.uint8
    assert data.training.labels.tolist() == [index % 4 for index in range(20)]
    assert [batch.count for batch in data.validation_batches()] == [6, 2]
    expected = torch.from_numpy(np.array(Image.open(io.BytesIO(picture(1, 1))))).permute(2, 0, 1)
    assert torch.equal(data.training.pixels[1], expected)


def test_a_folder_of_parquet_files_is_divided_by_their_names(tmp_path: Path) -> None:
    write_parquet(tmp_path / "cifar-train-0.parquet", 8)
    write_parquet(tmp_path / "cifar-train-1.parquet", 4)
    write_parquet(tmp_path / "cifar-test.parquet", 4)
    data = load_images(tmp_path, None, Sampling(4))
    assert (len(data.training.labels), len(data.validation.labels)) == (12, 4)


def write_classes(folder: Path, count: int, size: int = SIZE) -> None:
    for label, name in enumerate(("cat", "dog")):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            (folder / name / f"{index}.jpeg").write_bytes(picture(3 * label, index, size))


def test_a_folder_of_classes_is_read_and_scaled(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", 3, size=20)
    write_classes(tmp_path / "val", 2, size=24)
    data = load_images(tmp_path, None, Sampling(4), size=8)
    assert data.class_names == ("cat", "dog") and data.size == 8
    assert (len(data.training.labels), len(data.validation.labels)) == (6, 4)


def test_a_tenth_is_held_out_where_nothing_validates(tmp_path: Path) -> None:
    write_classes(tmp_path, 10)
    data = load_images(tmp_path, None, Sampling(4))
    assert (len(data.training.labels), len(data.validation.labels)) == (18, 2)
    every = torch.cat([data.training.pixels, data.validation.pixels])
    assert len({image.numpy().tobytes() for image in every}) == 20


def test_images_are_normalised_by_the_training_images(tmp_path: Path) -> None:
    data = load_images(write_parquet(tmp_path / "a.parquet", 20), None, Sampling(18), augment=False)
    pixels = data.training.pixels.double() / 255
    torch.testing.assert_close(data.mean.double(), pixels.mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(data.deviation.double(), pixels.std((0, 2, 3), correction=0), rtol=1e-6, atol=0)
    inputs = data.training_batch(0).inputs  # an epoch of 18 images
    torch.testing.assert_close(inputs.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-4)


def test_batches_of_images_depend_on_seed_and_step_alone(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", 20)
    one, again, other = (load_images(path, None, Sampling(5, seed)) for seed in (0, 0, 1))
    for step in (0, 1, 7):
        one.training_batch(step)
    assert torch.equal(one.training_batch(4).inputs, again.training_batch(4).inputs)
    assert not torch.equal(one.training_batch(4).inputs, other.training_batch(4).inputs)
    assert not torch.equal(one.training_batch(4).inputs, one.training_batch(5).inputs)


def test_each_epoch_has_each_example_once_in_an_order_of_its_own() -> None:
    epochs = Epochs(7, 3, seed=0)
    drawn = torch.cat([epochs.indices(step) for step in range(7)])  # 21 examples, three epochs
    parts = drawn.split(7)
    assert all(sorted(part.tolist()) == list(range(7)) for part in parts)
    assert not torch.equal(parts[0], parts[1])
    assert torch.equal(Epochs(7, 3, seed=0).indices(5), epochs.indices(5))
    assert len(Epochs(2, 9, seed=0).indices(1)) == 9  # a batch larger than the data


def test_augmentation_cuts_a_shifted_or_mirrored_window_out_of_each_image() -> None:
    images = torch.arange(6 * 3 * 8 * 8).remainder(251).to(torch.uint8).view(6, 3, 8, 8) + 1
    found = flip_and_crop(images, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1))
    for number in range(6):
        windows = [
            window[:, top : top + 8, left : left + 8]
            for window in (padded[number], padded[number].flip(2))
            for top in range(3)
            for left in range(3)
        ]
        assert any(torch.equal(found[number], window) for window in windows)
    assert not torch.equal(found, images)


def test_limits_spread_evenly_and_batches_are_filled_up() -> None:
    assert evenly(10, 4).tolist() == [0, 2, 5, 7]
    assert evenly(3, 8).tolist() == evenly(3, None).tolist() == [0, 1, 2]
    pieces = [(positions.tolist(), count) for positions, count in in_batches(torch.arange(5), 3)]
    assert pieces == [([0, 1, 2], 3), ([3, 4, 3], 2)]
    assert next(iter(in_batches(torch.arange(2), 5)))[0].tolist() == [0, 1, 0, 1, 0]


def test_a_text_is_read_as_characters_or_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("äbc\r\n".encode() * 40)
    letters = load_text(path, None, Sampling(3), context=4)
    assert letters.vocabulary == ["\n", "\r", "b", "c", "ä"]
    assert (len(letters.training), len(letters.validation)) == (180, 20)
    assert load_text(path, None, Sampling(3), tokens="bytes", context=4).training[:2].tolist() == list("ä".encode())
    batch = letters.training_batch(0)
    assert batch.inputs.shape == batch.targets.shape == (3, 4) and batch.inputs.dtype == torch.int64
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    windows = torch.cat([batch.inputs[: batch.count] for batch in letters.validation_batches()])
    assert torch.equal(windows.flatten(), letters.validation[:16].long())  # the 20th token is a target alone
    assert torch.equal(letters.training_batch(5).inputs, load_text(path, None, Sampling(3), context=4).training_batch(5).inputs)
    assert not torch.equal(batch.inputs, letters.training_batch(1).inputs)


def test_training_windows_reach_both_ends_of_a_text(tmp_path: Path) -> None:
    path, beside = tmp_path / "a.txt", tmp_path / "b.txt"
    path.write_text("abcdef")
    beside.write_text("abcdefabcdef")
    data = load_text(path, beside, Sampling(50), context=4)
    batch = data.training_batch(0)
    assert set(batch.inputs[:, 0].tolist()) == {0, 1} and int(batch.targets.max()) == 5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"too short", "too few for one window of 16"),
        (b"\xff\xfe" * 100, "not UTF-8: invalid start byte at byte 0"),
        (None, "No such file"),
    ],
)
def test_texts_that_cannot_be_used_are_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "a.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TrainingDataError, match=message):
        load_text(path, None, Sampling(3), context=16)


def refuse(path: Path, message: str, **changes: pa.Array) -> None:
    columns = {"image": pa.array([picture(0, 0)] * 20, pa.binary()), "label": pa.array([0] * 20, pa.int64())} | changes
    pq.write_table(pa.table({name: column for name, column in columns.items() if column is not None}), path)
    with pytest.raises(TrainingDataError, match=message):
        load_images(path, None, Sampling(3), size=8)


def test_images_that_cannot_be_used_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    refuse(path, "no column 'image' or 'img'; its columns are label", image=None)
    refuse(path, "no column 'label'", label=None)
    refuse(path, "row 0: an image is the bytes of an image file, got str", image=pa.array(["x"] * 20))
    refuse(path, "row 1: a label is an integer from 0, got -1", label=pa.array([0, -1] * 10))
    refuse(path, "row 0: a label is an integer from 0, got None", label=pa.array([None] * 20, pa.int64()))
    refuse(path, "image 1 is no image that Pillow can read", image=pa.array([picture(0, 0), b"no image"] * 10, pa.binary()))
    refuse(path, "image 0 is damaged", image=pa.array([picture(0, 0)[:-60]] * 20, pa.binary()))
    path.write_bytes(b"no parquet")
    with pytest.raises(TrainingDataError, match="cannot be read as parquet"):
        load_images(path, None, Sampling(3))
    with pytest.raises(TrainingDataError, match="there is no"):
        load_images(tmp_path / "b.parquet", None, Sampling(3))
    (tmp_path / "empty").mkdir()
    with pytest.raises(TrainingDataError, match="one subfolder per class"):
        load_images(tmp_path / "empty", None, Sampling(3))
    with pytest.raises(TrainingDataError, match="too few to hold some out"):
        load_images(write_parquet(path, 5), None, Sampling(3))
    monkeypatch.setattr(decoding.os, "sysconf", lambda name: 64)
    with pytest.raises(TrainingDataError, match="choose a smaller image size"):
        load_images(write_parquet(path, 20), None, Sampling(3))


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "a.parquet", 20)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(
        MissingPackageError, match=r"reading a.parquet needs pyarrow; pip install pyarrow, or padst_compile\[train\]"
    ):
        load_images(path, None, Sampling(3))
