"""How a model's sparsity is shared out among its layers."""

from __future__ import annotations

from collections.abc import Sequence

from padst_compile.structures import Shape


def uniform(shapes: Sequence[Shape], sparsity: float) -> list[float]:
    """The same sparsity for every layer."""
    return [sparsity] * len(shapes)


def erdos_renyi(shapes: Sequence[Shape], sparsity: float) -> list[float]:
    """Erdős-Rényi-kernel sparsities (Evci et al. 2020, equation 1, for linear layers).

    A layer's density is proportional to `(in + out) / (in * out)`, capped at 1, with the factor that makes the active
    weights of all layers together `1 - sparsity` of the dense ones.
    """
    raw = [(s.in_features + s.out_features) / s.numel for s in shapes]
    budget = (1.0 - sparsity) * sum(s.numel for s in shapes)
    dense: set[int] = set()
    while True:
        free = [i for i in range(len(shapes)) if i not in dense]
        weight = sum(raw[i] * shapes[i].numel for i in free)
        factor = (budget - sum(shapes[i].numel for i in dense)) / weight if weight else 0.0
        overfull = {i for i in free if raw[i] * factor > 1.0}
        if not overfull:
            return [0.0 if i in dense else 1.0 - raw[i] * factor for i in range(len(shapes))]
        dense |= overfull
