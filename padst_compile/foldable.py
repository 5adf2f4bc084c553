"""Which permutations a model's graph folds for nothing, layer by layer: what training may choose from at no cost.

A permutation of a layer is free if the compiler can make it vanish at compile time: into the parameters of dense
neighbours, or into an index table that the layer's kernel reads anyway. The passes find out (`PlacePermutations`); this module
asks them before there are any permutations.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import fx, nn
from torch._C._dynamo.eval_frame import reset_code

from padst_compile import conversion
from padst_compile.conversion import planned, sparse_layers
from padst_compile.errors import MissingInputsError
from padst_compile.layers import PermutedSparseLinear
from padst_compile.passes.axes.groups import OrderGroup, all_orders, free_leaves, no_orders
from padst_compile.passes.context import Context, static_tensors
from padst_compile.passes.graph import copy_graph, layer_name
from padst_compile.passes.pipeline import Pipeline
from padst_compile.passes.place_permutations import Placement, Site
from padst_compile.passes.why_left import in_words
from padst_compile.permutation import identity
from padst_compile.permutation_search.exchanges import Exchanges
from padst_compile.planning import LayerPlan
from padst_compile.spec import SparsitySpec, SpecLike

M = TypeVar("M", bound=nn.Module)


@dataclasses.dataclass(frozen=True)
class FoldableGroup:
    """The permutations of one layer that cost nothing.

    Args:
        layer: its name.
        side: "input" or "output", whichever its specification permutes.
        group: the permutations; `contains` and `random` work on index tensors.
        reason: why not more.
        shared_with: layers that read the same features: free only if they all have the same permutation.
    """

    layer: str
    side: str
    group: OrderGroup
    reason: str
    shared_with: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """In a word: any, identity, within heads, whole heads, whole heads and within heads, or restricted."""
        return self.group.kind

    def contains(self, permutation: torch.Tensor) -> bool:
        """Whether a permutation, `[features]`, is one of them."""
        return self.group.contains(permutation.detach().cpu().numpy())

    def random(self, generator: torch.Generator) -> torch.Tensor:
        """One of them at random, int32 `[features]`."""
        return torch.from_numpy(self.group.random(lambda n: torch.randperm(n, generator=generator).numpy()))

    def __str__(self) -> str:
        shared = f", shared with {', '.join(self.shared_with)}" if self.shared_with else ""
        return f"{self.layer} ({self.side}): {self.kind}{shared}; {self.reason}"


def foldable_permutations(
    model: nn.Module, spec: SpecLike | None = None, *inputs: Any, **keyword_inputs: Any
) -> dict[str, FoldableGroup]:
    """Per layer, the group of permutations that the model's inference graph folds for free.

    Args:
        model: dense, or sparsified already; left as it is.
        spec: what would be made sparse; None for a sparsified model.
        inputs: to capture the graph with.
        keyword_inputs: the same.

    Returns:
        One group per sparse layer that the inputs reach, by module name. A layer that is called several times gets what all
        its calls allow. Each group holds while the other layers keep the identity, or, where `shared_with` names layers,
        together with theirs.

    Raises:
        MissingInputsError: no inputs.
        PadstError: what `sparsify` raises for a wrong specification.
    """
    if not inputs and not keyword_inputs:
        raise MissingInputsError("foldable_permutations captures the model: pass example inputs, as for calling it")
    sparse = copy.deepcopy(model)
    if spec is not None:
        sparse = conversion.sparsify(sparse, _with_permutations(spec), permutations={})
    found: dict[str, FoldableGroup] = {}
    for facts in _capture(sparse, inputs, keyword_inputs):
        Pipeline(kernels=None, disabled=("PlacePermutations",)).run(facts)
        for group in _groups(Placement(facts), dict(sparse_layers(sparse))):
            found[group.layer] = _called_again(group) if group.layer in found else group
    return found


def sparsify(
    model: M,
    spec: SpecLike,
    *inputs: Any,
    permutations: Mapping[str, torch.Tensor] | None = None,
    calibration: Iterable[Any] | None = None,
) -> M:
    """Replace linear layers by permuted structured-sparse ones, in place.

    Covers `nn.Linear` and transformers' `Conv1D`. A layer that cannot be replaced without changing what the model means (a
    subclass with its own forward, a parametrized, quantised or hooked weight, a weight shared with a layer that stays
    dense) stays dense, with the reason in `sparsify_report`.

    Args:
        model: any module; its dense weights decide which weights stay active (`init="magnitude"`).
        spec: a `SparsitySpec`, or a mapping from name patterns to `SparsitySpec` or None (leave dense); first match wins.
        inputs: example inputs, needed where a specification has `permutation_group="foldable"`.
        permutations: for some layers, by name, the permutation to start with: integers, `[features]`. What they are is up to
            you; training under `permutation_group="foldable"` then exchanges only what folds for free.
        calibration: batches for `init="activation"`: each a tensor, a tuple of arguments or a mapping of keyword arguments of
            the model.

    Returns:
        `model` itself; where `model` is a linear layer, its replacement.

    Raises:
        PadstError: the request is wrong, see `padst_compile.conversion.sparsify`; the model is untouched.
    """
    if not inputs:
        return conversion.sparsify(model, spec, permutations=permutations, calibration=calibration)
    trial = conversion.sparsify(copy.deepcopy(model), _with_permutations(spec), permutations={})
    restricted = {
        plan.name: plan
        for plan in planned(model, spec)
        if plan.spec.permutation_group == "foldable" and plan.spec.permutation != "none"
    }
    groups = _jointly_free(foldable_permutations(trial, None, *inputs), restricted) if restricted else {}
    drawn = {name: _draw(plan, groups.get(name)) for name, plan in restricted.items() if plan.spec.permutation == "random"}
    sparse = conversion.sparsify(model, spec, permutations={**drawn, **(permutations or {})}, calibration=calibration)
    _restrict(dict(sparse_layers(sparse)), restricted, groups)
    return sparse


def _jointly_free(groups: Mapping[str, FoldableGroup], restricted: Mapping[str, LayerPlan]) -> dict[str, FoldableGroup]:
    """The groups of restricted layers, without those that hold only together with a layer that does not keep to them."""

    def together(name: str) -> set[str]:
        return {name, *groups[name].shared_with}

    def kept(name: str) -> bool:
        return all(
            other in restricted
            and restricted[other].spec.permutation == restricted[name].spec.permutation
            and together(other) == together(name)
            for other in together(name)
        )

    return {name: group for name, group in groups.items() if name in restricted and kept(name)}


def _restrict(
    layers: Mapping[str, PermutedSparseLinear], restricted: Mapping[str, LayerPlan], groups: Mapping[str, FoldableGroup]
) -> None:
    """Let the layers know which features training may exchange."""
    known: dict[str, Exchanges] = {}
    for name in restricted:
        group = groups.get(name)
        if group is not None:
            others = (known[other] for other in group.shared_with if other in known)
            known[name] = next(others, None) or _exchanges(group)
        layers[name].exchanges = known.get(name, Exchanges(()))


def _exchanges(group: FoldableGroup) -> Exchanges:
    sets = tuple(torch.from_numpy(places) for places in group.group.exchanges())
    return Exchanges(sets, holders=1 + len(group.shared_with))


def _draw(plan: LayerPlan, group: FoldableGroup | None) -> torch.Tensor:
    """A random permutation of a group, the same for all layers that must share it."""
    if group is None:  # the inputs do not reach the layer, or another layer is in the way
        return identity(plan.permuted_features)
    sharing = sorted((group.layer, *group.shared_with))
    digest = hashlib.sha256(f"{plan.spec.seed}/foldable/{'/'.join(sharing)}".encode()).digest()
    return group.random(torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1))


def _with_permutations(spec: SpecLike) -> SpecLike:
    """The same with some permutation on every layer, so that there is something to ask about, and nothing to wait for."""
    if isinstance(spec, SparsitySpec):
        return dataclasses.replace(spec, permutation="random", init="magnitude")
    return {pattern: None if part is None else cast("SparsitySpec", _with_permutations(part)) for pattern, part in spec.items()}


def _capture(model: nn.Module, inputs: tuple[Any, ...], keyword_inputs: Mapping[str, Any]) -> list[Context]:
    """The inference graphs of a model."""
    found: list[Context] = []

    def remember(graph: fx.GraphModule, graph_inputs: list[Any]) -> Callable[..., Any]:
        facts = Context(copy_graph(graph), static_tensors(graph.graph, list(graph_inputs)), inference=True)
        found.append(facts)
        return graph.forward

    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    model.eval()  # a copy: the graph that counts is the one for inference
    try:
        with torch.no_grad():
            torch.compile(call, backend=remember, dynamic=False)(*inputs, **keyword_inputs)
    finally:
        reset_code(call.__code__)
    return found


def _groups(placement: Placement, layers: Mapping[str, PermutedSparseLinear]) -> Iterator[FoldableGroup]:
    for site in placement.sites:
        layer = layers.get(layer_name(site.node))
        if layer is not None and site.side == layer.config.permuted:
            yield _group(placement, site)


def _group(placement: Placement, site: Site) -> FoldableGroup:
    name, size = layer_name(site.node), site.demand.size
    if not site.bytes_per_token:
        return FoldableGroup(name, site.side, all_orders(size), "its kernel reads through an index table in any case")
    freedom = placement.freedom
    leaves = set(freedom.leaves(site.axis))
    others = [o for o in placement.sites if o is not site and o.bytes_per_token and leaves & set(freedom.leaves(o.axis))]
    siblings = [o for o in others if o.side == "input" == site.side and o.axis.root() is site.axis.root()]
    blocking = [o for o in others if o not in siblings]
    links = [end for link in placement.links for end in (link.inputs, link.outputs)]
    blocked = [leaf for axis in (*(o.axis for o in blocking), *links) for leaf in freedom.leaves(axis)]
    group = OrderGroup(site.axis, free_leaves(freedom, site.axis, blocked), freedom)
    shared = tuple(dict.fromkeys(layer_name(o.node) for o in siblings)) if group.free else ()
    return FoldableGroup(name, site.side, group, _reason(placement, site, group, blocking), shared)


def _reason(placement: Placement, site: Site, group: OrderGroup, blocking: list[Site]) -> str:
    if group.kind == "any":
        return "its neighbours take on any order"
    pinned = next((leaf.pinned for leaf in placement.freedom.leaves(site.axis) if leaf.pinned is not None), None)
    if pinned is not None:
        return f"the order is fixed: {pinned}"
    if blocking:
        return f"{layer_name(blocking[0].node)} would need an index table"
    return f"the graph divides the features as {in_words(site.axis)}"


def _called_again(group: FoldableGroup) -> FoldableGroup:
    """What a layer that is called several times may do: what needs no neighbour's help."""
    if group.reason.startswith("its kernel"):
        return group
    size = int(group.group.axis.size)
    return dataclasses.replace(group, group=no_orders(size), reason="the layer is called several times", shared_with=())
