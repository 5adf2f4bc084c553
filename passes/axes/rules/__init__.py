"""What each family of operators does to the axes of its tensors; importing this package registers all rules."""

from padst_compile.passes.axes.rules import (
    attention,
    contractions,
    convolutions,
    indexing,
    norms,
    pieces,
    pointwise,
    reductions,
    reshapes,
    structured,
)

__all__ = [
    "attention",
    "contractions",
    "convolutions",
    "indexing",
    "norms",
    "pieces",
    "pointwise",
    "reductions",
    "reshapes",
    "structured",
]
