"""`save_pretrained` and `load_pretrained`: a sparse model as safetensors and JSON, of which nothing is executed.

<folder>/padst.json                          the sparse layers, what was asked for, size and sha256 of the tensors
<folder>/model-<start of sha256>.safetensors   all tensors; a new save replaces `padst.json` last, atomically
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from padst_compile.conversion import Linear, check_dense, install, linears, origin_of, shape_of, sparse_layers, sparsify_report
from padst_compile.deployment import index_file
from padst_compile.deployment.index_file import Index, WeightsFile
from padst_compile.errors import PretrainedError
from padst_compile.files import remove_drafts, replace_file, sync
from padst_compile.layers import PermutedSparseLinear
from padst_compile.layout import LayerLayout, layouts_to_dict
from padst_compile.training.attach import unwrapped
from padst_compile.training.sharding import resharder
from padst_compile.training.world import World

M = TypeVar("M", bound=nn.Module)

_DRAFT = "model.safetensors"


def save_pretrained(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write a sparse (or dense) model's tensors as safetensors, and what its sparse layers are as JSON.

    Until the new files are complete and on the disk, the folder holds the model that was saved there before. Sharded tensors
    are written whole; of a distributed model, all ranks call this. Shared tensors are stored once.

    Args:
        model: plain, or wrapped for training or by `torch.compile`. Which features training may exchange
            (`permutation_group="foldable"`) is not kept.
        folder: made if it does not exist.

    Raises:
        PretrainedError: a layer is still in training with a soft permutation or a gate, the model's state holds something else
            than tensors, or the folder cannot be written; on all ranks.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    plain, world, path = unwrapped(model), World(), Path(folder)
    resharder(model)()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(plain, options=options)  # whole on the first rank, empty on others
    unfit = world.first_error(_unfit(plain, state))
    if unfit is not None:
        raise unfit

    def write() -> str:
        tensors = cast("dict[str, torch.Tensor]", state)  # `_unfit` has seen them
        _write(path, tensors, layouts_to_dict(plain), sparsify_report(plain))
        return str(path)

    try:
        world.on_first(write)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise PretrainedError(f"the model could not be written to {path}: {error}") from error


def load_pretrained(folder: str | os.PathLike[str], model: M) -> M:
    """Turn a dense model into the one that `save_pretrained` wrote, in place: the same layers sparse, the same tensors.

    Everything is checked before the model is touched. Its tensors keep their devices and take the file's dtypes.

    Args:
        folder: of `save_pretrained`.
        model: of the same architecture, dense, as before `sparsify`.

    Returns:
        `model` itself; where `model` is a linear layer, its replacement.

    Raises:
        PretrainedError: the folder is missing, foreign, incomplete or changed, or holds another model; the model is untouched.
        AlreadySparseError, CompiledModelError: the model cannot be turned into a sparse one; it is untouched.
    """
    check_dense(model)
    path = Path(folder)
    index = Index.read(path)
    tensors = _read_tensors(index.weights.check(path), index.shared)
    layers = _layers(model, index.layouts, tensors)
    _check_rest(model, layers, tensors)
    result = install(model, layers, index.report)
    _adopt_dtypes(result, tensors)
    result.load_state_dict(tensors)
    return result


def _unfit(model: nn.Module, state: Mapping[str, Any]) -> PretrainedError | None:
    """Why a model cannot be saved."""
    for name, layer in sparse_layers(model):
        if layer.gate is not None or (layer.soft is not None and layer.soft.is_soft):
            return PretrainedError(
                f"layer {name!r} is in training, and its files would not say all of it; call padst.finalize first"
            )
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            return PretrainedError(f"{name} is no tensor but {type(value).__name__}, which safetensors cannot hold")
    return None


def _write(folder: Path, state: Mapping[str, torch.Tensor], layers: Mapping[str, Any], report: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    remove_drafts(folder / _DRAFT)
    shared = _shared(state)
    tensors = {name: _alone(tensor) for name, tensor in state.items() if name not in shared}
    replace_file(folder / _DRAFT, lambda draft: save_file(tensors, draft, {"format": "pt"}))
    weights = WeightsFile.of(folder / _DRAFT)
    (folder / _DRAFT).replace(folder / weights.file)
    sync(folder)
    index = Index(weights, shared, layers, report)
    replace_file(folder / index_file.NAME, lambda draft: draft.write_text(index.to_text(), encoding="utf-8"))
    for old in folder.glob("model-*.safetensors"):
        if old.name != weights.file:
            old.unlink()


def _shared(state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Tensors that are the very numbers of an earlier one, and its name."""
    first: dict[tuple[Any, ...], str] = {}
    found = {}
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() > 0 and first.setdefault(place, name) != name:
            found[name] = first[place]
    return found


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in memory of its own, as safetensors wants it."""
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor.contiguous() if whole else tensor.clone(memory_format=torch.contiguous_format)


def _read_tensors(file: Path, shared: Mapping[str, str]) -> dict[str, torch.Tensor]:
    try:
        tensors = load_file(file)
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise PretrainedError(f"{file} is damaged: {error}") from error
    for name, stored in shared.items():
        if stored not in tensors or name in tensors:
            raise PretrainedError(f"{file} is damaged: {name} should be stored as {stored}")
    return {**tensors, **{name: tensors[stored] for name, stored in shared.items()}}


def _layers(
    model: nn.Module, layouts: Mapping[str, LayerLayout], tensors: Mapping[str, torch.Tensor]
) -> dict[str, PermutedSparseLinear]:
    """The sparse layers of a file, made but not installed."""
    modules = dict(linears(model))
    copies: dict[int, torch.Tensor] = {}  # tied layers share theirs

    def copied(stored: torch.Tensor, like: torch.Tensor, is_parameter: bool) -> torch.Tensor:
        if id(stored) not in copies:
            copy = stored.to(like.device, copy=True)  # a tensor from a file may be the file itself, in memory
            copies[id(stored)] = nn.Parameter(copy, like.requires_grad) if is_parameter else copy
        return copies[id(stored)]

    built = {}
    for name, layout in layouts.items():
        module = modules.get(name)
        if module is None:
            raise PretrainedError(f"the model has no linear layer {name!r}, which is sparse in the files; make the same model")
        _check_place(name, module, layout)
        own = {key: tensors[_join(name, key)] for key in layout.empty(torch.float32, "meta") if _join(name, key) in tensors}
        problem = layout.problem(own)
        if problem is not None:
            raise PretrainedError(f"layer {name!r} in the files is damaged: {problem}")
        own = {key: copied(stored, module.weight, key == "values") for key, stored in own.items()}
        built[name] = layout.layer(own, module.bias).train(module.training)
    return built


def _check_place(name: str, module: Linear, layout: LayerLayout) -> None:
    if module.weight.is_meta:
        raise PretrainedError(f"layer {name!r} is on the meta device; materialise the model first (model.to_empty)")
    here, there = (origin_of(module), shape_of(module)), (layout.config.origin, layout.config.shape)
    if here != there:
        raise PretrainedError(f"layer {name!r} was {there[0]}, {there[1]}, and is {here[0]}, {here[1]}, in the model")


def _check_rest(model: nn.Module, layers: Mapping[str, PermutedSparseLinear], tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise PretrainedError unless the files hold exactly the tensors of the model with these layers, in the same sizes."""
    expected = dict(_expected(model, layers))
    missing, unexpected = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    if missing or unexpected:
        odd = ", ".join((*sorted(missing)[:3], *sorted(unexpected)[:3]))
        raise PretrainedError(f"the files hold another model: the two differ in {odd}; make the same model")
    first: dict[int, str] = {}
    for name, tensor in expected.items():
        if tensor.shape != tensors[name].shape:
            raise PretrainedError(f"{name} is {list(tensors[name].shape)} in the files and {list(tensor.shape)} in the model")
        twin = first.setdefault(id(tensor), name)
        if tensors[twin] is not tensors[name] and not torch.equal(tensors[twin], tensors[name]):
            raise PretrainedError(f"{twin} and {name} are one tensor in the model and two in the files; make the same model")


def _expected(model: nn.Module, layers: Mapping[str, PermutedSparseLinear]) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of the state of the model with these layers, which are not installed yet."""
    modules = dict(linears(model))
    replaced = {id(modules[name]): layer for name, layer in layers.items()}
    places = {
        name: replaced[id(module)] for name, module in model.named_modules(remove_duplicate=False) if id(module) in replaced
    }
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name.rpartition(".")[0] not in places:
            yield name, tensor
    for place, layer in places.items():
        for key, tensor in layer.state_dict(keep_vars=True).items():
            yield _join(place, key), tensor


def _adopt_dtypes(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give the model's tensors the dtypes of the files, where they stand."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.dtype != tensors[name].dtype:
            tensor.data = tensor.data.to(tensors[name].dtype)


def _join(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name
