"""A sparse language model of bytes in Lightning's Trainer, on any text file.

python lightning_text.py input.txt --steps 300
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import padst_compile as padst
from padst_compile.backend import padst as backend  # where the package is installed, backend="padst" is the same
from padst_compile.integrations.lightning import PadstCallback

CONTEXT = 64


class Text(torch.utils.data.Dataset[torch.Tensor]):
    """Pieces of a file, int64 `[CONTEXT]`, one after the other."""

    def __init__(self, path: str) -> None:
        self.bytes = torch.frombuffer(bytearray(Path(path).read_bytes()), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.bytes) // CONTEXT

    def __getitem__(self, number: int) -> torch.Tensor:
        return self.bytes[number * CONTEXT : (number + 1) * CONTEXT].long()


class LanguageModel(lightning.LightningModule):
    """GPT-2 in small."""

    def __init__(self) -> None:
        super().__init__()
        shape = GPT2Config(vocab_size=256, n_positions=CONTEXT, n_embd=128, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
        self.model = GPT2LMHeadModel(shape)

    def training_step(self, batch: torch.Tensor, number: int) -> torch.Tensor:
        """The loss."""
        return self.model(batch, labels=batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW on what the sparse layers have left."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main() -> None:
    """Train, then compare the compiled model with the eager one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="text file")
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()

    lightning.seed_everything(0)
    text = Text(arguments.data)
    module = padst.sparsify(LanguageModel(), padst.SparsitySpec(padst.Block(16), sparsity=0.8, permutation="learned"))
    learned = padst.LearnedPermutation("sinkhorn_ste")
    callback = PadstCallback(
        lambda steps: padst.DSTConfig("rigl", interval=max(2, steps // 10), total_steps=steps, permutation=learned)
    )
    batches = torch.utils.data.DataLoader(text, batch_size=32, shuffle=True)
    trainer = lightning.Trainer(max_steps=arguments.steps, max_epochs=-1, callbacks=[callback], logger=False,
                                enable_checkpointing=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(module, batches)

    model = module.model.eval()  # the callback has finalized it
    batch = torch.stack([text[number] for number in range(min(32, len(text)))]).to(model.device)
    with torch.no_grad():
        eager, compiled = (each(batch, labels=batch).loss for each in (model, torch.compile(model, backend=backend)))
    print(f"loss: eager {eager:.5f}, compiled {compiled:.5f}")
    torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-4)


if __name__ == "__main__":
    main()
