"""`sparsify` and `densify`: between dense linear layers and `PermutedSparseLinear`, in place and all or nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.utils import parametrize

from padst_compile import transformers_config
from padst_compile.calibration import input_norms
from padst_compile.errors import AlreadySparseError, CalibrationError, CompiledModelError, MetaDeviceError, MissingInputsError
from padst_compile.layers import Origin, PermutedSparseLinear, build_layer
from padst_compile.planning import Candidate, LayerPlan, Plan, Refusal, make_plan
from padst_compile.spec import SpecLike
from padst_compile.structures import Shape

M = TypeVar("M", bound=nn.Module)

_REPORT = "_padst_report"
_FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class SparsifyReport:
    """What `sparsify` did: the layers it made sparse and those that stay dense, with the reason."""

    layers: tuple[LayerPlan, ...]
    refusals: tuple[Refusal, ...]


class Linear(nn.Module):
    """What `nn.Linear` and `Conv1D` have in common, for the type checker."""

    weight: torch.Tensor
    bias: nn.Parameter | None


def sparsify(
    model: M,
    spec: SpecLike,
    *,
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
        permutations: for some layers, by name, the permutation to start with: integers, `[features]`.
        calibration: batches for `init="activation"`, see `calibration.input_norms`.

    Returns:
        `model` itself; where `model` is a linear layer, its replacement.

    Raises:
        PatternError, StructureMismatchError, EmptyLayerError, NothingToSparsifyError, AlreadySparseError,
        CompiledModelError, MetaDeviceError, MissingInputsError, InvalidPermutationError, CalibrationError: the request is
            wrong; the model is untouched.
    """
    check_dense(model)
    modules = dict(linears(model))
    plan = _plan(modules, model, spec)
    if permutations is None and any(layer.spec.permutation_group == "foldable" for layer in plan.layers):
        raise MissingInputsError(
            "permutation_group='foldable' depends on the graph of the model: call padst.sparsify(model, spec, *example_inputs)"
        )
    for layer in plan.layers:
        if modules[layer.name].weight.is_meta:
            raise MetaDeviceError(f"layer {layer.name!r} is on the meta device; materialise it first (model.to_empty, load)")
    norms = _input_norms(model, plan.layers, calibration)
    replacements = _build(plan.layers, modules, permutations or {}, norms)
    return _installed(model, replacements, SparsifyReport(plan.layers, plan.refusals))


def install(model: M, layers: Mapping[str, PermutedSparseLinear], report: SparsifyReport) -> M:
    """Put sparse layers in the places of the dense ones of these names, see `linears`; they are not checked.

    Returns:
        `model` itself; where `model` is a linear layer, its replacement.
    """
    modules = dict(linears(model))
    return _installed(model, {id(modules[name]): layer for name, layer in layers.items()}, report)


def _installed(model: M, replacements: dict[int, nn.Module], report: SparsifyReport) -> M:
    result = _commit(model, replacements)
    setattr(result, _REPORT, report)
    transformers_config.note(result)
    return result


def planned(model: nn.Module, spec: SpecLike) -> tuple[LayerPlan, ...]:
    """The layers that `sparsify` would make sparse.

    Raises:
        PadstError: the specification is wrong.
    """
    return _plan(dict(linears(model)), model, spec).layers


def sparsify_report(model: nn.Module) -> SparsifyReport:
    """What `sparsify` did to this model; empty for a model it has not seen."""
    report = getattr(model, _REPORT, None)
    return report if isinstance(report, SparsifyReport) else SparsifyReport((), ())


def densify(model: M) -> M:
    """Replace every `PermutedSparseLinear` by the `nn.Linear` or `Conv1D` it came from, in place and exactly.

    Zeros and permutations are folded into the dense weights, so the result needs nothing of this package.

    Returns:
        `model` itself; where `model` is a sparse layer, its replacement.
    """
    built: dict[int, nn.Module] = {}
    weights: dict[int, nn.Parameter] = {}
    for _, module in model.named_modules():
        if isinstance(module, PermutedSparseLinear) and id(module) not in built:
            key = id(module.values)
            if key not in weights:  # tied layers stay tied
                weights[key] = nn.Parameter(module.weight.detach().contiguous(), module.values.requires_grad)
            built[id(module)] = _dense_layer(module, weights[key])
    result = _commit(model, built)
    if hasattr(result, _REPORT):
        delattr(result, _REPORT)
    transformers_config.forget(result)
    return result


def sparse_layers(model: nn.Module) -> Iterator[tuple[str, PermutedSparseLinear]]:
    """Name and module of every sparse layer."""
    for name, module in model.named_modules():
        if isinstance(module, PermutedSparseLinear):
            yield name, module


def check_dense(model: nn.Module) -> None:
    """Raise CompiledModelError or AlreadySparseError if layers of a model cannot be replaced as they are."""
    for name, module in model.named_modules():
        if isinstance(module, OptimizedModule) or getattr(module, "_compiled_call_impl", None) is not None:
            raise CompiledModelError(f"module {name!r} is already compiled; call sparsify first, then torch.compile")
        if isinstance(module, PermutedSparseLinear):
            raise AlreadySparseError(f"layer {name!r} is already sparse; call padst.densify(model) before another sparsify")


def linears(model: nn.Module) -> Iterator[tuple[str, Linear]]:
    """Every module that looks like a linear layer; a module with several names appears once."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or _is_conv1d(module):
            yield name, cast("Linear", module)


def _is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D, told by name so that transformers stays optional."""
    return any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(module).__mro__)


def origin_of(module: nn.Module) -> Origin:
    """What kind of dense layer this is."""
    return "conv1d" if _is_conv1d(module) else "linear"


