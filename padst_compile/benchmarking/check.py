"""Whether a compiled sparse model computes what it should: against itself in eager mode, and against float64 dense."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import nn

from padst_compile.benchmarking.models import ModelCase, first_tensor
from padst_compile.conversion import densify
from padst_compile.tolerance import allowed_error, relative_error


@dataclasses.dataclass(frozen=True)
class Check:
    """Errors relative to the largest output, and whether they are within the bound.

    Args:
        eager_error: compiled against the eager sparse model.
        reference_error: compiled against the float64 dense reconstruction.
        bound: what either may be: a few times the rounding error of the dense model with the same function, dtype and
            inputs, and never less than the resolution of the dtype.
    """

    eager_error: float
    reference_error: float
    bound: float

    @property
    def passed(self) -> bool:
        """Whether both errors are within the bound; False for NaN."""
        return self.eager_error <= 2 * self.bound and self.reference_error <= self.bound

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {**dataclasses.asdict(self), "passed": self.passed}


def check_compiled(case: ModelCase, sparse: nn.Module, compiled_output: torch.Tensor, dtype: torch.dtype) -> Check:
    """Compare a compiled model's output with the eager sparse model and with a float64 dense reconstruction.

    Args:
        case: the inputs.
        sparse: the sparse model; it is left as it is.
        compiled_output: what the compiled model returned for the inputs.
        dtype: of the weights and floating inputs.
    """
    with torch.no_grad():
        eager = first_tensor(sparse(*case.inputs_as(dtype), **case.kwargs)).double()
        dense = densify(copy.deepcopy(sparse))
        rounded = first_tensor(dense(*case.inputs_as(dtype), **case.kwargs)).double()
        # The reference starts from the same rounded inputs.
        exact_inputs = tuple(
            a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in case.inputs_as(dtype)
        )
        exact = first_tensor(dense.double()(*exact_inputs, **case.kwargs))
    return Check(
        eager_error=relative_error([compiled_output], [eager]),
        reference_error=relative_error([compiled_output], [exact]),
        bound=allowed_error(relative_error([rounded], [exact]), dtype),
    )
