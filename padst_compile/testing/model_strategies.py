"""Hypothesis strategies for descriptions of small models: the structure is drawn, the numbers follow from one drawn seed.

Every alternative starts with its simplest form, so that a failing model shrinks to few steps, dense layers where they do not
matter, and no permutation where none is needed.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Literal

from hypothesis import strategies as st

from padst_compile.structures import Shape, parse
from padst_compile.testing.blocks import ACTIVATIONS
from padst_compile.testing.grammar import (
    Act,
    Activation,
    Attention,
    Branches,
    Channels,
    Dropout,
    Gated,
    Halves,
    InPlace,
    Layer,
    Mixer,
    Mlp,
    Model,
    Norm,
    Opaque,
    Order,
    ReadThenWritten,
    Residual,
    Siblings,
    Step,
    Twice,
    Unused,
)

STRUCTURES = (
    "block:2", "block:4", "block:8", "block:2x4", "block:3", "nm:1:2", "nm:2:4", "nm:1:4:2", "nm:2:4:4", "diagonal",
    "diagonal:2", "diagonal:4", "unstructured",
)  # fmt: skip
ORDERS: tuple[Order, ...] = ("none", "random", "shared", "learned", "whole:2", "whole:4", "within:2", "within:4")
_SET_AFTERWARDS = frozenset(ORDERS) - {"none", "random", "learned"}
# What the layers of one model choose from. Drawn from all kinds, two permutations would hardly ever be equal or inverse.
_PALETTES: tuple[tuple[Order, ...], ...] = (
    ("none",), ("random",), ("shared",), ("none", "shared"), ("within:2",), ("whole:2", "within:4"), ("shared", "whole:4"),
    ("none", "random", "learned"), ORDERS,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Scope:
    """Where a step stands.

    Attributes:
        width: features of its input and its result.
        tokens: length of the sequence.
        orders: the permutations of its layers; few, so that equal and inverse ones meet.
        conv1d: some layers are transformers' `Conv1D`, which takes no transposed input, so there is no token mixing.
        any_length: leave out what works for one length alone.
        depth: how deep chains may still nest.
    """

    width: int
    tokens: int
    orders: tuple[Order, ...]
    conv1d: bool
    any_length: bool
    depth: int

    def inner(self, width: int | None = None) -> Scope:
        """The scope of a nested chain."""
        return dataclasses.replace(self, width=width or self.width, depth=self.depth - 1)


def models(*, any_length: bool = False, largest: int = 4) -> st.SearchStrategy[Model]:
    """Whole models in which at least one layer is sparse.

    Args:
        any_length: leave out what works for one length of the sequence alone: token mixing and biases of pairs of tokens.
        largest: the most steps in the outer chain.
    """
    return _any_models(any_length, largest).filter(lambda model: any(layer.structure for layer in layers_of(model)))


@st.composite
def _any_models(draw: st.DrawFn, any_length: bool, largest: int) -> Model:
    width = draw(st.sampled_from((8, 16)))
    class_token, embedding = draw(st.booleans()), draw(st.booleans())
    tied_head = embedding and draw(st.booleans())
    tokens = 4
    scope = Scope(width, tokens + class_token, draw(st.sampled_from(_PALETTES)), draw(st.booleans()), any_length, depth=2)
    return Model(
        width,
        draw(chains(scope, least=1, most=largest)),
        embedding=embedding,
        positions=draw(st.booleans()),
        class_token=class_token,
        pool=draw(st.sampled_from((None, "first", "mean"))),
        head=None if tied_head else draw(st.none() | layers(scope, width, 6)),
        tied_head=tied_head,
        output=draw(st.sampled_from(("tensor", "tuple", "dict"))),
        tokens=tokens,
        seed=draw(st.integers(0, 2**16)),
    )


@functools.cache  # a recursive strategy is costly to make and the same for equal scopes
def steps(scope: Scope) -> st.SearchStrategy[Step]:
    """Steps that return as many features as they take."""
    width = scope.width
    layer = layers(scope, width, width)
    choices: list[st.SearchStrategy[Step]] = [
        layer,
        st.builds(Act, activations()),
        norms(),
        st.builds(Channels, st.sampled_from(("scale", "shift", "affine"))),
        st.just(Dropout()),
        st.just(Opaque()),
        mlps(scope, width),
        gated(scope),
        attentions(scope),
        st.builds(Siblings, st.lists(layer, min_size=2, max_size=3).map(tuple)),
        st.builds(Twice, layer, activations(), st.booleans()),
        st.builds(InPlace, layer, st.sampled_from(("add_", "mul_", "relu_", "view", "index"))),
        st.builds(ReadThenWritten, layer, layer),
        st.builds(Unused, layer),
    ]
    if not scope.any_length and not scope.conv1d:
        choices.append(st.builds(Mixer, mlps(scope, scope.tokens)))
    if scope.depth:
        choices += [residuals(scope), branches(scope)]
        choices += [st.builds(Halves, chains(scope.inner(width // 2)), chains(scope.inner(width // 2)))] if width > 4 else []
    return st.one_of(choices)


def chains(scope: Scope, least: int = 0, most: int = 2) -> st.SearchStrategy[tuple[Step, ...]]:
    """Steps one after the other; half of the time two layers whose permutations meet."""
    return st.lists(_pieces(scope), min_size=least, max_size=most).map(
        lambda parts: tuple(itertools.chain.from_iterable(parts))
    )


@st.composite
def _pieces(draw: st.DrawFn, scope: Scope) -> tuple[Step, ...]:
    # `one_of` would give a meeting the weight of a single kind of step.
    return draw(meetings(scope)) if draw(st.booleans()) else (draw(steps(scope)),)


@st.composite
def meetings(draw: st.DrawFn, scope: Scope) -> tuple[Step, ...]:
    """A layer that permutes its output, perhaps something that a permutation can pass, and a layer that permutes its input.

    The latter may be a residual branch, so that what it reads has another reader.
    """
    order = draw(st.sampled_from(orders(scope, scope.width)))
    between = draw(st.none() | norms() | st.builds(Act, activations()) | st.just(Dropout()))
    first, last = draw(_permuting(scope, order, "output")), draw(_permuting(scope, order, "input"))
    end = Residual((last,)) if draw(st.integers(0, 2)) == 2 else last
    return (first, end) if between is None else (first, between, end)


@st.composite
def _permuting(draw: st.DrawFn, scope: Scope, order: Order, side: Literal["input", "output"]) -> Layer:
    """A layer that permutes on one side, where a bias would keep two permutations apart; or a dense one."""
    layer = draw(layers(scope, scope.width, scope.width))
    if layer.structure is None:
        return layer
    inverse = order in _SET_AFTERWARDS and draw(st.booleans())
    return Layer(layer.out, layer.structure, order, inverse, side, layer.bias and side == "input")


@st.composite
def layers(draw: st.DrawFn, scope: Scope, in_features: int, out_features: int) -> Layer:
    """Linear layers with every structure that fits, and every permutation that fits the side it acts on."""
    form = draw(st.sampled_from(("bias", "no bias", "conv1d") if scope.conv1d else ("bias", "no bias")))
    bias, conv1d = form != "no bias", form == "conv1d"
    # A quarter of all layers are dense: permutations fold into those.
    structure = draw(st.sampled_from(fitting(Shape(out_features, in_features)))) if draw(st.integers(0, 3)) else None
    if structure is None:
        return Layer(out_features, bias=bias, conv1d=conv1d)
    side: Literal["input", "output"] = draw(st.sampled_from(("input", "output")))
    order = draw(st.sampled_from(orders(scope, in_features if side == "input" else out_features)))
    inverse = order in _SET_AFTERWARDS and draw(st.booleans())
    return Layer(out_features, structure, order, inverse, side, bias, conv1d)


def fitting(shape: Shape) -> list[str]:
    """The structures that a layer of this shape can have at half its weights."""
    return [name for name in STRUCTURES if _fits(name, shape)]


def orders(scope: Scope, size: int) -> list[Order]:
    """The permutations that a side of `size` features can have: whole groups must fill it."""
    return [order for order in scope.orders if size % int(order.partition(":")[2] or 1) == 0] or ["none"]


def activations() -> st.SearchStrategy[Activation]:
    """Pointwise functions."""
    return st.sampled_from(sorted(ACTIVATIONS, key=lambda name: name != "relu"))


def norms() -> st.SearchStrategy[Norm]:
    """Norms over the features."""
    return st.builds(Norm, st.sampled_from(("layer", "rms", "rms expression", "plain layer")))


@st.composite
def mlps(draw: st.DrawFn, scope: Scope, width: int) -> Mlp:
    """MLPs that widen or keep the width."""
    hidden = draw(st.sampled_from((width, 2 * width)))
    return Mlp(draw(layers(scope, width, hidden)), draw(activations()), draw(layers(scope, hidden, width)))


@st.composite
def gated(draw: st.DrawFn, scope: Scope) -> Gated:
    """Gated MLPs with two layers, or with one that computes gate and value."""
    width = scope.width
    activation, down = draw(activations()), draw(layers(scope, 2 * width, width))
    if draw(st.booleans()):
        return Gated(draw(layers(scope, width, 2 * width)), draw(layers(scope, width, 2 * width)), activation, down)
    split: Literal["chunk", "split", "slice"] = draw(st.sampled_from(("chunk", "split", "slice")))
    return Gated(draw(layers(scope, width, 4 * width)), None, activation, down, split)


@st.composite
def attentions(draw: st.DrawFn, scope: Scope) -> Attention:
    """Attention with every way to make queries, keys and values."""
    width = scope.width
    heads = draw(st.sampled_from((1, 2, 4) if width >= 8 else (1, 2)))
    separate = draw(st.booleans())
    key_heads = draw(st.sampled_from([n for n in (heads, 1, 2) if heads % n == 0])) if separate else heads
    key_width = key_heads * width // heads
    core = draw(st.sampled_from(("sdpa", "causal", "written out")))
    return Attention(
        heads,
        tuple(draw(layers(scope, width, out)) for out in ((width, key_width, key_width) if separate else (3 * width,))),
        draw(layers(scope, width, width)),
        None if key_heads == heads else key_heads,
        "unbind" if separate else draw(st.sampled_from(("unbind", "chunk", "split"))),
        "interleave" if key_heads == heads else draw(st.sampled_from(("interleave", "expand"))),
        draw(st.sampled_from((None, "rotary") if scope.any_length else (None, "rotary", "bias"))),
        causal=core == "causal",
        written_out=core == "written out",
    )


@st.composite
def residuals(draw: st.DrawFn, scope: Scope) -> Residual:
    """Residual branches. What ends a body saves nothing of its result for gradients, so that a sum may be written to it."""
    width = scope.width
    last = draw(st.one_of(layers(scope, width, width), mlps(scope, width), gated(scope), attentions(scope)))
    body = (*draw(st.lists(steps(scope.inner()), max_size=1)), last)
    return Residual(body, draw(st.none() | norms()), draw(st.booleans()), draw(st.booleans()), draw(st.booleans()))


def branches(scope: Scope) -> st.SearchStrategy[Branches]:
    """Two chains side by side."""
    return st.builds(Branches, chains(scope.inner()), chains(scope.inner()), layers(scope, 2 * scope.width, scope.width))


def layers_of(description: object) -> Iterator[Layer]:
    """Every linear layer of a description, in order."""
    if isinstance(description, Layer):
        yield description
    elif isinstance(description, tuple):
        for part in description:
            yield from layers_of(part)
    elif dataclasses.is_dataclass(description):
        for field in dataclasses.fields(description):
            yield from layers_of(getattr(description, field.name))


def _fits(name: str, shape: Shape) -> bool:
    structure = parse(name)
    natural = structure.natural_sparsity()
    try:
        structure.check(shape, 0.5 if natural is None else natural, name)
    except ValueError:
        return False
    return True
