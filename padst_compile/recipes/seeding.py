"""Random numbers that depend on a seed and a purpose alone, so that a run that continues draws the same ones."""

from __future__ import annotations

import hashlib

import torch


def seed_of(seed: int, *purpose: object) -> int:
    """A seed for one purpose, for example `seed_of(0, "dropout", step)`; below 2**63."""
    digest = hashlib.sha256("/".join(str(part) for part in (seed, *purpose)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed: int, *purpose: object) -> torch.Generator:
    """A generator on the CPU for one purpose."""
    return torch.Generator().manual_seed(seed_of(seed, *purpose))
