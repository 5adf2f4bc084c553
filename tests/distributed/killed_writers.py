"""Kills processes that save checkpoints over and over, and loads what they leave: `killed_writers.py FOLDER`."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn

import padst_compile as padst

KILLS = 20


def make() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def save_for_ever(path: Path, first: int) -> None:
    """Number the checkpoints; the weights are all equal to the number, so a mixture of two would show."""
    model, optimizer = make()
    number = first
    while True:
        for parameter in model.parameters():
            nn.init.constant_(parameter, number)
        padst.save_checkpoint(path, model, optimizer, extra={"number": number})
        number += 1


def check(path: Path) -> int:
    """The number of the checkpoint."""
    model, optimizer = make()
    number: int = padst.load_checkpoint(path, model, optimizer)["number"]
    assert all(bool((parameter == number).all()) for parameter in model.parameters()), f"checkpoint {number} is a mixture"
    return number


def main() -> None:
    torch.set_num_threads(1)
    path, chance = Path(sys.argv[1]), random.Random(0)
    model, optimizer = make()
    padst.save_checkpoint(path, model, optimizer, extra={"number": 0})
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    padst.save_checkpoint(path, model, optimizer, extra={"number": 0})
    number, patience = 0, 0.1  # seconds, more of them where the machine is busy
    for _ in range(KILLS):
        child = os.fork()
        if child == 0:
            save_for_ever(path, number + 1)
        time.sleep(chance.uniform(0.0, patience))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        last = check(path)
        assert last >= number, f"checkpoint {last} came back after {number}"
        patience = min(4.0, patience * 1.5) if last == number else patience
        number = last
    assert number > 0, "no child came to save anything"
    padst.save_checkpoint(path, model, optimizer)
    left = sorted(file.name[:5] for file in path.iterdir())
    assert left == ["curre", "data-"], f"drafts were left behind: {left}"


if __name__ == "__main__":
    main()