def shape_of(module: Linear) -> Shape:
    """Its shape as a linear layer."""
    rows, columns = module.weight.shape
    return Shape(columns, rows) if _is_conv1d(module) else Shape(rows, columns)


def _refusal(module: Linear) -> str | None:
    """Why a layer must stay dense whatever the specification says, or None."""
    if parametrize.is_parametrized(module):
        return "its parameters are parametrized; remove_parametrizations first"
    kind: type[nn.Module] = type(module)
    if kind is not nn.Linear and kind.__module__ != "transformers.pytorch_utils":
        return f"{kind.__name__} is a subclass of Linear whose forward may differ"
    if not isinstance(module.weight, nn.Parameter):
        return "its weight is computed by a hook (weight_norm, pruning); remove it first"
    if type(module.weight) is not nn.Parameter and type(module.weight.data) is not torch.Tensor:
        return f"its weight is a {type(module.weight).__name__} (quantised or sharded)"
    if module.weight.dtype not in _FLOATING:
        return f"its weight is {module.weight.dtype}, not a floating type that can be sparse"
    if module.weight.numel() == 0:
        return "it has no weights"
    if any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)):
        return "it has hooks, which would be lost; remove them first"
    return None


def _plan(modules: dict[str, Linear], model: nn.Module, spec: SpecLike) -> Plan:
    """What becomes of every layer. Each tie that it would break leaves a layer dense, so the others are planned anew."""
    refusals = {name: _refusal(module) for name, module in modules.items()}
    refusals |= _half_tied({name: None for name, reason in refusals.items() if reason is None}, modules, model)
    while True:
        # A layer that stays dense needs no shape, and a lazy one has none.
        candidates = [
            Candidate(name, shape_of(modules[name]) if reason is None else Shape(0, 0), reason)
            for name, reason in refusals.items()
        ]
        plan = make_plan(candidates, spec)
        ties = _half_tied({layer.name: layer.spec for layer in plan.layers}, modules, model)
        if not ties:
            return plan
        refusals |= ties


def _half_tied(chosen: Mapping[str, object], modules: dict[str, Linear], model: nn.Module) -> dict[str, str]:
    """Layers of `chosen` (with the specification of each) that cannot keep sharing their weight, and why."""
    replaced = {id(modules[name]) for name in chosen}
    dense_owner = {
        id(parameter): name or "the model"
        for name, module in model.named_modules()
        if id(module) not in replaced
        for parameter in module.parameters(recurse=False)
    }
    first: dict[int, str] = {}
    ties: dict[str, str] = {}
    for name, spec in chosen.items():
        key = id(modules[name].weight)
        twin = first.setdefault(key, name)
        if key in dense_owner:
            ties[name] = f"its weight is shared with {dense_owner[key]!r}, which stays dense"
        elif (origin_of(modules[twin]), chosen[twin]) != (origin_of(modules[name]), spec):
            ties[name] = f"its weight is shared with {twin!r}, which is laid out or specified otherwise"
    return ties


def _input_norms(model: nn.Module, plans: Sequence[LayerPlan], calibration: Iterable[Any] | None) -> Mapping[str, torch.Tensor]:
    names = [plan.name for plan in plans if plan.spec.init == "activation"]
    if calibration is None and names:
        raise MissingInputsError("init='activation' needs examples: call padst.sparsify(model, spec, calibration=batches)")
    if calibration is not None and not names:
        raise CalibrationError("calibration is what init='activation' reads, and no layer has it; leave it out")
    return {} if calibration is None else input_norms(model, names, calibration)


def _build(
    plans: Sequence[LayerPlan],
    modules: dict[str, Linear],
    permutations: Mapping[str, torch.Tensor],
    norms: Mapping[str, torch.Tensor],
) -> dict[int, nn.Module]:
    """The replacement of every planned layer, by id of the module it replaces; nothing is installed yet."""
    built: dict[int, nn.Module] = {}
    by_weight: dict[int, PermutedSparseLinear] = {}
    for plan in _with_progress(plans):
        module = modules[plan.name]
        origin = origin_of(module)
        twin = by_weight.get(id(module.weight))
        if twin is not None:  # tied weights share values, topology and permutation
            layer = PermutedSparseLinear(twin.config, twin.values, twin.topology, twin.permutation, module.bias)
        else:
            weight = module.weight.T if origin == "conv1d" else module.weight
            layer = build_layer(
                plan,
                weight,
                module.bias,
                origin=origin,
                requires_grad=module.weight.requires_grad,
                start=permutations.get(plan.name),
                input_norms=norms.get(plan.name),
            )
            by_weight[id(module.weight)] = layer
        built[id(module)] = layer.train(module.training)
    return built


def _with_progress(plans: Sequence[LayerPlan]) -> Iterable[LayerPlan]:
    """`plans`, with a bar on a terminal where layers take long."""
    if not any(plan.spec.permutation == "search" for plan in plans):
        return plans
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(plans, "searching permutations", console=console, transient=True, disable=not console.is_terminal)


def _dense_layer(layer: PermutedSparseLinear, weight: nn.Parameter) -> nn.Module:
    if layer.config.origin == "conv1d":
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            dense: nn.Module = Conv1D(layer.out_features, layer.in_features)
    else:
        dense = nn.Linear(layer.in_features, layer.out_features, device="meta")
    dense.weight = weight
    dense.register_parameter("bias", layer.bias)
    return dense.train(layer.training)


def _commit(model: M, replacements: dict[int, nn.Module]) -> M:
    """Install the replacements under every name that their originals have."""
    if id(model) in replacements:
        return replacements[id(model)]  # type: ignore[return-value]  # a linear layer by itself
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and id(child) in replacements:
                parent._modules[name] = replacements[id(child)]
    return model
