"""Sparse models through transformers' `from_pretrained` and `save_pretrained`; `integrations.transformers` registers it.

    from padst_compile.integrations.transformers import PadstConfig

    model = AutoModelForCausalLM.from_pretrained("dense", quantization_config=PadstConfig(spec))  # sparsified after loading
    model.save_pretrained("sparse")
    model = AutoModelForCausalLM.from_pretrained("sparse")  # the same sparse model

What `save_pretrained` writes about sparse layers comes from `padst_compile.transformers_config`, also for models that
`padst.sparsify` made sparse.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from padst_compile.conversion import (
    SparsifyReport,
    densify,
    install,
    linears,
    origin_of,
    shape_of,
    sparse_layers,
    sparsify,
)
from padst_compile.errors import PretrainedError
from padst_compile.layers import PermutedSparseLinear
from padst_compile.layout import LayerLayout, layouts_from_dict, layouts_to_dict
from padst_compile.spec import SpecLike, spec_from_dict, spec_to_dict
from padst_compile.transformers_config import QUANT_METHOD, VERSION


@register_quantization_config(QUANT_METHOD)
class PadstConfig(QuantizationConfigMixin):
    """How transformers is to load a model: dense weights to be sparsified by a specification, or sparse ones.

    Args:
        spec: for dense weights; or its JSON form.
        layers: of sparse weights, as `save_pretrained` wrote them.
        version: of `layers`.
        given: `quant_method`, which `config.json` holds beside these.

    Raises:
        PretrainedError: `layers` was written by another version, or neither it nor `spec` is there.
        SpecError: `spec` is none.
    """

    def __init__(
        self,
        spec: SpecLike | Mapping[str, Any] | None = None,
        layers: Mapping[str, Any] | None = None,
        version: int = VERSION,
        **given: Any,
    ) -> None:
        if version != VERSION:
            raise PretrainedError(f"config.json has sparse layers of version {version!r}; this padst_compile reads {VERSION}")
        if spec is None and layers is None:
            raise PretrainedError("PadstConfig needs a specification, as in PadstConfig(padst.SparsitySpec(...))")
        is_json = isinstance(spec, Mapping) and "version" in spec
        self.quant_method = cast("Any", QUANT_METHOD)
        self.spec = spec_from_dict(cast("Mapping[str, Any]", spec)) if is_json else cast("SpecLike | None", spec)
        self.layers = layers

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        found: dict[str, Any] = {"quant_method": self.quant_method, "version": VERSION}
        if self.spec is not None:
            found["spec"] = spec_to_dict(self.spec)
        if self.layers is not None:
            found["layers"] = dict(self.layers)
        return found


@register_quantizer(QUANT_METHOD)
class PadstQuantizer(HfQuantizer):
    """Puts sparse layers into a model before transformers loads sparse weights, or sparsifies it after dense ones."""

    quantization_config: PadstConfig

    def _process_model_before_weight_loading(self, model: nn.Module, **given: Any) -> None:
        if self.quantization_config.layers is not None:
            layouts = _named_as_in(model, layouts_from_dict(self.quantization_config.layers))
            install(model, _empty_layers(model, layouts), SparsifyReport((), ()))

    def _process_model_after_weight_loading(self, model: nn.Module, **given: Any) -> None:
        if self.quantization_config.layers is None:
            sparsify(model, cast("SpecLike", self.quantization_config.spec))
        else:
            _check(model)
        self.quantization_config = PadstConfig(self.quantization_config.spec, layouts_to_dict(model))
        cast("Any", model).config.quantization_config = self.quantization_config
        model.is_quantized = False  # type: ignore[assignment]  # its layers are floating, and may be cast and trained

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        return densify(model)

    def is_serializable(self) -> bool:
        """It is, as tensors and `config.json`."""
        return True

    @property
    def is_trainable(self) -> bool:
        """The layers are parameters like any others."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """The same."""
        return True

    @property
    def is_compileable(self) -> bool:
        """By the backend `padst`."""
        return True


def _named_as_in(model: nn.Module, layouts: Mapping[str, LayerLayout]) -> dict[str, LayerLayout]:
    """Layouts under this model's names: it may be the base of the model that was saved, or have it as its base.

    Raises:
        PretrainedError: a layer that is in neither.
    """
    modules, prefix = dict(linears(model)), f"{getattr(model, 'base_model_prefix', '')}."
    found = {}
    for name, layout in layouts.items():
        own = next((other for other in (name, name.removeprefix(prefix), prefix + name) if other in modules), None)
        if own is not None:
            found[own] = layout
        elif name.startswith(prefix) or not _is_base(model):
            raise PretrainedError(f"the model has no linear layer {name!r}, which config.json says is sparse")
    return found


def _is_base(model: nn.Module) -> bool:
    """Whether this is a base model, without the head that the saved one may have."""
    return getattr(model, "base_model", None) is model


def _empty_layers(model: nn.Module, layouts: Mapping[str, LayerLayout]) -> dict[str, PermutedSparseLinear]:
    modules = dict(linears(model))
    built = {}
    for name, layout in layouts.items():
        module = modules[name]
        here, there = (origin_of(module), shape_of(module)), (layout.config.origin, layout.config.shape)
        if here != there:
            raise PretrainedError(
                f"layer {name!r} is {there[0]}, {there[1]}, in config.json and {here[0]}, {here[1]}, in the model"
            )
        tensors = layout.empty(module.weight.dtype, module.weight.device)
        tensors["values"] = nn.Parameter(tensors["values"])
        built[name] = layout.layer(tensors, module.bias).train(module.training)
    return built


def _check(model: nn.Module) -> None:
    """Raise PretrainedError where transformers found no, or no valid, tensors of a sparse layer."""
    for name, layer in sparse_layers(model):
        tensors = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
        missing = [key for key, tensor in tensors.items() if not getattr(tensor, "_is_hf_initialized", False)]
        problem = f"{missing[0]} is missing" if missing else LayerLayout.of(layer).problem(tensors)
        if problem is not None:
            raise PretrainedError(f"layer {name!r} in the checkpoint is damaged: {problem}")
