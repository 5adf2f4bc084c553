"""`padst.json`: what a folder of `save_pretrained` holds, and how to know that it is all there."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from padst_compile.conversion import SparsifyReport
from padst_compile.errors import PadstError, PretrainedError
from padst_compile.files import sha256_of
from padst_compile.layout import LayerLayout, layouts_from_dict
from padst_compile.planning import LayerPlan, Refusal
from padst_compile.spec import SparsitySpec

NAME = "padst.json"
_FORMAT, _VERSION = "padst_compile", 1
_FIELDS = ("format", "version", "weights", "shared", "layers", "sparsified", "sha256")
_WEIGHTS = re.compile(r"model-[0-9a-f]{16}\.safetensors")  # a plain name: no file outside the folder can be meant


@dataclasses.dataclass(frozen=True)
class WeightsFile:
    """The file of tensors.

    Args:
        file: its name in the folder.
        bytes: its size.
        sha256: hexadecimal, of its content.
    """

    file: str
    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> WeightsFile:
        """Describes the file `path` under the name that its content gives it."""
        digest = sha256_of(path)
        return cls(f"model-{digest[:16]}.safetensors", path.stat().st_size, digest)

    def check(self, folder: Path) -> Path:
        """The path of the file, once its size and content are found to be these.

        Raises:
            PretrainedError: they are not.
        """
        path = folder / self.file
        try:
            size = path.stat().st_size
            if size != self.bytes:
                raise PretrainedError(f"{path} has {size} bytes, not {self.bytes}; it is not complete, copy the folder again")
            if sha256_of(path) != self.sha256:
                raise PretrainedError(f"{path} is not the file that was saved: its sha256 is another; copy the folder again")
        except OSError as error:
            raise PretrainedError(f"{path} cannot be read ({error}); copy the whole folder") from error
        return path


@dataclasses.dataclass(frozen=True)
class Index:
    """The content of `padst.json`.

    Args:
        weights: the file of tensors.
        shared: names of tensors that are stored under another one, which they map to.
        layers: the sparse layers by name.
        report: what `sparsify` was asked for.
    """

    weights: WeightsFile
    shared: Mapping[str, str]
    layers: Mapping[str, Any]  # the JSON form of LayerLayout; `layouts` reads it
    report: SparsifyReport

    @property
    def layouts(self) -> dict[str, LayerLayout]:
        """The sparse layers by name.

        Raises:
            PretrainedError: what is there describes none.
        """
        return layouts_from_dict(self.layers)

    def to_text(self) -> str:
        """As JSON."""
        data = {
            "format": _FORMAT,
            "version": _VERSION,
            "weights": dataclasses.asdict(self.weights),
            "shared": dict(self.shared),
            "layers": dict(self.layers),
            "sparsified": _report_to_dict(self.report),
        }
        return json.dumps({**data, "sha256": own_sha256(data)}, indent=1) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Index:
        """That of a folder.

        Raises:
            PretrainedError: there is none, or another program's, or a damaged one.
        """
        path = folder / NAME
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise PretrainedError(f"{path} cannot be read ({error}); padst.save_pretrained writes it") from error
        except (ValueError, RecursionError) as error:
            raise PretrainedError(f"{path} is damaged: {error}") from error
        if not isinstance(data, dict) or data.get("format") != _FORMAT:
            raise PretrainedError(f"{path} was not written by padst.save_pretrained")
        if data.get("version") != _VERSION:
            raise PretrainedError(f"{path} has version {data.get('version')!r}; this padst_compile reads version {_VERSION}")
        if sorted(data) != sorted(_FIELDS):
            raise PretrainedError(f"{path} is damaged: it should have {', '.join(_FIELDS)}, and has {', '.join(sorted(data))}")
        if data["sha256"] != own_sha256(data):
            raise PretrainedError(f"{path} is not as it was saved: its sha256 is another; copy the folder again")
        try:
            layers = layouts_from_dict(data["layers"])
            report = _report_from_dict(data["sparsified"], layers)
            return cls(_weights(data["weights"]), _shared(data["shared"]), data["layers"], report)
        except (KeyError, TypeError, AttributeError, IndexError, ValueError, OverflowError, PadstError) as error:
            raise PretrainedError(f"{path} is damaged: {error}") from error


def own_sha256(data: Mapping[str, Any]) -> str:
    """Of all other fields of an index, by which a damaged one is told from another model's."""
    rest = {name: value for name, value in data.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _weights(data: Mapping[str, Any]) -> WeightsFile:
    found = WeightsFile(**data)
    if not isinstance(found.file, str) or not _WEIGHTS.fullmatch(found.file):
        raise PretrainedError(f"{found.file!r} names no file of weights")
    return found


def _shared(data: Mapping[str, Any]) -> dict[str, str]:
    found = dict(data)
    if not all(isinstance(stored, str) for stored in found.values()):
        raise PretrainedError("'shared' maps names to names")
    return found


def _report_to_dict(report: SparsifyReport) -> dict[str, Any]:
    specs = list(dict.fromkeys(plan.spec for plan in report.layers))
    return {
        "specs": [spec.to_dict() for spec in specs],
        "layers": {plan.name: {"sparsity": plan.sparsity, "spec": specs.index(plan.spec)} for plan in report.layers},
        "dense": {refusal.name: refusal.reason for refusal in report.refusals},
    }


def _report_from_dict(data: Mapping[str, Any], layers: Mapping[str, LayerLayout]) -> SparsifyReport:
    specs = [SparsitySpec.from_dict(spec) for spec in data["specs"]]

    def plan(name: str, asked: Mapping[str, Any]) -> LayerPlan:
        config = layers[name].config
        return LayerPlan(name, config.shape, config.structure, float(asked["sparsity"]), specs[asked["spec"]])

    plans = tuple(plan(name, asked) for name, asked in data["layers"].items())
    return SparsifyReport(plans, tuple(Refusal(name, str(reason)) for name, reason in data["dense"].items()))
