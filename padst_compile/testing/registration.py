"""What a structure or a kernel of one's own must fulfil, as assertions for its tests."""

from __future__ import annotations

import json

import torch

from padst_compile.kernels.formats import Format
from padst_compile.structures import Shape, Structure, Topology, parse, structure_from_dict


def assert_structure(structure: Structure, shape: Shape, sparsity: float, *, seed: int = 0) -> Topology:
    """Check that a structure chooses, packs, unpacks, counts and names itself without contradiction.

    Args:
        structure: of a registered class.
        shape: of a layer that it fits.
        sparsity: of that layer.
        seed: of the random weight.

    Returns:
        The topology that it chose, for further checks.

    Raises:
        AssertionError: with what does not hold.
        PadstError: it does not fit the shape.
    """
    structure.check(shape, sparsity, "layer")
    assert parse(structure.to_string()) == structure, f"parse({structure.to_string()!r}) is another structure"
    assert structure_from_dict(json.loads(json.dumps(structure.to_dict()))) == structure, "its JSON form is another structure"
    weight = _integers(shape.out_features, shape.in_features, seed=seed).abs_().add_(1)
    topology = structure.choose(weight.abs(), sparsity)
    assert len(topology) == len(structure.index_names), f"choose gives {len(topology)} index tensors"
    wrong = structure.check_topology(topology, shape)
    assert wrong is None, f"check_topology refuses what choose gave: {wrong}"
    values = structure.pack(weight, topology)
    dense = structure.unpack(values, topology, shape)
    assert dense.shape == weight.shape, f"unpack gives {list(dense.shape)}"
    assert torch.equal(dense, weight.where(dense != 0, 0)), "a weight that pack and unpack keep changes its value or its place"
    assert torch.equal(structure.pack(dense, topology), values), "pack does not undo unpack"
    assert values.is_contiguous(), "pack must give a contiguous tensor"
    if structure.has_units():
        _assert_units(structure, shape, sparsity, weight, topology)
    return topology


def _assert_units(structure: Structure, shape: Shape, sparsity: float, weight: torch.Tensor, topology: Topology) -> None:
    active = structure.active_units(topology, shape)
    assert active.dtype == torch.bool, "active_units must be bool"
    assert active.shape == structure.unit_totals(weight).shape, "active_units and unit_totals differ in shape"
    assert bool((active.sum(-1) == structure.units_per_pool(shape, sparsity)).all()), "a pool has not its number of units"
    again = structure.topology_of(active, shape)
    assert all(torch.equal(a, b) for a, b in zip(topology, again, strict=True)), "topology_of does not undo active_units"


def assert_kernel(kernel: Format[Structure], structure: Structure, shape: Shape, sparsity: float, *, tokens: int = 7) -> None:
    """Check a kernel's product and both gradients against the dense weight: exactly in float64, and with no tokens.

    Raises:
        AssertionError: with what is wrong.
    """
    weight = _integers(shape.out_features, shape.in_features, seed=1)
    topology = structure.choose(torch.rand(shape.out_features, shape.in_features, generator=_generator(2)), sparsity)
    values = structure.pack(weight, topology)
    dense = structure.unpack(values, topology, shape)
    for count in (tokens, 0):
        x, grad = _integers(count, shape.in_features, seed=3), _integers(count, shape.out_features, seed=4)
        pairs = {
            "forward": (kernel.forward(structure, x, values, topology, shape.out_features), x @ dense.T),
            "input_gradient": (kernel.input_gradient(structure, grad, values, topology, shape.in_features), grad @ dense),
            "value_gradient": (
                kernel.value_gradient(structure, grad, x, values, topology), structure.pack(grad.T @ x, topology)
            ),
        }  # fmt: skip
        for name, (found, expected) in pairs.items():
            assert found.shape == expected.shape, f"{name} is {list(found.shape)} and should be {list(expected.shape)}"
            assert torch.equal(found, expected), f"{name} differs from the dense product"


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _integers(*size: int, seed: int) -> torch.Tensor:
    """Small integers in float64, whose sums are exact in any order."""
    return torch.randint(-8, 9, size, generator=_generator(seed)).double()
