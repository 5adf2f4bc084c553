"""S.T of a layer of diagonals is a layer of diagonals."""

from __future__ import annotations

import torch

from padst_compile.structures import Shape, Topology


def transpose(values: torch.Tensor, topology: Topology, shape: Shape) -> tuple[torch.Tensor, Topology]:
    """The values and topology of S.T, for S of `shape` `[out, in]`.

    Where the sides differ, `W[k, (k + o) % in]` and `W[(k + o) % out, k]` are each other's transpose: nothing changes. In a
    square, entry `k` of diagonal `o` becomes entry `(k + o) % n` of diagonal `-o % n`.
    """
    (offsets,) = topology
    size = shape.in_features
    if size != shape.out_features:
        return values, topology
    opposite, order = (-offsets.long() % size).sort()
    steps = torch.arange(size, device=offsets.device)
    return values[order].gather(1, (steps + opposite[:, None]) % size), (opposite.int(),)
