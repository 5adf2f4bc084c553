"""Descriptions of small models: frozen values that print as the expression that makes them.

A model is a chain of steps over a feature axis. `padst_compile.testing.models.build` turns a description into a module; all
its numbers come from the one `seed`. A failing example can thus be pasted:

    from padst_compile.testing.grammar import *
    from padst_compile.testing.models import build
    model = build(Model(8, (Residual((Mlp(Layer(16, 'block:4'), 'gelu', Layer(8)),)),)))
"""

from __future__ import annotations

import dataclasses
from typing import Literal, TypeAlias

Activation: TypeAlias = Literal["gelu", "gelu tanh", "gelu expression", "relu", "silu", "sigmoid", "tanh"]
Order: TypeAlias = Literal["none", "random", "learned", "shared", "whole:2", "whole:4", "within:2", "within:4"]


class _Printed:
    """Prints its fields as they would be written, without those that have their default value."""

    def __repr__(self) -> str:
        parts = []
        for field in dataclasses.fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            value = getattr(self, field.name)
            if field.default is dataclasses.MISSING:
                parts.append(repr(value))
            elif value != field.default:
                parts.append(f"{field.name}={value!r}")
        return f"{type(self).__name__}({', '.join(parts)})"


@dataclasses.dataclass(frozen=True, repr=False)
class Layer(_Printed):
    """A linear layer to `out` features.

    Args:
        out: output features.
        structure: short form of its structure; None leaves it dense.
        order: its permutation. "random" and "learned" are what `sparsify` makes. The others are set afterwards and depend on
            the size alone, so that layers which name the same one can cancel: "shared" is any permutation, "whole:g" moves
            groups of g neighbours (attention heads) as they are, "within:g" moves nothing out of its group.
        inverse: take the inverse of a permutation that is set afterwards.
        side: what the permutation acts on.
        bias: whether there is one.
        conv1d: transformers' `Conv1D` instead of `nn.Linear`.
    """

    out: int
    structure: str | None = None
    order: Order = "none"
    inverse: bool = False
    side: Literal["input", "output"] = "input"
    bias: bool = True
    conv1d: bool = False


@dataclasses.dataclass(frozen=True, repr=False)
class Act(_Printed):
    """A pointwise function."""

    kind: Activation


@dataclasses.dataclass(frozen=True, repr=False)
class Norm(_Printed):
    """A norm over the features: torch's two, RMSNorm as Llama writes it out, and LayerNorm without parameters."""

    kind: Literal["layer", "rms", "rms expression", "plain layer"]


@dataclasses.dataclass(frozen=True, repr=False)
class Channels(_Printed):
    """A parameter per channel: `x * scale`, `x + shift`, or both."""

    kind: Literal["scale", "shift", "affine"]


@dataclasses.dataclass(frozen=True, repr=False)
class Dropout(_Printed):
    """Dropout, which does nothing in evaluation mode."""


@dataclasses.dataclass(frozen=True, repr=False)
class Opaque(_Printed):
    """An op of the user's own that depends on the positions of features, and that no rule can know."""


@dataclasses.dataclass(frozen=True, repr=False)
class Mlp(_Printed):
    """Out, a pointwise function, and back."""

    up: Layer
    activation: Activation
    down: Layer


@dataclasses.dataclass(frozen=True, repr=False)
class Gated(_Printed):
    """`down(f(gate(x)) * up(x))`; without `up`, one layer computes both halves, which are taken apart as `split` says."""

    gate: Layer
    up: Layer | None
    activation: Activation
    down: Layer
    split: Literal["chunk", "split", "slice"] = "chunk"


