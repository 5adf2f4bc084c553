"""A sparse vision transformer in transformers' Trainer, on a parquet file of images such as CIFAR-10.

python trainer_images.py train.parquet --steps 300
"""

from __future__ import annotations

import argparse
import io
import tempfile

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

import padst_compile as padst
from padst_compile.backend import padst as backend  # where the package is installed, backend="padst" is the same
from padst_compile.integrations.transformers import PadstCallback

SIZE = 32


class Images(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Columns `image` (the bytes of an image file, or a struct with them) and `label` of a parquet file."""

    def __init__(self, path: str) -> None:
        table = pq.read_table(path, columns=["image", "label"])
        self.files, self.labels = table["image"], torch.tensor(table["label"].to_pylist())

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        file = self.files[number].as_py()
        image = Image.open(io.BytesIO(file["bytes"] if isinstance(file, dict) else file)).convert("RGB").resize((SIZE, SIZE))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1
        return {"pixel_values": pixels, "labels": self.labels[number]}


def main() -> None:
    """Train, then compare the compiled model with the eager one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="parquet file with the columns image and label")
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()

    set_seed(0)
    images = Images(arguments.data)
    shape = ViTConfig(image_size=SIZE, patch_size=4, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
                      num_attention_heads=4, num_labels=int(images.labels.max()) + 1)  # fmt: skip
    spec = padst.SparsitySpec(padst.Block(16), sparsity=0.8, permutation="learned")
    model = padst.sparsify(ViTForImageClassification(shape), spec)

    def config(steps: int) -> padst.DSTConfig:
        learned = padst.LearnedPermutation("autoshuffle")
        return padst.DSTConfig("rigl", interval=max(1, steps // 10), total_steps=steps, permutation=learned)

    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(output_dir=folder, max_steps=arguments.steps, per_device_train_batch_size=32,
                                     learning_rate=1e-3, logging_steps=max(1, arguments.steps // 10), save_strategy="no",
                                     report_to=[], disable_tqdm=True)  # fmt: skip
        Trainer(model=model, args=settings, train_dataset=images, callbacks=[PadstCallback(config)]).train()

    model.eval()  # the callback has finalized it
    examples = [images[number] for number in range(min(64, len(images)))]
    batch = {name: torch.stack([example[name] for example in examples]).to(model.device) for name in examples[0]}
    with torch.no_grad():
        eager, compiled = model(**batch).loss, torch.compile(model, backend=backend)(**batch).loss
    print(f"loss: eager {eager:.5f}, compiled {compiled:.5f}")
    torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-4)


if __name__ == "__main__":
    main()
