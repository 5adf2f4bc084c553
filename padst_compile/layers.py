"""`PermutedSparseLinear`: a linear layer `y = S Π x + b` that stores its active weights alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from padst_compile import kaleidoscope, permutation
from padst_compile.errors import FeatureMismatchError, InvalidPermutationError
from padst_compile.kernels import gradient_tap
from padst_compile.kernels.permute import permute
from padst_compile.kernels.soft_permute import SOFT, soft_permute
from padst_compile.kernels.structured_linear import structured_linear, to_dense
from padst_compile.permutation_search.exchanges import Exchanges
from padst_compile.permutation_search.search import search_order
from padst_compile.planning import LayerPlan
from padst_compile.structures import Shape, Structure, Topology

Origin: TypeAlias = Literal["linear", "conv1d"]


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """What does not change when a layer's weights do.

    Args:
        shape: output and input features.
        structure: the family of masks.
        permuted: which side the permutation acts on, or None.
        origin: the module that the layer replaced: `nn.Linear`, or transformers' `Conv1D` (weight stored [in, out]).
    """

    shape: Shape
    structure: Structure
    permuted: Literal["input", "output"] | None = None
    origin: Origin = "linear"


@dataclasses.dataclass
class SoftPermutation:
    """A permutation while it is being learned, relaxed to a matrix (PA-DST section 3); training state, not in `state_dict`.

    Args:
        matrix: float32 `[features, features]`, doubly stochastic; `x @ matrix.T` stands for the permutation.
        state: uint8 `[1]` on the CPU, `SOFT` or `HARD`; once hard, the layer's `permutation` counts and the matrix does not.
        anchor: float32 `[1]` that takes gradients, see `padst::soft_permute`.
    """

    matrix: torch.Tensor
    state: torch.Tensor
    anchor: torch.Tensor = dataclasses.field(default_factory=lambda: torch.zeros(1, requires_grad=True))

    @property
    def is_soft(self) -> bool:
        """Whether the matrix counts."""
        return int(self.state) == SOFT

    def to(self, device: torch.device) -> None:
        """Move in place; one that has become hard has no memory to copy."""
        if self.matrix.device == device:
            return
        if self.is_soft:
            self.matrix = self.matrix.to(device)
        else:
            self.matrix = torch.empty_like(self.matrix, device=device)
            self.matrix.untyped_storage().resize_(0)
        self.anchor = self.anchor.detach().to(device).requires_grad_()
        listener = gradient_tap.listener_of((self.state,))
        if listener is not None:
            listener.to(device)


class PermutedSparseLinear(nn.Module):
    """`y = S Π x + b` or `y = Π S x + b` (PA-DST section 3) with a structured-sparse S and one permutation Π.

    Attributes:
        values: parameter, the active weights as the structure packs them.
        bias: parameter `[out_features]` or None, in the order of the outputs.
        permutation: buffer int32 `[features of the permuted side]` or None.

        soft: the permutation while `padst.attach` learns it as a matrix, else None.

        gate: tensor `[leading dimension of values, 1]` that multiplies the values while `padst.attach` learns which of them to
            keep (DynaDiag), else None.

        exchanges: which features training may exchange (`permutation_group="foldable"`); None for all of them.

    The structure's index tensors are buffers under its `index_names`. All of them may be changed in place at any time.
    """

    values: nn.Parameter
    bias: nn.Parameter | None
    permutation: torch.Tensor | None

    def __init__(
        self,
        config: LayerConfig,
        values: nn.Parameter,
        topology: Topology,
        permutation: torch.Tensor | None = None,
        bias: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        # Text, as Dynamo makes a symbol of an integer that differs between layers (under FSDP2), which tells passes nothing.
        self._width = str(config.shape.out_features)
        self._structure_name = config.structure.to_string()
        self.soft: SoftPermutation | None = None
        self.gate: torch.Tensor | None = None
        self.exchanges: Exchanges | None = None
        self.values = values
        self.register_parameter("bias", bias)
        self.register_buffer("permutation", permutation)
        for name, index in zip(config.structure.index_names, topology, strict=True):
            self.register_buffer(name, index)

    @property
    def in_features(self) -> int:
        """Size of the last dimension of the input."""
        return self.config.shape.in_features

    @property
    def out_features(self) -> int:
        """Size of the last dimension of the output."""
        return self.config.shape.out_features

    @property
    def topology(self) -> Topology:
        """The structure's index tensors."""
        return tuple(getattr(self, name) for name in self.config.structure.index_names)

    @property
    def active(self) -> int:
        """Weights that can be non-zero; padding and masked values do not count."""
        ones = torch.ones(self.out_features, self.in_features, device=self.values.device)
        return int(self.config.structure.pack(ones, self.topology).count_nonzero())

    @property
    def density(self) -> float:
        """Active weights as a fraction of the dense layer's."""
        return self.active / self.config.shape.numel

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight with the permutation folded in, laid out as in the replaced module. Built anew on each access."""
        dense = self.dense_weight()
        return dense.T if self.config.origin == "conv1d" else dense

    def dense_weight(self) -> torch.Tensor:
        """S with the permutation folded in: `[out_features, in_features]`, exact; a soft one is multiplied in."""
        weight: torch.Tensor = to_dense(
            self._gated_values(), list(self.topology), self.out_features, self.in_features, self._structure_name
        )
        if self.permutation is None:
            return weight
        if self.soft is not None and self.soft.is_soft:
            matrix = self.soft.matrix.to(weight.dtype)
            return weight @ matrix if self.config.permuted == "input" else matrix @ weight
        if self.config.permuted == "input":
            return weight.index_select(1, permutation.inverse(self.permutation))
        return weight.index_select(0, self.permutation)

    def set_permutation(self, indices: torch.Tensor) -> None:
        """Replace the permutation in place; the weights stay where they are.

        Args:
            indices: integer `[features of the permuted side]`; the layer then reads `x[..., indices]` (or, on the output
                side, returns `(S x)[..., indices]`).

        Raises:
            InvalidPermutationError: no permutation of that size, or a layer made without one.
        """
        owner = type(self).__name__
        if self.permutation is None:
            raise InvalidPermutationError(f"{owner} was made with permutation='none'; choose 'random' or 'learned'")
        with torch.no_grad():
            self.permutation.copy_(permutation.check(indices, self.permutation.numel(), owner))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` `[..., in_features]` -> `[..., out_features]`, same dtype.

        Raises:
            FeatureMismatchError: the last dimension is not `in_features`.
        """
        if isinstance(x, torch.Tensor) and x.shape[-1] != self.in_features:  # a symbolic trace has no shapes
            raise FeatureMismatchError(f"expected {self.in_features} input features, got an input of shape {list(x.shape)}")
        if self.config.permuted == "input":
            x = self._permute(x)
        output_side = self.permutation is not None and self.config.permuted == "output"
        y: torch.Tensor = structured_linear(
            x,
            self._gated_values(),
            list(self.topology),
            None if output_side else self.bias,
            None,
            None,
            int(self._width),
            self._structure_name,
        )
        if output_side:
            y = self._permute(y)
            y = y if self.bias is None else y + self.bias.to(y.dtype)  # autocast may have made y narrower
        return y

    def _gated_values(self) -> torch.Tensor:
        return self.values if self.gate is None else self.values * self.gate.to(self.values.dtype)

    def _permute(self, x: torch.Tensor) -> torch.Tensor:
        if self.permutation is None:
            return x
        if self.soft is None:
            permuted: torch.Tensor = permute(x, self.permutation)
        else:
            permuted = soft_permute(x, self.permutation, self.soft.matrix, self.soft.state, self.soft.anchor)
        return permuted

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PermutedSparseLinear:
        before, listener = self.topology[0], gradient_tap.listener_of(self.topology)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        if listener is not None:
            gradient_tap.forget(before)
            gradient_tap.listen(self.topology[0], listener)
            listener.to(self.topology[0].device)
        if self.soft is not None:
            self.soft.to(self.values.device)  # and stays float32
        if self.gate is not None:
            self.gate = fn(self.gate)
        return self

    def extra_repr(self) -> str:
        """Shape, structure, density and permutation for `print(model)`."""
        side = f", permutation={self.config.permuted}" if self.config.permuted else ""
        density = "unknown" if self.values.is_meta else f"{self.density:.4g}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, structure={self._structure_name}, "
            f"density={density}{side}, bias={self.bias is not None}"
        )

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        problem = self._why_not_loadable(state_dict, prefix, strict)
        if problem is not None:
            error_msgs.append(f"layer {prefix[:-1]!r}: {problem}; sparsify the model with the checkpoint's specification first")
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def _why_not_loadable(self, state_dict: dict[str, Any], prefix: str, strict: bool) -> str | None:
        """Why a checkpoint does not belong to this layer: another spec, or index tensors that are not valid."""
        if prefix + "weight" in state_dict and prefix + "values" not in state_dict:
            return "the checkpoint holds a dense weight, this layer a sparse one"
        own = dict(self.named_parameters(recurse=False)) | dict(self.named_buffers(recurse=False))
        stored = {key[len(prefix) :] for key in state_dict if key.startswith(prefix)}
        if strict and "values" in stored and stored != own.keys():
            return f"the checkpoint holds {', '.join(sorted(stored))}; this layer {', '.join(sorted(own))}"
        for name, tensor in own.items():
            loaded = state_dict.get(prefix + name)
            if isinstance(loaded, torch.Tensor) and loaded.shape != tensor.shape:
                return f"{name} is {list(loaded.shape)} in the checkpoint and {list(tensor.shape)} here ({self.extra_repr()})"
        topology = tuple(state_dict.get(prefix + name) for name in self.config.structure.index_names)
        if all(isinstance(index, torch.Tensor) for index in topology):
            wrong = self.config.structure.check_topology(topology, self.config.shape)  # type: ignore[arg-type]  # checked above
            if wrong is not None:
                return wrong
        indices = state_dict.get(prefix + "permutation")
        if isinstance(indices, torch.Tensor) and self.permutation is not None:
            try:
                permutation.check(indices, self.permutation.numel(), "permutation")
            except InvalidPermutationError as error:
                return str(error)
        return None


