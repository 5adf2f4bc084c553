"""Keyed pseudo-random functions on residues: what stands for functions that are no arithmetic.

A function is looked up under a key made of a seed, its name and its attributes, and answers every argument with a number
that looks drawn afresh. Two different arguments get the same answer with probability 1 / 2**31; a polynomial of degree d in
its place would do so with d / 2**31, and degrees multiply along a deep network.
"""

from __future__ import annotations

import hashlib

import torch

from padst_compile.equivalence.field import PRIME

_ROUNDS = ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15))  # splitmix64's multipliers as signed numbers


def key(seed: int, *what: object) -> int:
    """A number in [0, 2**63) that depends on everything given."""
    text = "/".join(map(str, (seed, *what)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def random_residues(size: int, seed: int, *what: object) -> torch.Tensor:
    """Fresh residues, flat, the same for the same key."""
    return torch.randint(PRIME, (size,), generator=torch.Generator().manual_seed(key(seed, *what)))


def plain(secret: int, x: torch.Tensor) -> torch.Tensor:
    """A random function."""
    mixed = x + secret
    for shift, factor in _ROUNDS:
        mixed = (mixed ^ _shifted(mixed, shift)) * factor
    return ((mixed ^ _shifted(mixed, 31)) & PRIME).remainder_(PRIME)


def even(secret: int, x: torch.Tensor) -> torch.Tensor:
    """A random function with `f(-x) = f(x)`."""
    return plain(secret, torch.minimum(x, PRIME - x))


def odd(secret: int, x: torch.Tensor) -> torch.Tensor:
    """A random function with `f(-x) = -f(x)`."""
    values = even(secret, x)
    return torch.where(x > PRIME // 2, PRIME - values, values).masked_fill_(x == 0, 0).remainder_(PRIME)


def positive(secret: int, x: torch.Tensor) -> torch.Tensor:
    """A random choice of one of x and -x, bool; neither for 0."""
    return (((even(secret, x) & 1) == 1) ^ (x > PRIME // 2)) & (x != 0)


def symmetric(secret: int, x: torch.Tensor, dims: list[int], keepdim: bool) -> torch.Tensor:
    """A random function of all entries along `dims` that ignores their order."""
    return plain(secret + 1, plain(secret, x).sum(dims, keepdim).remainder_(PRIME))


def _shifted(x: torch.Tensor, places: int) -> torch.Tensor:
    """A shift to the right that fills with zeros, as unsigned numbers have it."""
    return (x >> places) & ((1 << (64 - places)) - 1)
