"""Checkpoints of trainings on any number of ranks: model, optimizers, runtime, and whatever the user adds."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from padst_compile.errors import CheckpointError, PadstError, ResumeError
from padst_compile.files import sync
from padst_compile.training import optimizer_state
from padst_compile.training.attach import unwrapped
from padst_compile.training.checkpoint_folder import CheckpointFolder
from padst_compile.training.runtime import Runtime
from padst_compile.training.sharding import resharder
from padst_compile.training.state_file import read_state
from padst_compile.training.world import World

_VERSION = 1
_STATE = "state.pt"  # what is the same on all ranks, beside the tensors of model and optimizers
_INDEX = ".metadata"  # torch's, of those tensors


def save_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    runtime: Runtime | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Save a training between two optimizer steps; of a distributed one, all ranks call this, and see the same folder.

    The checkpoint before stays until the new one is complete and on the disk, then it is deleted. Sharded weights are written
    by the ranks that hold them. The states of torch's random number generators are saved for each rank.

    Args:
        path: a folder for one checkpoint; made if it does not exist.
        model: as given to `attach`: plain, in `DistributedDataParallel`, after `fully_shard`, or compiled.
        optimizer: one or several.
        runtime: from `attach`; None for a training without.
        extra: of the first rank: schedulers, gradient scaler, position in the data; tensors, numbers, strings, and lists and
            dictionaries of them.

    Raises:
        CheckpointError: it cannot be written, or `extra` holds something else; on all ranks. The one before is still there.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    training, folder = _Training(model, optimizer, runtime), CheckpointFolder(Path(path))
    world = training.world
    _raise(world.first_error(_unfit(extra)))
    state = {**training.state(), "extra": dict(extra or {})}

    def publish() -> str:
        torch.save(state, folder.path / name / _STATE)
        sync(folder.path / name / _STATE)
        folder.seal(name, {**tensors, **folder.digests(name, _INDEX), **folder.digests(name, _STATE)})
        folder.publish(name)
        return name

    with _as_checkpoint_error(f"the checkpoint in {path} could not be written"), _on_purpose_alone():
        name = world.on_first(folder.begin)
        try:
            writer = FileSystemWriter(folder.path / name)  # its files are on the disk when this returns
            save(training.tensors(), storage_writer=writer, process_group=world.group, no_dist=world.size == 1)
            tensors = world.collect(lambda: folder.digests(name, f"__{world.rank}_*.distcp"))  # torch's names
            world.on_first(publish)
        except (Exception, CheckpointException):  # which is a BaseException
            if world.rank == 0:
                with contextlib.suppress(OSError):  # the next checkpoint tries again
                    folder.clear()
            raise


def load_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    runtime: Runtime | None = None,
) -> dict[str, Any]:
    """Continue from `save_checkpoint`, with any number of ranks and any way to distribute the model; all ranks call this.

    Make model, optimizer and runtime as for the beginning of the training, then call this. With as many ranks as before, the
    training goes on as if it had not been interrupted, bit for bit where the arithmetic is deterministic; the states of random
    number generators are loaded then. While it loads, weights and optimizer state exist twice. All files are compared with
    their digests before, which the ranks share out among them.

    Args:
        path: the folder. Nothing that is in its files is executed.
        model: as for `save_checkpoint`.
        optimizer: the same.
        runtime: the same.

    Returns:
        `extra`, as saved.

    Raises:
        CheckpointError: there is none, or it is damaged; on all ranks, and nothing has changed.
        ResumeError: it is of another model, optimizer or configuration; on all ranks, and nothing has changed.
    """
    from torch.distributed.checkpoint.state_dict_loader import load

    from padst_compile.training.checkpoint_reader import CheckpointReader

    training, error = _Training(model, optimizer, runtime), None
    damage = f"the checkpoint in {path} is damaged"
    try:
        with _as_made_up(damage):
            data = CheckpointFolder(Path(path)).checked(training.world.rank, training.world.size)
            state, stored = _read_state(data), _read_metadata(data)
            extra: dict[str, Any] = state["extra"]
            training.check(state, stored)
            room = training.room_for(state, stored)
    except PadstError as caught:
        error = caught
    _raise(training.world.first_error(error))
    with _as_checkpoint_error(damage), _on_purpose_alone():
        reader, world = CheckpointReader(data), training.world
        load(room, storage_reader=reader, process_group=world.group, no_dist=world.size == 1)
    with _as_made_up(damage):
        training.load(state, room)
    return extra


class _Training:
    """All that a checkpoint holds, as tensors that ranks may share out among them, and the rest."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer], runtime: Runtime | None
    ) -> None:
        resharder(model)()
        self.model, self.runtime = model, runtime
        self.optimizers = (optimizer,) if isinstance(optimizer, torch.optim.Optimizer) else tuple(optimizer)
        self.world = World() if runtime is None else runtime.world
        self.names = optimizer_state.parameter_names(unwrapped(model))

    def state(self) -> dict[str, Any]:
        """What is the same on all ranks, but for the tensors of model and optimizers."""
        return {
            "version": _VERSION,
            "ranks": self.world.size,
            "runtime": None if self.runtime is None else self.runtime.state_dict(),
            "optimizers": [optimizer_state.rest_of(optimizer, self.names) for optimizer in self.optimizers],
        }

    def tensors(self) -> dict[str, Any]:
        """Those of model, optimizers and random number generators."""
        found = {f"model.{name}": value for name, value in self._model_state().items()}
        for number, optimizer in enumerate(self.optimizers):
            found |= _prefixed(f"optimizer.{number}.", optimizer_state.tensors_of(optimizer, self.names))
        return found | _random_states(self.world.rank)

    def check(self, state: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
        """Raise ResumeError if a checkpoint with this state and these tensors' metadata does not belong to this training."""
        if (state["runtime"] is None) != (self.runtime is None):
            how = "without" if state["runtime"] is None else "with"
            raise ResumeError(f"the checkpoint was saved {how} a runtime; load it {how} one")
        if self.runtime is not None:
            self.runtime.check(state["runtime"])
        _check_model(self._model_state(), _below("model.", stored))
        if len(state["optimizers"]) != len(self.optimizers):
            raise ResumeError(f"the checkpoint has {len(state['optimizers'])} optimizers, this training {len(self.optimizers)}")
        for optimizer, rest in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer_state.check(optimizer, self.names, rest)

    def room_for(self, state: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
        """Tensors to read a checkpoint into, distributed as this training is."""
        room = {
            f"model.{name}": torch.empty_like(value) if isinstance(value, torch.Tensor) else value
            for name, value in self._model_state().items()
        }
        for number, optimizer in enumerate(self.optimizers):
            prefix = f"optimizer.{number}."
            sizes = {name: (entry.size, entry.properties.dtype) for name, entry in _below(prefix, stored).items()}
            room |= _prefixed(prefix, optimizer_state.room_for(optimizer, self.names, sizes))
        if state["ranks"] == self.world.size:
            room |= {name: value for name, value in _random_states(self.world.rank).items() if name in stored}
        return room

    def load(self, state: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
        """Take a checkpoint over that `check` has found to fit."""
        from torch.distributed.checkpoint.state_dict import set_model_state_dict

        set_model_state_dict(self.model, _below("model.", tensors))
        for number, (optimizer, rest) in enumerate(zip(self.optimizers, state["optimizers"], strict=True)):
            optimizer_state.load(optimizer, self.names, _below(f"optimizer.{number}.", tensors), rest)
        if self.runtime is not None:
            self.runtime.load_state_dict(state["runtime"])
        _set_random_states(self.world.rank, tensors)

    def _model_state(self) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import get_model_state_dict

        return get_model_state_dict(self.model)


def _check_model(own: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    if own.keys() != stored.keys():
        odd = sorted(own.keys() ^ stored.keys())
        raise ResumeError(f"the checkpoint is of another model: they differ in {', '.join(odd[:3])}")
    for name, value in own.items():
        if isinstance(value, torch.Tensor):
            here, there = (value.dtype, list(value.shape)), (stored[name].properties.dtype, list(stored[name].size))
            if here != there:
                raise ResumeError(f"{name} is {there[0]} {there[1]} in the checkpoint and {here[0]} {here[1]} here")


def _read_state(data: Path) -> dict[str, Any]:
    try:
        state = read_state(data / _STATE)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the checkpoint in {data.parent} is damaged: {_STATE} cannot be read ({error})") from error
    version = state.get("version") if isinstance(state, dict) else None
    if version != _VERSION:
        raise CheckpointError(f"{data.parent}: checkpoints of version {_VERSION} can be loaded, not {version!r}")
    return cast("dict[str, Any]", state)


def _read_metadata(data: Path) -> dict[str, Any]:
    """Sizes and dtypes of the stored tensors."""
    from padst_compile.training.checkpoint_reader import CheckpointReader

    try:
        return dict(CheckpointReader(data).read_metadata().state_dict_metadata)
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"the checkpoint in {data.parent} is damaged: its index cannot be read ({error})") from error


def _unfit(extra: Mapping[str, Any] | None) -> CheckpointError | None:
    """Why `extra` could not be loaded again."""
    buffer = io.BytesIO()
    try:
        torch.save(dict(extra or {}), buffer)
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    except (pickle.PicklingError, pickle.UnpicklingError, TypeError, AttributeError) as error:
        return CheckpointError(f"extra takes tensors, numbers, strings, lists and dictionaries alone: {error}")
    return None


def _random_states(rank: int) -> dict[str, torch.Tensor]:
    states = {f"random.{rank}.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states[f"random.{rank}.cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_states(rank: int, tensors: Mapping[str, torch.Tensor]) -> None:
    if f"random.{rank}.cpu" in tensors:
        torch.set_rng_state(tensors[f"random.{rank}.cpu"])
    if f"random.{rank}.cuda" in tensors:
        torch.cuda.set_rng_state(tensors[f"random.{rank}.cuda"])


def _prefixed(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {prefix + name: value for name, value in values.items()}


def _below(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error


@contextlib.contextmanager
def _on_purpose_alone() -> Iterator[None]:
    """Without the warning that there is a single process, where that is what was asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)
        yield


@contextlib.contextmanager
def _as_checkpoint_error(what: str) -> Iterator[None]:
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        reasons = "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in error.failures.items())
        raise CheckpointError(f"{what}: {reasons}") from error
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{what}: {error}") from error


@contextlib.contextmanager
def _as_made_up(what: str) -> Iterator[None]:
    """For reading a state that is whole and yet may be none of ours."""
    try:
        yield
    except PadstError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{what}: {error!r}") from error
