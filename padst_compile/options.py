"""What `torch.compile(backend="padst", options=…, mode=…)` accepts, checked before anything is compiled."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch._inductor

from padst_compile.autotune.effort import Effort
from padst_compile.errors import InvalidOptionError, UnknownFieldError, UnknownOptionError, did_you_mean
from padst_compile.passes.choose_kernels import Policy
from padst_compile.passes.pipeline import rules

_OWN = ("kernels", "autotune", "disable", "dump", "verify")
_THOROUGH_MODES = ("max-autotune", "max-autotune-no-cudagraphs")


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the backend.

    Args:
        kernels: "measure" runs each sparse layer on the faster of sparse kernel and dense product; "sparse" and "dense"
            force one.
        autotune: how much may be measured for that: "off", "cached", "quick" or "full" (`padst_compile.autotune.effort`).
        disable: names of passes to leave out.
        dump: folder for the graph before and after every pass; `PADST_DUMP` sets it too.
        inductor: settings handed on to Inductor.
        verify: whether to prove, with `padst.verify`, that each pass kept what the graph computes.
    """

    kernels: Policy = "measure"
    disable: tuple[str, ...] = ()
    dump: str | None = None
    inductor: tuple[tuple[str, Any], ...] = ()
    verify: bool = False
    autotune: Effort = "quick"


def read_options(mode: str | None, options: Mapping[str, Any] | None) -> Options:
    """Validate what torch.compile hands over.

    Raises:
        UnknownOptionError: an option that neither this package nor Inductor has.
        InvalidOptionError: a value that an option does not take, or an unknown mode.
    """
    own = dict(options or {})
    inductor = _mode_settings(mode)
    known = _inductor_options()
    for name in [name for name in own if name not in _OWN]:
        if name.replace("-", "_") not in known:
            raise UnknownOptionError(name, [*_OWN, *known])
        inductor[name.replace("-", "_")] = own.pop(name)
    kernels = own.get("kernels", "measure")
    if kernels not in get_args(Policy):
        raise InvalidOptionError(f"options['kernels'] is one of {', '.join(get_args(Policy))}, got {kernels!r}")
    dump = own.get("dump") or os.environ.get("PADST_DUMP") or None
    if dump is not None and not isinstance(dump, (str, os.PathLike)):
        raise InvalidOptionError(f"options['dump'] is a folder, got {dump!r}")
    folder = None if dump is None else str(Path(dump))
    verify = own.get("verify", False)
    if not isinstance(verify, bool):
        raise InvalidOptionError(f"options['verify'] is True or False, got {verify!r}")
    autotune = own.get("autotune", "full" if mode in _THOROUGH_MODES else "quick")
    if autotune not in get_args(Effort):
        hint = did_you_mean(str(autotune), get_args(Effort))
        raise InvalidOptionError(f"options['autotune'] is one of {', '.join(get_args(Effort))}, got {autotune!r}{hint}")
    return Options(kernels, _disabled(own.get("disable", ())), folder, tuple(inductor.items()), verify, autotune)


def _disabled(names: Any) -> tuple[str, ...]:
    names = (names,) if isinstance(names, str) else names
    if not isinstance(names, (list, tuple)):
        raise InvalidOptionError(f"options['disable'] is a list of pass names, got {names!r}")
    known = [rule.__name__ for rule in rules()]
    for name in names:
        if name not in known:
            raise UnknownFieldError("pass in options['disable']:", str(name), known)
    return tuple(names)


def _mode_settings(mode: str | None) -> dict[str, Any]:
    if mode is None or mode == "default":
        return {}
    modes = torch._inductor.list_mode_options()
    if mode not in modes:
        raise InvalidOptionError(f"unknown mode {mode!r}; choose from default, {', '.join(sorted(modes))}")
    return dict(modes[mode])


def _inductor_options() -> set[str]:
    return set(torch._inductor.list_options())