@dataclasses.dataclass(frozen=True, repr=False)
class Attention(_Printed):
    """Attention over the tokens.

    Args:
        heads: of the queries.
        projections: (query, key, value), or one layer that computes all three.
        out: behind the heads.
        key_heads: of keys and values; None means `heads`. Fewer are repeated as `repeat` says.
        split: how the result of one layer is taken apart: as timm does, or as GPT-2 does, in two spellings.
        repeat: how keys and values are repeated for the queries that share them.
        position: rotary embedding of queries and keys, or a bias for every pair of tokens.
        causal: whether a token sees later ones.
        written_out: softmax of a product instead of `scaled_dot_product_attention`.
    """

    heads: int
    projections: tuple[Layer, ...]
    out: Layer
    key_heads: int | None = None
    split: Literal["unbind", "chunk", "split"] = "unbind"
    repeat: Literal["interleave", "expand"] = "interleave"
    position: Literal["rotary", "bias"] | None = None
    causal: bool = False
    written_out: bool = False


@dataclasses.dataclass(frozen=True, repr=False)
class Mixer(_Printed):
    """An MLP over the tokens instead of the features, between two transposes; `Conv1D` takes no such input."""

    mlp: Mlp


@dataclasses.dataclass(frozen=True, repr=False)
class Residual(_Printed):
    """`x + body(x)` with a norm before the body or behind the sum; the sum may be written in place into the body's result."""

    body: tuple[Step, ...]
    norm: Norm | None = None
    post: bool = False
    layer_scale: bool = False
    in_place: bool = False


@dataclasses.dataclass(frozen=True, repr=False)
class Branches(_Printed):
    """Two chains over the same tensor, their results side by side, then a linear layer."""

    left: tuple[Step, ...]
    right: tuple[Step, ...]
    out: Layer


@dataclasses.dataclass(frozen=True, repr=False)
class Halves(_Printed):
    """The two halves of the features, each through a chain of its own."""

    left: tuple[Step, ...]
    right: tuple[Step, ...]


@dataclasses.dataclass(frozen=True, repr=False)
class Siblings(_Printed):
    """The sum of several layers of the same tensor: readers that share an input, producers that share a reader."""

    layers: tuple[Layer, ...]


@dataclasses.dataclass(frozen=True, repr=False)
class Twice(_Printed):
    """The same layer before and behind a pointwise function; with `tied`, two layers that share a weight alone."""

    layer: Layer
    activation: Activation
    tied: bool = False


@dataclasses.dataclass(frozen=True, repr=False)
class InPlace(_Printed):
    """A layer whose result is written to: as a whole, through a view, or at an index."""

    layer: Layer
    write: Literal["add_", "mul_", "relu_", "view", "index"]


@dataclasses.dataclass(frozen=True, repr=False)
class ReadThenWritten(_Printed):
    """`y = first(x)`, read by `second` before `y` is written to: whoever moves the read past the write is wrong."""

    first: Layer
    second: Layer


@dataclasses.dataclass(frozen=True, repr=False)
class Unused(_Printed):
    """A layer whose result nothing reads."""

    layer: Layer


Step: TypeAlias = (
    "Layer | Act | Norm | Channels | Dropout | Opaque | Mlp | Gated | Attention | Mixer | Residual | Branches | Halves | "
    "Siblings | Twice | InPlace | ReadThenWritten | Unused"
)


@dataclasses.dataclass(frozen=True, repr=False)
class Model(_Printed):
    """A whole model.

    Args:
        width: features of the residual stream.
        steps: one after the other; each takes the features of the one before.
        embedding: the input is token numbers instead of features.
        positions: add a learned table of positions.
        class_token: put a learned token first.
        pool: keep the first token, or the mean of all.
        head: a last layer.
        tied_head: the embedding's weight once more, as a last layer.
        output: how the result is returned, alone or with what the steps computed before the head.
        tokens: in the example inputs.
        seed: of every number in the model and its inputs.
    """

    width: int
    steps: tuple[Step, ...]
    embedding: bool = False
    positions: bool = False
    class_token: bool = False
    pool: Literal["first", "mean"] | None = None
    head: Layer | None = None
    tied_head: bool = False
    output: Literal["tensor", "tuple", "dict"] = "tensor"
    tokens: int = 4
    seed: int = 0
