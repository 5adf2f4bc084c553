"""A sparse language model of bytes in a loop with accelerate, on any text file; alone, or on several processes.

python accelerate_text.py input.txt --steps 300
accelerate launch --num-processes 2 accelerate_text.py input.txt --steps 300
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import GPT2Config, GPT2LMHeadModel

import padst_compile as padst
from padst_compile.backend import padst as backend  # where the package is installed, backend="padst" is the same

CONTEXT, BATCH = 64, 32


def main() -> None:
    """Train, then compare the compiled model with the eager one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="text file")
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()

    set_seed(0)
    accelerator = Accelerator()
    text = torch.frombuffer(bytearray(Path(arguments.data).read_bytes()), dtype=torch.uint8)
    pieces = text[: len(text) // CONTEXT * CONTEXT].view(-1, CONTEXT).long()
    shape = GPT2Config(vocab_size=256, n_positions=CONTEXT, n_embd=128, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    model = padst.sparsify(GPT2LMHeadModel(shape), padst.SparsitySpec(padst.NM(2, 4), permutation="learned"))
    batches = torch.utils.data.DataLoader(pieces, batch_size=BATCH, shuffle=True)
    model, optimizer, batches = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3), batches)

    steps = arguments.steps
    learned = padst.LearnedPermutation("regroup")
    config = padst.DSTConfig("rigl", interval=max(2, steps // 10), total_steps=steps, permutation=learned)
    runtime = padst.attach(model, optimizer, config)
    accelerator.register_for_checkpointing(runtime)  # for accelerator.save_state and load_state
    while runtime.step < steps:
        for batch in batches:
            loss = model(batch, labels=batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            if runtime.step % max(1, steps // 10) == 0:
                metrics = runtime.metrics()
                accelerator.print(f"step {runtime.step}: loss {loss:.4f}, exploration {metrics['exploration']:.3f}")
            if runtime.step == steps:
                break

    padst.finalize(model)
    plain = accelerator.unwrap_model(model).eval()
    batch = pieces[:BATCH].to(accelerator.device)
    with torch.no_grad():
        eager, compiled = (each(batch, labels=batch).loss for each in (plain, torch.compile(plain, backend=backend)))
    accelerator.print(f"loss: eager {eager:.5f}, compiled {compiled:.5f}")
    torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-4)
    accelerator.end_training()


if __name__ == "__main__":
    main()