def build_layer(
    plan: LayerPlan,
    weight: torch.Tensor,
    bias: nn.Parameter | None,
    *,
    origin: Origin = "linear",
    requires_grad: bool = True,
    start: torch.Tensor | None = None,
    input_norms: torch.Tensor | None = None,
) -> PermutedSparseLinear:
    """The sparse layer of a plan.

    Args:
        plan: of the layer.
        weight: dense, `[out_features, in_features]`; its values at the active positions are kept.
        bias: `[out_features]` or None.
        origin: what the layer replaces.
        requires_grad: of the values.
        start: its permutation, instead of the one that the plan's specification draws or searches.
        input_norms: of the input features, `[in_features]`, for `init="activation"`.
    """
    scores = _scores(plan, weight.detach(), input_norms)
    permuted, indices = _side(plan), None
    if permuted is not None:
        chosen = _initial_permutation(plan, scores) if start is None else start
        indices = permutation.check(chosen, plan.permuted_features, plan.name).to(weight.device)
    dense, scores = (_in_order_of_s(tensor, indices, permuted) for tensor in (weight.detach(), scores))
    if plan.spec.init == "random":
        scores = torch.rand(dense.shape, generator=plan.generator("topology"), dtype=torch.float32, device="cpu").to(
            dense.device
        )
    topology = plan.structure.choose(scores, plan.sparsity)
    values = nn.Parameter(plan.structure.pack(dense, topology), requires_grad=requires_grad)
    return PermutedSparseLinear(LayerConfig(plan.shape, plan.structure, permuted, origin), values, topology, indices, bias)


