"""`attach` and `finalize`: the beginning and the end of a sparse training."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from torch import distributed, nn

from padst_compile import transformers_config
from padst_compile.conversion import sparse_layers
from padst_compile.errors import AlreadyAttachedError, AttachError, NotAttachedError
from padst_compile.layers import PermutedSparseLinear
from padst_compile.structures import NM, Diagonal
from padst_compile.training.config import DSTConfig
from padst_compile.training.learners import make_learners
from padst_compile.training.newcomers import Newcomers
from padst_compile.training.runtime import Runtime
from padst_compile.training.sharding import is_sharded, not_of_fsdp, resharder
from padst_compile.training.topology import needs_gradient
from padst_compile.training.trained_layer import TrainedLayer
from padst_compile.training.world import World

M = TypeVar("M", bound=nn.Module)

_ATTRIBUTE = "_padst_training"
_WRAPPERS = ("_orig_mod", "module")  # torch.compile; DistributedDataParallel


def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    config: DSTConfig,
    *,
    grad_scaler: torch.amp.GradScaler | None = None,
    process_group: distributed.ProcessGroup | None = None,
) -> Runtime:
    """Train a sparsified model with dynamic topology and, if asked for, learned permutations; the loop stays as it is.

    Call it when the model is on its device, wrapped for distribution, and its optimizer exists; before or after
    `torch.compile`. A step that a GradScaler skips is no step. An update recompiles nothing. The model may move to another
    device or dtype, with its optimizer's state (`optimizer.load_state_dict(optimizer.state_dict())`).

    A sparse layer that the model gets later is none of this training: the next step of an optimizer that got its weights raises
    AttachError, before it changes anything, and until then the layer stays as it is. So does a step after a layer's weights
    have been replaced. Dense parameters may be added at any time.

    Args:
        model: with layers from `padst.sparsify`.
        optimizer: one or several that together hold the weights of all sparse layers, each once.
        config: what to do, and when.
        grad_scaler: of the training, if there is one; only permutations learned as matrices need it.
        process_group: of the data-parallel ranks; None for the default group.

    Returns:
        The runtime: metrics and checkpoints. It lives until `finalize`, or as long as the model.

    Raises:
        AlreadyAttachedError: a runtime trains these layers already.
        AttachError: no sparse layers, an optimizer that does not hold them, tensor-parallel layers, or a configuration that
            does not fit, such as one under which a permutation would never learn.
    """
    given = (optimizer,) if isinstance(optimizer, torch.optim.Optimizer) else tuple(optimizer)
    optimizers = tuple(_inner(each) for each in given)
    reshard, world = resharder(model), World(process_group)
    reshard()
    named = list(sparse_layers(unwrapped(model)))
    _check(named, optimizers, config)
    _check_shards(model, named)
    layers = _trained_layers(named, optimizers)
    _stagger(layers, config)
    _check_ranks(layers, world)
    try:
        learners, newcomers = make_learners(layers, config), Newcomers(unwrapped(model), optimizers, layers)
        runtime = Runtime(layers, optimizers, config, world, learners, newcomers, grad_scaler, reshard)
    except Exception:
        for _, layer in named:  # those before the one that was refused
            layer.soft = layer.gate = None
        raise
    for _, layer in named:
        setattr(layer, _ATTRIBUTE, _Owner(runtime))
    return runtime


def finalize(model: M) -> M:
    """End the training of `attach`: permutations become hard, training state goes, pruned weights are left out.

    The optimizers' hooks are removed; the model is what `sparsify` would have made, ready for
    `torch.compile(model, backend="padst")`. Of a distributed model all ranks call it; weights that are sharded stay so, and
    those among them that were pruned keep their places, as zeros.

    Returns:
        `model` itself.

    Raises:
        NotAttachedError: no runtime trains this model.
    """
    layers = [layer for _, layer in sparse_layers(unwrapped(model))]
    runtimes = {id(runtime): runtime for runtime in map(runtime_of, layers) if runtime is not None}
    if not runtimes:
        raise NotAttachedError("finalize ends what padst.attach began, and nothing is attached to this model")
    for runtime in runtimes.values():
        runtime.finish()
    for layer in layers:
        layer.__dict__.pop(_ATTRIBUTE, None)
    transformers_config.note(unwrapped(model))  # pruned layers have other sizes
    return model


class _Owner:
    """What a layer knows of the runtime that trains it, which so lives as long as the model; copies and pickles know none."""

    def __init__(self, runtime: Runtime | None = None) -> None:
        self.runtime = runtime

    def __deepcopy__(self, memo: object) -> _Owner:
        return _Owner()

    def __reduce__(self) -> tuple[type[_Owner], tuple[()]]:
        return _Owner, ()


def runtime_of(layer: PermutedSparseLinear) -> Runtime | None:
    """The runtime that trains this layer, or None."""
    owner: _Owner | None = layer.__dict__.get(_ATTRIBUTE)
    return None if owner is None else owner.runtime


def _inner(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer that takes the steps, inside a wrapper like accelerate's."""
    inner = getattr(optimizer, "optimizer", None)
    return _inner(inner) if isinstance(inner, torch.optim.Optimizer) else optimizer


def unwrapped(model: nn.Module) -> nn.Module:
    """The model that the user named, inside the wrappers of compilation and distribution."""
    while True:
        inner = next((getattr(model, name) for name in _WRAPPERS if _wraps(model, name)), None)
        if inner is None:
            return model
        model = inner


