"""What a Triton product does besides multiplying: permutations, bias, activation, gate and residual."""

from __future__ import annotations

import dataclasses

import torch

from padst_compile.kernels import remembered, triton_support
from padst_compile.kernels.triton_product import check_index, check_like


@dataclasses.dataclass(frozen=True)
class Extras:
    """`act(permute(S permute(x)) + bias) * gate + residual`; gate and residual are laid out like the outputs.

    Args:
        bias: `[out_features]` or None, in the order of the outputs.
        input_permutation: int32 `[in_features]` or None.
        output_permutation: int32 `[out_features]` or None.
        activation: one of `epilogue.ACTIVATIONS`.
        gate: `[tokens, out_features]` or None.
        residual: `[tokens, out_features]` or None.
    """

    bias: torch.Tensor | None = None
    input_permutation: torch.Tensor | None = None
    output_permutation: torch.Tensor | None = None
    activation: str = "none"
    gate: torch.Tensor | None = None
    residual: torch.Tensor | None = None

    @property
    def permuted(self) -> str:
        """As `Problem.permuted` spells it."""
        return triton_support.permuted_name(self.input_permutation, self.output_permutation)

    @property
    def epilogue(self) -> str:
        """As `Problem.epilogue` spells it."""
        return triton_support.epilogue_name(self.bias, self.activation, self.gate, self.residual)

    def inverse_output_permutation(self) -> torch.Tensor | None:
        """Where each row of S goes in the outputs."""
        return None if self.output_permutation is None else remembered.inverse(self.output_permutation)

    def checked(self, x: torch.Tensor, out_features: int) -> Extras:
        """The same for outputs of `x` `[..., in]`, in two dimensions; the bias is contiguous.

        Raises:
            RuntimeError: naming what does not fit.
        """
        from padst_compile.kernels.epilogue import ACTIVATIONS  # needs Triton

        if self.activation not in ACTIVATIONS:
            raise RuntimeError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        check_index("input_permutation", self.input_permutation, x.device, x.shape[-1])
        check_index("output_permutation", self.output_permutation, x.device, out_features)
        check_like("bias", self.bias, (out_features,), x)
        check_like("gate", self.gate, (*x.shape[:-1], out_features), x)
        check_like("residual", self.residual, (*x.shape[:-1], out_features), x)
        return dataclasses.replace(
            self,
            bias=None if self.bias is None else self.bias.contiguous(),
            gate=None if self.gate is None else self.gate.reshape(-1, out_features),
            residual=None if self.residual is None else self.residual.reshape(-1, out_features),
        )

    def laid_out_like(self, y: torch.Tensor) -> Extras:
        """The same with gate and residual in the strides of `y` [tokens, out_features]; copied where they have others."""
        if self.gate is None and self.residual is None:
            return self
        return dataclasses.replace(self, gate=_laid_out_like(y, self.gate), residual=_laid_out_like(y, self.residual))


def _laid_out_like(y: torch.Tensor, other: torch.Tensor | None) -> torch.Tensor | None:
    if other is None or other.stride() == y.stride():
        return other
    return torch.empty_strided(y.shape, y.stride(), dtype=other.dtype, device=other.device).copy_(other)
