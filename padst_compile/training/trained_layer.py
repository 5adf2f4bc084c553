"""A sparse layer in training, with what the runtime keeps beside it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import zlib
from typing import Any

import numpy as np
import torch

from padst_compile.kernels import gradient_tap
from padst_compile.layers import PermutedSparseLinear
from padst_compile.permutation_search.exchanges import Exchanges
from padst_compile.structures import NM, Shape, Structure
from padst_compile.training.passes import Passes
from padst_compile.training.sharding import is_sharded
from padst_compile.training.unit_scores import unit_sizes

_NO_EXCHANGES = Exchanges(())
_FINE = 4  # weights to a unit, below which units are fine


@dataclasses.dataclass
class TrainedLayer:
    """One set of values with the layers that share it.

    Args:
        name: of the first layer that has these values.
        layers: that share them; the first speaks for all.
        optimizer: that holds them.
        offset: optimizer steps by which its updates come later than those of other layers.
    """

    name: str
    layers: tuple[PermutedSparseLinear, ...]
    optimizer: torch.optim.Optimizer
    offset: int = 0

    def __post_init__(self) -> None:
        self.alive: torch.Tensor | None = None  # bool [pools, units]: not yet pruned; None where nothing is pruned
        self.mask: torch.Tensor | None = None  # the same, where the values are
        self._held = self.layer.values  # the optimizer's; FSDP2 shows another one while it has gathered it
        self.passes = Passes(self._held, lambda: self.layer.values)
        permutation = self.layer.permutation
        self.start = None if permutation is None else permutation.cpu().clone()  # where the training began
        self._visited = np.packbits(self.active().cpu().numpy())

    @property
    def layer(self) -> PermutedSparseLinear:
        """The layer itself."""
        return self.layers[0]

    @property
    def structure(self) -> Structure:
        """Of the layer."""
        return self.layer.config.structure

    @property
    def shape(self) -> Shape:
        """Of the layer."""
        return self.layer.config.shape

    @property
    def exchanges(self) -> Exchanges | None:
        """Which features it may exchange; None for all. None of them if the layers with these values do not agree."""
        first = self.layer.exchanges
        return first if all(layer.exchanges is first for layer in self.layers) else _NO_EXCHANGES

    @property
    def permutation(self) -> torch.Tensor:
        """Of the layer, which must have one, int32 `[features]`."""
        assert self.layer.permutation is not None  # or it would have no learner
        return self.layer.permutation

    def exchange_sets(self) -> torch.Tensor:
        """For each place the number of the set within which regroup may exchange it, -1 for none; int64 `[features]`."""
        size = self.permutation.numel()
        return torch.zeros(size, dtype=torch.int64) if self.exchanges is None else self.exchanges.independent(size)

    @property
    def has_fine_units(self) -> bool:
        """Whether scores of its units take about as much memory as its dense gradient."""
        return self.active().numel() * _FINE > self.shape.numel

    @functools.cached_property
    def has_single_weights(self) -> bool:
        """Whether each of its units is one weight."""
        return bool((unit_sizes(self.structure, self.shape, self.layer.topology[0].device) <= 1).all())

    @property
    def has_other_weights(self) -> bool:
        """Whether the layers' weights are no longer the optimizer's; sharded ones, which are gathered at times, always are."""
        return not is_sharded(self._held) and any(layer.values is not self._held for layer in self.layers)

    def follow(self) -> None:
        """Bring what is pruned to the device that the layer has been moved to."""
        device = self.layer.topology[0].device
        if self.alive is not None and self.alive.device != device:
            self.alive = self.alive.to(device)
            self.mask = None if self.mask is None else self.mask.to(device)

    def active(self) -> torch.Tensor:
        """Which units are active, bool `[pools, units]`; pruned ones are not."""
        self.follow()
        stored = self.structure.active_units(self.layer.topology, self.shape)
        return stored if self.alive is None else stored & self.alive

    def active_weights(self) -> int:
        """How many weights its active units hold."""
        sizes = unit_sizes(self.structure, self.shape, torch.device("cpu"))
        return int(sizes[self.active().cpu()].sum(dtype=torch.float64))

    def given_up(self) -> torch.Tensor:
        """Which outputs of S have no active unit left where they had some, bool `[out_features]` on the CPU."""
        if self.alive is None or not isinstance(self.structure, NM):  # others give up units, not outputs
            return torch.zeros(self.shape.out_features, dtype=torch.bool)
        rows, groups = self.structure.groups(self.shape)
        dead = ~self.alive.cpu().reshape(rows, groups * self.structure.m).any(1)
        return dead.repeat_interleave(self.structure.vector)[: self.shape.out_features]

    def generator(self, seed: int, step: int, purpose: str) -> torch.Generator:
        """Random numbers that depend on these arguments and the layer's name alone, so all ranks draw the same."""
        digest = hashlib.sha256(f"{seed}/{step}/{purpose}/{self.name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    def listen(self, listener: gradient_tap.GradientListener) -> None:
        """Let `listener` have the layer's dense gradients."""
        for layer in self.layers:
            gradient_tap.listen(layer.topology[0], listener)

    def forget(self) -> None:
        """End `listen`, and whatever was added up."""
        self.passes.forget()
        for layer in self.layers:
            gradient_tap.forget(layer.topology[0])

    def share_topology(self) -> None:
        """Give the other layers with these values the first one's index tensors and permutation."""
        with torch.no_grad():
            for layer in self.layers[1:]:
                for own, first in zip(layer.topology, self.layer.topology, strict=True):
                    own.copy_(first)
                if layer.permutation is not None and self.layer.permutation is not None:
                    layer.permutation.copy_(self.layer.permutation)

    def hold_at_zero(self) -> None:
        """Set pruned weights to zero in place, nothing where nothing is pruned."""
        if self.mask is not None:
            with torch.no_grad():
                self.layer.values.mul_(self.mask)

    def visit(self) -> None:
        """Count the units that are active now as explored."""
        self._visited |= np.packbits(self.active().cpu().numpy())

    @property
    def explored(self) -> tuple[int, int]:
        """Units that were ever active, and all units (in-time over-parametrisation, Liu et al. 2021)."""
        return int(np.unpackbits(self._visited).sum()), self.active().numel()

    def fingerprint(self) -> int:
        """A checksum of topology and permutation."""
        tensors = [*self.layer.topology, *([] if self.layer.permutation is None else [self.layer.permutation])]
        checksum = 0
        for tensor in tensors:
            checksum = zlib.crc32(tensor.detach().cpu().contiguous().numpy().tobytes(), checksum)
        return checksum

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold beside the model and the optimizer."""
        return {
            "structure": self.structure.to_string(),
            "shape": [self.shape.out_features, self.shape.in_features],
            "fingerprint": self.fingerprint(),
            "start": self.start,
            "visited": torch.from_numpy(self._visited.copy()),
            "alive": None if self.alive is None else self.alive.cpu(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave; the caller has compared it with this layer."""
        self.start = state["start"]
        self._visited = state["visited"].numpy().copy()
        self.alive = None if state["alive"] is None else state["alive"].to(self.layer.topology[0].device)
