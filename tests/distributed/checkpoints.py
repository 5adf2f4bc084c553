"""A training on several ranks that saves or goes on: `checkpoints.py FOLDER KIND LAST OUT [DEATH]`, run by torchrun.

Takes the steps up to LAST on data that do not depend on the number of ranks, from the checkpoint in FOLDER if there is one,
saves into FOLDER every five steps and at the end, and writes the whole weights to OUT. The last rank kills itself in the midst
of step DEATH, between its backward pass and the optimizer's step, unless torchrun has restarted it.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import cast

import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import padst_compile as padst
from padst_compile.testing.ranks import leave

FEWEST = 5  # arguments, the script's name among them
SAVE_EVERY = 5


def main() -> None:
    folder, kind, last, out = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
    death = int(sys.argv[5]) if len(sys.argv) > FEWEST and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" else None
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank, size = distributed.get_rank(), distributed.get_world_size()
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(32, 48, dtype=torch.float64), nn.Tanh(), nn.Linear(48, 32, dtype=torch.float64))
    spec = padst.SparsitySpec(padst.Block(8), sparsity=0.5, permutation="learned")
    padst.sparsify(layers, spec)
    model: nn.Module = DistributedDataParallel(layers) if kind == "ddp" else cast("nn.Module", fully_shard(layers))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    learned = padst.LearnedPermutation("autoshuffle", deadline=0.8)
    config = padst.DSTConfig("set", interval=3, end=1.0, total_steps=12, check_invariants=True, permutation=learned)
    runtime = padst.attach(model, optimizer, config)
    first = padst.load_checkpoint(folder, model, optimizer, runtime)["step"] if (folder / "current").exists() else 0
    for step in range(first, last):
        x = torch.randn(8, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(step)).chunk(size)[rank]
        model(x).square().mean().backward()
        if step + 1 == death and rank == size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == last:
            padst.save_checkpoint(folder, model, optimizer, runtime, {"step": step + 1})
    padst.finalize(model)
    padst.save_pretrained(model, out)
    leave()


if __name__ == "__main__":
    main()
