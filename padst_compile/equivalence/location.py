"""Where in a model the running code is, for messages."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Iterator, Mapping
from types import FrameType

import torch

_DISPATCHERS = frozenset({"_call_impl", "_wrapped_call_impl", "__call__", "call_wrapped"})


def locate(names: Mapping[int, str]) -> str:
    """The innermost running module, by its name in `names` (of ids) where it has one, and its source line."""
    for frame in _frames(sys._getframe(1)):
        owner = frame.f_locals.get("self")
        if isinstance(owner, torch.nn.Module) and frame.f_code.co_name not in _DISPATCHERS:
            line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).partition(";")[0].strip()
            name = names.get(id(owner))
            return f"{f'{name!r} ' if name else ''}({type(owner).__name__}): {line}"
    return "no module"


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back
