"""What a file must say about a sparse layer, besides its numbers, so that the layer can be made again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast, get_args

import torch
from torch import nn

from padst_compile import permutation
from padst_compile.errors import InvalidPermutationError, PretrainedError, SpecError
from padst_compile.layers import LayerConfig, Origin, PermutedSparseLinear
from padst_compile.structures import Shape, structure_from_dict

_VALUES, _PERMUTATION = "values", "permutation"


@dataclasses.dataclass(frozen=True)
class LayerLayout:
    """A sparse layer without its numbers.

    Args:
        config: shape, structure, permuted side, and what the layer replaced.
        values: size of the packed weights.
        topology: size and dtype of each index tensor, in the structure's order.
    """

    config: LayerConfig
    values: tuple[int, ...]
    topology: tuple[tuple[tuple[int, ...], torch.dtype], ...]

    @classmethod
    def of(cls, layer: PermutedSparseLinear) -> LayerLayout:
        """That of a layer."""
        return cls(
            layer.config, tuple(layer.values.shape), tuple((tuple(index.shape), index.dtype) for index in layer.topology)
        )

    def empty(self, dtype: torch.dtype, device: torch.device | str) -> dict[str, torch.Tensor]:
        """Tensors of the right sizes under their names in a layer, without content; `dtype` is that of the values."""
        tensors = {_VALUES: torch.empty(self.values, dtype=dtype, device=device)}
        for name, (size, kind) in zip(self.config.structure.index_names, self.topology, strict=True):
            tensors[name] = torch.empty(size, dtype=kind, device=device)
        if self.config.permuted is not None:
            tensors[_PERMUTATION] = torch.empty(self._permuted_features, dtype=permutation.INDEX_DTYPE, device=device)
        return tensors

    def layer(self, tensors: Mapping[str, torch.Tensor], bias: nn.Parameter | None) -> PermutedSparseLinear:
        """The layer with these tensors, named as in `empty`, its values a parameter; not copied."""
        topology = tuple(tensors[name] for name in self.config.structure.index_names)
        values = cast("nn.Parameter", tensors[_VALUES])
        return PermutedSparseLinear(self.config, values, topology, tensors.get(_PERMUTATION), bias)

    def problem(self, tensors: Mapping[str, torch.Tensor]) -> str | None:
        """Why these tensors, named as in `empty`, make no layer of this layout, or None. Reads every index."""
        expected = self.empty(torch.float32, "meta")
        for name, like in expected.items():
            if name not in tensors:
                return f"{name} is missing"
            found = tensors[name]
            if found.shape != like.shape:
                return f"{name} is {list(found.shape)}, not {list(like.shape)}"
            if name != _VALUES and found.dtype != like.dtype:
                return f"{name} is {found.dtype}, not {like.dtype}"
        if not tensors[_VALUES].is_floating_point():
            return f"values are {tensors[_VALUES].dtype}, which is no floating type"
        return self._bad_indices(tensors)

    def _bad_indices(self, tensors: Mapping[str, torch.Tensor]) -> str | None:
        structure, shape = self.config.structure, self.config.shape
        topology = tuple(tensors[name] for name in structure.index_names)
        wrong = structure.check_topology(topology, shape)
        if wrong is not None:
            return wrong
        zeros = torch.zeros((), device=topology[0].device).expand(shape.out_features, shape.in_features)
        packed = structure.pack(zeros, topology).shape
        if packed != self.values:
            return f"values are {list(self.values)}, and the index tensors ask for {list(packed)}"
        if self.config.permuted is not None:
            try:
                permutation.check(tensors[_PERMUTATION], self._permuted_features, "the layer")
            except InvalidPermutationError as error:
                return str(error)
        return None

    @property
    def _permuted_features(self) -> int:
        shape = self.config.shape
        return shape.in_features if self.config.permuted == "input" else shape.out_features

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        config = self.config
        names = config.structure.index_names
        return {
            "structure": config.structure.to_dict(),
            "shape": [config.shape.out_features, config.shape.in_features],
            "permuted": config.permuted,
            "origin": config.origin,
            "values": list(self.values),
            "topology": {
                name: {"size": list(size), "dtype": str(dtype).removeprefix("torch.")}
                for name, (size, dtype) in zip(names, self.topology, strict=True)
            },
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LayerLayout:
        """Read the JSON form back.

        Raises:
            PretrainedError: it is none.
        """
        try:
            structure = structure_from_dict(data["structure"])
            topology, names = data["topology"], structure.index_names
            config = LayerConfig(
                Shape(*_size(data["shape"])),
                structure,
                _choice(data["permuted"], ("input", "output", None)),
                cast("Origin", _choice(data["origin"], get_args(Origin))),
            )
            if sorted(topology) != sorted(names):
                raise PretrainedError(f"{structure.to_string()} has the index tensors {', '.join(names)}")
            indices = tuple((_size(topology[name]["size"]), _dtype(topology[name]["dtype"])) for name in names)
            return cls(config, _size(data["values"]), indices)
        except (KeyError, TypeError, AttributeError, SpecError) as error:
            raise PretrainedError(f"this describes no sparse layer: {data!r:.200} ({error!r})") from error


def layouts_to_dict(model: nn.Module) -> dict[str, Any]:
    """JSON form of the layouts of all sparse layers, by name."""
    return {
        name.replace("_orig_mod.", ""): LayerLayout.of(module).to_dict()
        for name, module in model.named_modules()
        if isinstance(module, PermutedSparseLinear)
    }


def layouts_from_dict(data: Mapping[str, Any]) -> dict[str, LayerLayout]:
    """Read `layouts_to_dict` back.

    Raises:
        PretrainedError: something else.
    """
    if not isinstance(data, Mapping):
        raise PretrainedError(f"layers must be a JSON object, not {data!r:.100}")
    return {name: LayerLayout.from_dict(layer) for name, layer in data.items()}


def _size(numbers: object) -> tuple[int, ...]:
    if not isinstance(numbers, (list, tuple)) or not all(type(number) is int and 0 <= number < 2**40 for number in numbers):
        raise TypeError(f"{numbers!r} is no size")
    return tuple(numbers)


def _choice(value: object, allowed: tuple[object, ...]) -> Any:
    if value not in allowed:
        raise TypeError(f"{value!r} is none of {allowed}")
    return value


_INDEX_DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _dtype(name: object) -> torch.dtype:
    for dtype in _INDEX_DTYPES:
        if str(dtype) == f"torch.{name}":
            return dtype
    raise TypeError(f"{name!r} is no dtype of index tensors")
