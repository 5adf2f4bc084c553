"""attention(q, k, permute(v, p))  ==  permute(attention(q, k, v), p)

Channels of the values pass through attention head by head, so the order of the channels within a head folds into the
projection of the values, another for each head; whole heads move if they move in queries, keys and values alike. Channels of
queries and keys are summed: they share one order within each head, which nothing else sees. Rotary embeddings tie the two
halves of a head together, and grouped heads move with their group.
"""

from __future__ import annotations

import torch

from padst_compile.passes.axes.axis import Axis, unify
from padst_compile.passes.axes.registry import rule
from padst_compile.passes.axes.rules.pointwise import broadcast
from padst_compile.passes.axes.trace import Call, axis_of_size

aten = torch.ops.aten


@rule(
    aten._scaled_dot_product_flash_attention_for_cpu, aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_efficient_attention, aten._scaled_dot_product_cudnn_attention,
    aten._scaled_dot_product_attention_math, aten._scaled_dot_product_fused_attention_overrideable,
    aten.scaled_dot_product_attention,
)  # fmt: skip
def scaled_dot_product(call: Call) -> None:
    """[…, heads, tokens, channels]: softmax(q kᵀ + mask) v"""
    queries, keys, values = (call.axes(call.argument(name)) for name in ("query", "key", "value"))
    for query, key, value in zip(queries[:-2], keys[:-2], values[:-2], strict=True):
        if query.size == key.size == value.size:  # else grouped: keys and values are repeated inside of the operator
            unify(query, key)
            unify(query, value)
        else:
            for axis in (query, key, value):
                axis.pin("groups of heads share keys inside of the attention operator")
    unify(queries[-1], keys[-1])
    unify(keys[-2], values[-2])
    call.graph.mixed += [queries[-2], keys[-2]]
    _mask(call, [*queries[:-1], keys[-2]])
    _order_of_tokens(call)
    result, *rest = call.results
    call.define(result, [*queries[:-1], values[-1]])
    for other in rest:  # log-sum-exp, random state
        known = [*queries[:-1]] if other.dim() == len(queries) - 1 else []
        axes = [a if a.size == b.size else b for a, b in zip(known, map(axis_of_size, other.shape), strict=False)]
        call.define(other, axes if len(axes) == other.dim() else [axis_of_size(size, "side result") for size in other.shape])


def _mask(call: Call, scores: list[Axis]) -> None:
    for name in ("attn_mask", "attn_bias"):
        if any(parameter.name == name for parameter in call.target._schema.arguments):
            mask = call.argument(name)
            if mask is not None:
                broadcast(call.axes(mask), scores)


def _order_of_tokens(call: Call) -> None:
    if call.argument("is_causal"):
        for name in ("query", "key", "value"):
            call.axes(call.argument(name))[-2].pin("attention is causal")
