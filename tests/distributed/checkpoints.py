"""A training on several ranks that saves or goes on: `checkpoints.py FOLDER KIND LAST OUT [DEATH [MOMENT]]`, run by torchrun.

Takes the steps up to LAST on data that do not depend on the number of ranks, from the checkpoint in FOLDER if there is one,
saves into FOLDER every five steps and at the end, and writes the whole weights to OUT. Unless torchrun has restarted it, a rank
kills itself at step DEATH, at the MOMENT "stepping": the last one between its backward pass and the optimizer's step; "saving":
the last one, as it opens its file of the checkpoint behind that step; "publishing": the first one, as it makes that checkpoint
the current one.
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

SAVE_EVERY = 5
# By moment, the rank that dies, what it does then as Python's audit hooks name it, and the end of a path that is an argument.
SAVING = {"saving": (-1, "open", ".distcp"), "publishing": (0, "os.rename", "/current")}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_the_save(moment: str, rank: int, size: int) -> None:
    """Have the rank die when it comes to the moment."""
    victim, awaited, ending = SAVING[moment]

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if event == awaited and any(str(argument).endswith(ending) for argument in arguments):
            die()

    if rank == victim % size:
        sys.addaudithook(watch)


def main() -> None:
    folder, kind, last, out = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
    given = sys.argv[5:] if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" else []
    death, moment = (int(given[0]), given[1]) if given else (None, "")
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
    sys.stderr.write(f"rank {rank} begins behind step {first}\n")
    for step in range(first, last):
        x = torch.randn(8, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(step)).chunk(size)[rank]
        model(x).square().mean().backward()
        if step + 1 == death and moment == "stepping" and rank == size - 1:
            die()
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 == death and moment in SAVING:
            die_in_the_save(moment, rank, size)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == last:
            padst.save_checkpoint(folder, model, optimizer, runtime, {"step": step + 1})
    padst.finalize(model)
    padst.save_pretrained(model, out)
    leave()


if __name__ == "__main__":
    main()
