"""A random sparse layer with all that a kernel may do around its product, and what the product should be."""

from __future__ import annotations

import dataclasses

import torch

from padst_compile.structures import Shape, Structure, Topology


@dataclasses.dataclass(frozen=True)
class SparseProduct:
    """What the ops of one layer take, on some device.

    Attributes:
        structure: of the weight.
        shape: of the weight.
        values: the active weights.
        topology: index tensors.
        bias: `[out_features]` or None, like what follows.
        input_permutation: int32 `[in_features]`.
        output_permutation: int32 `[out_features]`.
        activation: a name that the kernels know.
        residual: `[..., out_features]`.
        gate: `[..., out_features]`.
    """

    structure: Structure
    shape: Shape
    values: torch.Tensor
    topology: Topology
    bias: torch.Tensor | None = None
    input_permutation: torch.Tensor | None = None
    output_permutation: torch.Tensor | None = None
    activation: str = "none"
    residual: torch.Tensor | None = None
    gate: torch.Tensor | None = None

    def exact_sums(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The product with permutations and bias in float64, and the sums of its magnitudes."""
        weight = self.structure.unpack(self.values.double(), self.topology, self.shape)
        wide = x.double() if self.input_permutation is None else x.double()[..., self.input_permutation.long()]
        exact, magnitude = wide @ weight.T, wide.abs() @ weight.abs().T
        if self.output_permutation is not None:
            order = self.output_permutation.long()
            exact, magnitude = exact[..., order], magnitude[..., order]
        if self.bias is not None:
            exact, magnitude = exact + self.bias.double(), magnitude + self.bias.double().abs()
        return exact, magnitude