def _in_order_of_s(
    dense: torch.Tensor, indices: torch.Tensor | None, permuted: Literal["input", "output"] | None
) -> torch.Tensor:
    """Rows or columns as S has them: y = S Π x is W x when S[:, j] holds the column of W that meets (Π x)_j = x[p[j]]."""
    if indices is None:
        return dense
    return dense.index_select(1, indices) if permuted == "input" else dense.index_select(0, permutation.inverse(indices))


def _side(plan: LayerPlan) -> Literal["input", "output"] | None:
    if plan.spec.permutation == "none":
        return None
    return "input" if plan.permutes_input else "output"


def _initial_permutation(plan: LayerPlan, scores: torch.Tensor) -> torch.Tensor:
    size = plan.permuted_features
    match plan.spec.permutation:
        case "random":
            return permutation.random(size, plan.generator("permutation"))
        case "kaleidoscope":
            return kaleidoscope.random(size, plan.generator("permutation"))
        case "search":
            side: Literal["input", "output"] = "input" if plan.permutes_input else "output"
            found = search_order(scores, plan.structure, plan.sparsity, side, generator=plan.generator("search"))
            order = found.order.to(permutation.INDEX_DTYPE)
            return order if side == "input" else permutation.inverse(order)
    return permutation.identity(size, device="cpu")


def _scores(plan: LayerPlan, dense: torch.Tensor, input_norms: torch.Tensor | None) -> torch.Tensor:
    """What each weight is worth, in the order of the dense layer: its magnitude, times that of what it multiplies if known."""
    magnitudes = dense.abs().float() if dense.dtype in (torch.float16, torch.bfloat16) else dense.abs()
    return magnitudes if input_norms is None else magnitudes * input_norms.to(magnitudes)
