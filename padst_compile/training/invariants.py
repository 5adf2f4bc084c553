"""What must hold after every update, checked on request."""

from __future__ import annotations

import torch

from padst_compile import permutation
from padst_compile.errors import InvalidPermutationError, InvariantError
from padst_compile.training.rearrange import companions
from padst_compile.training.sharding import whole
from padst_compile.training.trained_layer import TrainedLayer
from padst_compile.training.world import World


def check_layer(trained: TrainedLayer, world: World) -> None:
    """Check topology, permutation, zeros, optimizer state, and that all ranks have the same.

    Raises:
        InvariantError: something does not hold; the message names the layer.
    """
    layer, structure = trained.layer, trained.structure
    problem = _differing_ranks(trained, world)  # first: whatever all ranks have alike, they find alike
    if problem is None:
        problem = structure.check_topology(layer.topology, trained.shape)
    if problem is None and layer.permutation is not None:
        try:
            permutation.check(layer.permutation, layer.permutation.numel(), trained.name)
        except InvalidPermutationError as error:
            problem = str(error)
    if problem is None:
        problem = _wrong_zeros(trained)
    if problem is not None:
        raise InvariantError(f"layer {trained.name!r}: {problem}; this is a bug in padst_compile or a change from outside")


def _wrong_zeros(trained: TrainedLayer) -> str | None:
    """Stored entries without a place in the weight, or pruned ones, that are not zero in some tensor."""
    layer, structure = trained.layer, trained.structure
    for tensor in (layer.values, *companions(layer.values, trained.optimizer)):
        stored = whole(tensor)
        again = structure.pack(structure.unpack(stored, layer.topology, trained.shape), layer.topology)
        if not torch.equal(again, stored):
            return "entries outside the weight are not zero"
    if trained.mask is not None and bool((whole(layer.values)[whole(trained.mask) == 0] != 0).any()):
        return "pruned weights are not zero"
    return None


def _differing_ranks(trained: TrainedLayer, world: World) -> str | None:
    device = trained.layer.topology[0].device
    own = torch.tensor([trained.fingerprint()], dtype=torch.int64, device=device)
    differs = int(own) != int(world.agree(own.clone()))
    return "not all ranks have the same topology and permutation" if world.any(differs, device) else None
