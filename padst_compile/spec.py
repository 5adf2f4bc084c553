"""What to sparsify and how: the specification that a user writes, saves and shares."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from padst_compile.errors import PatternError, SparsityMismatchError, SpecError, UnknownFieldError
from padst_compile.files import replace_text
from padst_compile.structures import Structure, check_registered, parse, structure_from_dict

PermutationKind: TypeAlias = Literal["none", "random", "kaleidoscope", "search", "learned"]
PermutationSide: TypeAlias = Literal["input", "output", "smaller"]
PermutationGroup: TypeAlias = Literal["any", "foldable"]
Distribution: TypeAlias = Literal["uniform", "erk"]
Init: TypeAlias = Literal["magnitude", "activation", "random"]

# Classifier and language-model heads: small, last, and the layers that sparse training leaves dense (SRigL, PA-DST).
DEFAULT_IGNORE = (
    "head", "*.head", "head.*", "*.head.*", "head_dist", "fc", "classifier", "classifier.*", "*.classifier", "score",
    "lm_head", "*.lm_head", "qa_outputs", "cls.*", "*.embeddings.*", "embeddings.*",
)  # fmt: skip

_CHOICES = {
    "permutation": get_args(PermutationKind),
    "permutation_side": get_args(PermutationSide),
    "permutation_group": get_args(PermutationGroup),
    "distribution": get_args(Distribution),
    "init": get_args(Init),
}
_FORMAT_VERSION = 1
_ROUNDING = 0.005  # lets people write 0.67 for 1:3


@dataclasses.dataclass(frozen=True)
class SparsitySpec:
    """How to make the linear layers of a model sparse.

    Args:
        structure: `Block`, `NM`, `Diagonal`, `Unstructured`, a registered one, or the short form (`"block:64"`).
        sparsity: fraction of zeros, in [0, 1). N:M fixes it itself and takes None.
        permutation: `"none"`, `"random"` (one fixed permutation per layer), `"kaleidoscope"` (the same, from a network of
            exchanges, as a control for structured permutations), `"search"` (the order found in which the structure keeps most
            of the weights' score, for a model that is trained already; takes seconds per layer) or `"learned"` (starts as the
            identity).
        permutation_side: permute the layer's `"input"`, its `"output"`, or the `"smaller"` of the two (PA-DST section 3).
        permutation_group: `"any"` permutation, or only those that the model's graph folds for nothing (`"foldable"`, see
            `padst.foldable_permutations`; `sparsify` then needs example inputs, and training learns within them).
        distribution: `"uniform"` gives every layer the same sparsity; `"erk"` (Erdős-Rényi kernel, Evci et al. 2020) gives
            small layers more weights at the same total.
        targets: patterns of the module names to sparsify: globs, or regular expressions after `re:`.
        ignore: patterns of the module names to leave dense; wins over `targets`.
        init: `"magnitude"` keeps the largest dense weights that the structure allows; `"activation"` those with the largest
            product of magnitude and input norm (Wanda, Sun et al. 2024; `sparsify` then needs `calibration`); `"random"` keeps
            random ones. In any case the kept weights have their dense values.
        seed: of every random choice; a layer's choices depend on the seed and its name alone.

    Raises:
        SpecError: a value that makes no sense; the message says which and what is allowed.
    """

    structure: Structure
    sparsity: float | None = None
    permutation: PermutationKind = "none"
    permutation_side: PermutationSide = "input"
    permutation_group: PermutationGroup = "any"
    distribution: Distribution = "uniform"
    targets: tuple[str, ...] = ("*",)
    ignore: tuple[str, ...] = DEFAULT_IGNORE
    init: Init = "magnitude"
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.structure, str):
            object.__setattr__(self, "structure", parse(self.structure))
        if not isinstance(self.structure, Structure):
            raise SpecError(f"structure must be Block, NM, Diagonal, Unstructured or a registered one, got {self.structure!r}")
        check_registered(self.structure)
        object.__setattr__(self, "sparsity", _resolve_sparsity(self.structure, self.sparsity))
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise UnknownFieldError(f"{name} in the specification:", str(getattr(self, name)), choices)
        if self.distribution == "erk" and self.structure.natural_sparsity() is not None:
            raise SpecError("distribution 'erk' varies the sparsity per layer, which N:M fixes; use 'uniform'")
        if self.permutation == "kaleidoscope" and self.permutation_group == "foldable":
            raise SpecError(
                "permutation 'kaleidoscope' draws from a family of its own, not from the group 'foldable'; use 'any'"
            )
        if self.permutation == "search" and (self.init == "random" or self.permutation_group != "any"):
            raise SpecError(
                "permutation='search' orders features so that the largest weights are kept; it goes with "
                "init='magnitude' or 'activation' and permutation_group='any'"
            )
        for name in ("targets", "ignore"):
            object.__setattr__(self, name, _patterns(getattr(self, name), name))
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise SpecError(f"seed must be an integer, got {self.seed!r}")

    @property
    def density(self) -> float:
        """Fraction of active weights."""
        assert self.sparsity is not None  # set in __post_init__
        return 1.0 - self.sparsity

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        data = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            **data,
            "structure": self.structure.to_dict(),
            "targets": list(self.targets),
            "ignore": list(self.ignore),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SparsitySpec:
        """Read the JSON form back.

        Raises:
            SpecError: unknown keys (with the closest known one) or wrong values.
        """
        _require_mapping(data, "a specification")
        known = [field.name for field in dataclasses.fields(cls)]
        for name in data:
            if name not in known:
                raise UnknownFieldError("key in the specification", str(name), known)
        fields = dict(data)
        if "structure" not in fields:
            raise SpecError("the specification needs a structure, for example {'kind': 'block', 'size': [64, 64]}")
        if isinstance(fields["structure"], Mapping):
            fields["structure"] = structure_from_dict(fields["structure"])
        return cls(**fields)


SpecMap: TypeAlias = Mapping[str, "SparsitySpec | None"]
SpecLike: TypeAlias = "SparsitySpec | SpecMap"


def spec_to_dict(spec: SpecLike) -> dict[str, Any]:
    """JSON form of a specification or of a mapping from patterns to specifications."""
    if isinstance(spec, SparsitySpec):
        return {"version": _FORMAT_VERSION, "spec": spec.to_dict()}
    return {"version": _FORMAT_VERSION, "layers": {p: s.to_dict() if s is not None else None for p, s in spec.items()}}


def spec_from_dict(data: Mapping[str, Any]) -> SpecLike:
    """Read `spec_to_dict` back.

    Raises:
        SpecError: another version, unknown keys, or wrong values.
    """
    _require_mapping(data, "a specification file")
    if data.get("version") != _FORMAT_VERSION:
        raise SpecError(
            f"specification version {data.get('version')!r} is not {_FORMAT_VERSION}; write the file with save_spec"
        )
    for name in data:
        if name not in ("version", "spec", "layers"):
            raise UnknownFieldError("key in the specification file", str(name), ("version", "spec", "layers"))
    if ("spec" in data) == ("layers" in data):
        raise SpecError("a specification file has either 'spec' or 'layers'")
    if "spec" in data:
        return SparsitySpec.from_dict(data["spec"])
    _require_mapping(data["layers"], "'layers'")
    return {pattern: SparsitySpec.from_dict(part) if part is not None else None for pattern, part in data["layers"].items()}


def save_spec(spec: SpecLike, path: str | os.PathLike[str]) -> None:
    """Write `spec` as JSON; the file is replaced atomically."""
    replace_text(Path(path), json.dumps(spec_to_dict(spec), indent=2) + "\n")


def load_spec(path: str | os.PathLike[str]) -> SpecLike:
    """Read a specification written by `save_spec`.

    Raises:
        SpecError: the file is no specification; the message names the file.
        FileNotFoundError: there is no such file.
    """
    try:
        return spec_from_dict(json.loads(Path(path).read_text()))
    except (SpecError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise SpecError(f"{os.fspath(path)}: {error}") from error


def matches(pattern: str, name: str) -> bool:
    """Whether a module name fits a glob, or the whole of it a regular expression after `re:`."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return fnmatch.fnmatchcase(name, pattern)


