"""What became of each permutation of a model, why it is where it is, and what it costs there."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, TypeAlias, cast

import torch

from padst_compile.backend import Compilation
from padst_compile.passes.base import Side
from padst_compile.passes.choose_kernels import LayerDecision
from padst_compile.passes.costs import TOKENS, CostModel, kind_of
from padst_compile.passes.graph import PERMUTE, argument, fake, is_call, layer_name
from padst_compile.structures import parse

Outcome: TypeAlias = Literal[
    "folded into neighbours",
    "folded into the dense weight",
    "folded into the 2:4 weight",
    "read by the kernel",
    "written by the kernel",
    "separate op",
    "composed",
    "cancelled",
]

_REASONS = {
    "composed": "one table with the permutation next to it",
    "cancelled": "it is the identity, or another permutation undoes it",
}
_FOLDED_REASON = "the parameters around it are stored in its order"
_DENSE_REASON = "the layer runs dense: its columns or rows are stored in that order"
_TWO_OF_FOUR_REASON = "the layer runs on sparse tensor cores: its rows are stored in that order"
_TRAINING = "training: its values may change at every step"
_UNKNOWN = "no rule applies to it"


@dataclasses.dataclass(frozen=True)
class PermutationFate:
    """One permutation.

    Args:
        layer: whose it is, or whose kernel applies it.
        side: "input" or "output" of that layer; "" where the layer is not known.
        outcome: what became of it.
        reason: why it is there.
        bytes_per_token: memory traffic that takes as long as applying it, for each token (`passes/costs.py`).
    """

    layer: str
    side: str
    outcome: Outcome
    reason: str
    bytes_per_token: int = 0

    def __str__(self) -> str:
        cost = f", {self.bytes_per_token:,} bytes per token" if self.bytes_per_token else ""
        return f"{self.layer} ({self.side}): {self.outcome}{cost}; {self.reason}"


def permutation_fates(compilation: Compilation, sides: Mapping[str, str], device: str) -> Iterator[PermutationFate]:
    """One entry per permutation of a compiled graph.

    Args:
        compilation: the graph and what the passes did.
        sides: the side that each layer permutes, by layer.
        device: type of the device that it runs on.
    """
    why = _Reasons(compilation)
    decisions = compilation.report.decisions
    yield from (_in_kernel(d, side, why, device) for d in decisions for side in d.tables)
    for layer in _folded(compilation):
        yield PermutationFate(layer, sides.get(layer, ""), "folded into neighbours", _FOLDED_REASON)
    for layer, effect in compilation.report.ended:
        if effect in _REASONS:
            yield PermutationFate(layer, sides.get(layer, ""), cast("Outcome", effect), _REASONS[effect])
    yield from _separate(compilation, sides, why)


def _in_kernel(decision: LayerDecision, side: Side, why: _Reasons, device: str) -> PermutationFate:
    if side in decision.folded:
        if decision.choice.kernel == "cusparselt":
            return PermutationFate(decision.layer, side, "folded into the 2:4 weight", _TWO_OF_FOUR_REASON)
        return PermutationFate(decision.layer, side, "folded into the dense weight", _DENSE_REASON)
    dtype: torch.dtype = getattr(torch, decision.dtype)
    model = CostModel(dtype.itemsize, device)
    kind = kind_of(parse(decision.structure))
    shape = decision.shape
    cost = model.load(shape.in_features, kind) if side == "input" else model.store(shape.out_features, kind)
    outcome: Outcome = "read by the kernel" if side == "input" else "written by the kernel"
    return PermutationFate(decision.layer, side, outcome, why.of(decision.layer, side), int(cost.coeff(TOKENS)))


def _folded(compilation: Compilation) -> Iterable[str]:
    """The layers whose permutations went into parameters.

    Kernels took these up at first, and hold fewer tables now. A table of a layer without a permutation of its own is one that
    moved there.
    """
    ended = compilation.report.ended
    taken_up = Counter(layer for layer, effect in ended if effect == "fused")
    tables = Counter(decision.layer for decision in compilation.report.decisions for _ in decision.tables)
    for decision in compilation.report.decisions:
        if decision.folded_from:  # blocks between stride permutations: tables that no permutation of the model became
            tables[decision.layer] = min(tables[decision.layer], taken_up[decision.layer])
    missing, moved = taken_up - tables, (tables - taken_up).total()
    return [*itertools.islice(missing.elements(), moved, None), *(layer for layer, effect in ended if effect == "folded")]


def _separate(compilation: Compilation, sides: Mapping[str, str], why: _Reasons) -> Iterator[PermutationFate]:
    for node in compilation.graph.graph.nodes:
        if is_call(node, PERMUTE):
            layer, x = layer_name(node), fake(argument(node, "x"))
            cost = 0 if x is None else CostModel(x.element_size(), x.device.type).separate(int(x.shape[-1])).coeff(TOKENS)
            yield PermutationFate(layer, sides.get(layer, ""), "separate op", why.of(layer, None), int(cost))


class _Reasons:
    """Why permutations were not folded, as the passes gave it."""

    def __init__(self, compilation: Compilation) -> None:
        self._inference = compilation.inference
        self._refusals = [refusal for rule in compilation.report.rules for refusal in rule.refusals]

    def of(self, layer: str, side: Side | None) -> str:
        """About one end of a layer; about an operation of its own if `side` is None."""
        if side is not None and not self._inference:
            return _TRAINING
        own = [r.reason for r in self._refusals if (r.layer, r.side) == (layer, side)]
        graph = [r.reason for r in self._refusals if r.rule == "PlacePermutations" and r.node == "graph"]
        return next(reversed(own), None) or next(iter(graph), _UNKNOWN)
