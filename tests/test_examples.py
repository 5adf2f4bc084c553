"""The programs in `docs/examples` run as they are, on data made here, and end with a compiled model that does the same."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "docs" / "examples"
MOST_LINES = 80

pytest.importorskip("transformers")


def output(example: str, data: Path, steps: int) -> str:
    """What an example prints, run in a folder of its own."""
    command = [sys.executable, str(EXAMPLES / example), str(data), "--steps", str(steps)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, cwd=data.parent, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def assert_ends_alike(printed: str) -> None:
    found = re.search(r"loss: eager ([\d.]+), compiled ([\d.]+)", printed)
    assert found, printed
    eager, compiled = map(float, found.groups())
    assert compiled == pytest.approx(eager, rel=1e-3)
    assert 0 < eager < np.log(256) + 1  # about that of guessing, or better


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("The quick brown fox jumps over the lazy dog. " * 200)
    return file


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Images of two colours, in JPEG."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    image = pytest.importorskip("PIL.Image")

    def jpeg(label: int) -> bytes:
        file = io.BytesIO()
        image.fromarray(np.full((24, 32, 3), (200 * label, 90, 30), dtype=np.uint8)).save(file, "JPEG")
        return file.getvalue()

    labels = [number % 2 for number in range(48)]
    parquet.write_table(
        pyarrow.table({"image": [jpeg(label) for label in labels], "label": labels}), tmp_path / "train.parquet"
    )
    return tmp_path / "train.parquet"


@pytest.mark.slow
def test_trainer_images(images: Path) -> None:
    pytest.importorskip("accelerate")
    printed = output("trainer_images.py", images, 4)
    assert "'padst/updates': '2'" in printed or "'padst/updates': 2" in printed
    assert_ends_alike(printed)


@pytest.mark.slow
def test_lightning_text(text: Path) -> None:
    pytest.importorskip("lightning")
    assert_ends_alike(output("lightning_text.py", text, 4))


@pytest.mark.slow
def test_accelerate_text(text: Path) -> None:
    pytest.importorskip("accelerate")
    assert_ends_alike(output("accelerate_text.py", text, 4))


@pytest.mark.parametrize("example", ["trainer_images.py", "lightning_text.py", "accelerate_text.py"])
def test_examples_are_short_and_named_in_the_readme(example: str) -> None:
    assert len((EXAMPLES / example).read_text().splitlines()) <= MOST_LINES
    assert example in (ROOT / "README.md").read_text()