def _wraps(model: nn.Module, name: str) -> bool:
    kind = type(model).__name__
    return name in model._modules and kind in ("OptimizedModule", "DistributedDataParallel", "DataParallel")


def _check(
    named: Sequence[tuple[str, PermutedSparseLinear]], optimizers: Sequence[torch.optim.Optimizer], config: DSTConfig
) -> None:
    if not isinstance(config, DSTConfig):
        raise AttachError(f"attach takes a DSTConfig, got {config!r}")
    if not named:
        raise AttachError("the model has no sparse layers; call padst.sparsify(model, spec) first")
    if not any(layer.values.requires_grad for _, layer in named):
        raise AttachError("all sparse layers are frozen; set requires_grad on the values of those to train")
    for name, layer in named:
        if runtime_of(layer) is not None:
            raise AlreadyAttachedError(
                f"layer {name!r} is being trained already; call padst.finalize(model) before a second attach"
            )
        problem = _unfit(layer, config)
        if problem is not None:
            raise AttachError(f"layer {name!r} {problem}")
    if config.ablation is not None and not any(isinstance(layer.config.structure, NM) for _, layer in named):
        raise AttachError("ablation gives up outputs of N:M layers, and the model has none; leave it out")
    if config.permutation is not None and all(layer.permutation is None for _, layer in named):
        raise AttachError("no layer has a permutation to learn; sparsify with permutation='learned'")


def _check_ranks(layers: Sequence[TrainedLayer], world: World) -> None:
    """Ranks that begin with different models would train different ones."""
    device = layers[0].layer.topology[0].device
    own = zlib.crc32(repr([(layer.name, layer.fingerprint()) for layer in layers]).encode())
    if world.any(own != world.agree_on_number(own, device), device):
        raise AttachError(
            "the ranks' models differ in their sparse layers, topologies or permutations; "
            "seed all ranks alike before sparsify, or wrap the model for distribution before attach"
        )


def _unfit(layer: PermutedSparseLinear, config: DSTConfig) -> str | None:
    """Why a layer cannot be trained so, or None."""
    structure = layer.config.structure
    if layer.values.is_meta:
        return "is on the meta device; materialise the model first"
    if not structure.has_units():
        return f"is {structure.to_string()}, which defines no units to choose among; freeze its values, or define them"
    if config.method == "magnitude" and structure.natural_sparsity() is not None:
        return f"is {structure.to_string()}, whose sparsity cannot be pruned further; use a block or diagonal structure"
    if config.method == "dynadiag" and not _has_all_diagonals(layer):
        return (
            "must begin with all its diagonals, among which method 'dynadiag' chooses; sparsify with Diagonal() at "
            "sparsity=0, and give the sparsity to reach as DSTConfig.final_sparsity"
        )
    return None


def _has_all_diagonals(layer: PermutedSparseLinear) -> bool:
    structure = layer.config.structure
    return isinstance(structure, Diagonal) and bool(structure.active_units(layer.topology, layer.config.shape).all())


def _check_shards(model: nn.Module, named: Sequence[tuple[str, PermutedSparseLinear]]) -> None:
    """Refuse weights that are sharded otherwise than by FSDP2: units would be split among ranks. A collective where any are."""
    sharded = [layer for _, layer in named if is_sharded(layer.values)]
    foreign = not_of_fsdp(model, sharded) if sharded else []
    for name, layer in named:
        if any(layer is other for other in foreign):
            how = ", ".join(map(str, layer.values.placements))  # type: ignore[attr-defined]  # DTensor
            raise AttachError(
                f"layer {name!r} is split for tensor parallelism, or by hand ({how}): not by fully_shard, or not by it alone, "
                "which would divide its units and needs gradients of its own; leave it out of the plan, and use fully_shard or "
                "DistributedDataParallel"
            )


def _stagger(layers: Sequence[TrainedLayer], config: DSTConfig) -> None:
    """Give the layers that are to be updated one after the other their places in the interval."""
    regroups = config.permutation is not None and config.permutation.method == "regroup"
    collects = needs_gradient(config.method) or regroups

    def is_fine(layer: TrainedLayer) -> bool:  # regroup looks at every weight of a diagonal
        return collects and (layer.has_fine_units or (regroups and isinstance(layer.structure, Diagonal)))

    later = [layer for layer in layers if (is_fine(layer) if config.staggered is None else config.staggered)]
    for number, layer in enumerate(later):
        layer.offset = number * config.interval // len(later)


def _trained_layers(
    named: Iterable[tuple[str, PermutedSparseLinear]], optimizers: Sequence[torch.optim.Optimizer]
) -> list[TrainedLayer]:
    owners: dict[int, torch.optim.Optimizer] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if owners.setdefault(id(parameter), optimizer) is not optimizer:
                    raise AttachError("a parameter is held by two optimizers; give each to one")
    sharing: dict[int, list[tuple[str, PermutedSparseLinear]]] = {}
    for name, layer in named:
        if not layer.values.requires_grad:  # frozen: it stays as it is
            continue
        sharing.setdefault(id(layer.values), []).append((name, layer))
    layers = []
    for members in sharing.values():
        name, first = members[0]
        if id(first.values) not in owners:
            raise AttachError(
                f"the optimizer does not hold the weights of layer {name!r}; make it from model.parameters() after sparsify "
                "and after wrapping the model"
            )
        layers.append(TrainedLayer(name, tuple(layer for _, layer in members), owners[id(first.values)]))
    return layers
