"""Reading torch's distributed checkpoints, whose index is a pickle, without running what a stranger put into it."""

from __future__ import annotations

import io
import pickle
import pickletools
from typing import Any, BinaryIO, cast

import torch
from torch.distributed.checkpoint import metadata as index_classes
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorProperties, TensorStorageMetadata

# `BytesStorageMetadata` marks what torch unpickles without any check; our checkpoints hold tensors alone.
_UNSAFE = {"BytesStorageMetadata"}
_OTHERS = {
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
}


class CheckpointReader(FileSystemReader):
    """torch's reader, with an index that may name torch's descriptions of tensors and nothing else."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index.

        Raises:
            pickle.UnpicklingError: it is damaged, or names anything else.
            OSError: it cannot be read.
        """
        path = self._get_metadata_path(kwargs.get("rank"))
        with self.fs.create_stream(path, "rb") as file:
            index = _read(cast("BinaryIO", file))
        index.storage_meta = getattr(index, "storage_meta", None) or StorageMeta()
        index.storage_meta.load_id = self.load_id
        return index


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """What a name in the file stands for, if it is one of those that torch writes."""
        if not _allowed(module, name):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint of ours does")
        return super().find_class(module, name)


def _allowed(module: str, name: str) -> bool:
    if (module, name) in _OTHERS:
        return True
    if module == "torch":
        return name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)
    found = getattr(index_classes, name, None)
    defined_there = module == index_classes.__name__ and getattr(found, "__module__", "") == module
    return defined_there and isinstance(found, type) and name not in _UNSAFE


def _read(file: BinaryIO) -> Metadata:
    content = file.read()
    try:
        _check_memory(content)
        index = _IndexUnpickler(io.BytesIO(content)).load()
        _check_entries(index)
    except (pickle.UnpicklingError, OSError):
        raise
    except Exception as error:  # a damaged pickle raises whatever the classes that it misuses raise
        raise pickle.UnpicklingError(repr(error)) from error
    return cast("Metadata", index)


def _check_memory(content: bytes) -> None:
    """Refuse places and lengths that a file of this size has no use for: unpickling makes room for them before it looks."""
    for opcode, argument, _ in pickletools.genops(content):
        sized = opcode.name in ("PUT", "BINPUT", "LONG_BINPUT", "FRAME")
        if sized and isinstance(argument, int) and argument > len(content):
            raise pickle.UnpicklingError(f"it makes room for {argument} values")


def _check_entries(index: object) -> None:
    if not isinstance(index, Metadata):
        raise pickle.UnpicklingError(f"it holds {type(index).__name__}, no index")
    for name, entry in index.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata) or not _describes(name, entry.size, entry.properties):
            raise pickle.UnpicklingError(f"it does not describe {name!r} as a tensor")


def _describes(name: object, size: object, properties: object) -> bool:
    if not isinstance(name, str) or not isinstance(size, torch.Size):
        return False
    return isinstance(properties, TensorProperties) and isinstance(properties.dtype, torch.dtype)
