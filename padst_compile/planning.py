"""Decides, before anything is touched, what becomes of every layer of a request."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence

import torch

from padst_compile import distribution
from padst_compile.errors import NothingToSparsifyError, PatternError, SpecError, did_you_mean
from padst_compile.spec import SparsitySpec, SpecLike, check_pattern, matches
from padst_compile.structures import Shape, Structure


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A linear layer that could be sparsified, or why it cannot."""

    name: str
    shape: Shape
    refusal: str | None = None


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """How one layer is to be built."""

    name: str
    shape: Shape
    structure: Structure
    sparsity: float
    spec: SparsitySpec

    @property
    def permutes_input(self) -> bool:
        """Whether the layer's permutation, if any, acts on its input."""
        side = self.spec.permutation_side
        return side == "input" or (side == "smaller" and self.shape.in_features <= self.shape.out_features)

    @property
    def permuted_features(self) -> int:
        """Size of the layer's permutation."""
        return self.shape.in_features if self.permutes_input else self.shape.out_features

    def generator(self, purpose: str) -> torch.Generator:
        """Random numbers that depend on the seed, the layer's name and the purpose alone."""
        digest = hashlib.sha256(f"{self.spec.seed}/{purpose}/{self.name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A layer that stays dense, and why."""

    name: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """The layers to build and the layers that stay dense."""

    layers: tuple[LayerPlan, ...]
    refusals: tuple[Refusal, ...]


def make_plan(candidates: Sequence[Candidate], spec: SpecLike) -> Plan:
    """Match the candidates against the specification and share out the sparsity.

    Raises:
        PatternError: a pattern matches no candidate.
        NothingToSparsifyError: no layer is left.
        StructureMismatchError: a structure does not fit a layer.
    """
    if not candidates:
        raise NothingToSparsifyError("the model has no linear layer (nn.Linear or transformers' Conv1D)")
    chosen: list[tuple[Candidate, SparsitySpec]] = []
    refusals: list[Refusal] = []
    for candidate, layer_spec in _select(candidates, spec):
        if layer_spec is None:
            refusals.append(Refusal(candidate.name, "left dense by the specification"))
        elif candidate.refusal is not None:
            refusals.append(Refusal(candidate.name, candidate.refusal))
        else:
            chosen.append((candidate, layer_spec))
    if not chosen:
        reasons = "; ".join(f"{r.name}: {r.reason}" for r in refusals[:5])
        raise NothingToSparsifyError(f"no layer would become sparse ({reasons}); change targets, ignore or the model")
    layers = []
    for (candidate, layer_spec), sparsity in zip(chosen, _sparsities(chosen), strict=True):
        layer_spec.structure.check(candidate.shape, sparsity, candidate.name)
        layers.append(LayerPlan(candidate.name, candidate.shape, layer_spec.structure, sparsity, layer_spec))
    return Plan(tuple(layers), tuple(refusals))


def _select(candidates: Sequence[Candidate], spec: SpecLike) -> list[tuple[Candidate, SparsitySpec | None]]:
    """The specification that governs each candidate; None leaves it dense."""
    names = [candidate.name for candidate in candidates]
    if isinstance(spec, SparsitySpec):
        _require_matches(spec.targets, names)
        return [(c, spec if _targeted(c.name, spec) else None) for c in candidates]
    if not isinstance(spec, Mapping):
        raise PatternError(f"expected a SparsitySpec or a mapping from patterns to SparsitySpec, got {type(spec).__name__}")
    for pattern, layer_spec in spec.items():
        if layer_spec is not None and not isinstance(layer_spec, SparsitySpec):
            raise SpecError(
                f"pattern {pattern!r} maps to {layer_spec!r}; map it to a SparsitySpec, or to None to leave it dense"
            )
    _require_matches([check_pattern(pattern, "a mapping of specifications") for pattern in spec], names)
    return [(c, _first_match(c.name, spec)) for c in candidates]


def _targeted(name: str, spec: SparsitySpec) -> bool:
    return any(matches(p, name) for p in spec.targets) and not any(matches(p, name) for p in spec.ignore)


def _first_match(name: str, spec: Mapping[str, SparsitySpec | None]) -> SparsitySpec | None:
    """In a mapping the first pattern that fits decides; a layer named without wildcards needs no `targets` of its own."""
    for pattern, layer_spec in spec.items():
        if matches(pattern, name):
            exact = pattern == name
            return layer_spec if layer_spec is None or exact or _targeted(name, layer_spec) else None
    return None


def _require_matches(patterns: Sequence[str], names: Sequence[str]) -> None:
    for pattern in patterns:
        if not any(matches(pattern, name) for name in names):
            hint = did_you_mean(pattern, names)
            raise PatternError(f"pattern {pattern!r} matches none of the {len(names)} linear layers{hint}")


def _sparsities(chosen: Sequence[tuple[Candidate, SparsitySpec]]) -> list[float]:
    """Per-layer sparsity: each specification shares its own total among its own layers."""
    result = [0.0] * len(chosen)
    for spec in dict.fromkeys(layer_spec for _, layer_spec in chosen):
        members = [i for i, (_, layer_spec) in enumerate(chosen) if layer_spec == spec]
        share = distribution.erdos_renyi if spec.distribution == "erk" else distribution.uniform
        assert spec.sparsity is not None  # resolved when the spec was made
        for i, sparsity in zip(members, share([chosen[i][0].shape for i in members], spec.sparsity), strict=True):
            result[i] = sparsity
    return result