def check_pattern(pattern: object, what: str) -> str:
    """`pattern` if it is a glob or a valid `re:` expression.

    Raises:
        PatternError: it is neither.
    """
    if not isinstance(pattern, str) or not pattern:
        raise PatternError(f"{what} takes non-empty strings, got {pattern!r}")
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise PatternError(f"{what}: {pattern!r} is no regular expression: {error}") from error
    return pattern


def _require_mapping(data: object, what: str) -> None:
    if not isinstance(data, Mapping):
        raise SpecError(f"{what} is a mapping (a JSON object), got {data!r}")


def _patterns(patterns: object, what: str) -> tuple[str, ...]:
    if isinstance(patterns, str):
        return (check_pattern(patterns, what),)
    if not isinstance(patterns, (tuple, list)):
        raise PatternError(f"{what} takes a sequence of patterns, got {patterns!r}")
    return tuple(check_pattern(pattern, what) for pattern in patterns)


def _resolve_sparsity(structure: Structure, sparsity: object) -> float:
    natural = structure.natural_sparsity()
    if sparsity is None:
        if natural is None:
            raise SpecError(f"{structure.to_string()} needs a sparsity, for example sparsity=0.9")
        return natural
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)) or not 0.0 <= sparsity < 1.0:
        raise SpecError(f"sparsity is the fraction of zeros, at least 0 and below 1; got {sparsity!r}")
    if natural is not None and abs(sparsity - natural) > _ROUNDING:
        raise SparsityMismatchError(
            f"{structure.to_string()} has sparsity {natural:.4g}, not {sparsity:g}; leave sparsity out or choose another n:m"
        )
    return float(sparsity) if natural is None else natural
