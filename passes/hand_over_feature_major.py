"""triton_linear(triton_linear(x, S), T)  ==  triton_linear(triton_linear(x, S, feature_major), T)

The Triton kernels read and write their activations through strides. A product that finds its inputs one by one, through an
index or a table, takes 16 bytes of them at a time only where tokens are adjacent in memory; with features adjacent, a gather
of 16-bit numbers cannot be in flight while others are multiplied. Writing costs the product before it the same either way. Its
result stays what it was, `[..., out_features]`, with other strides, so that nobody has to be told. A gate is laid out like the
result, so that the product that computes it leaves it feature-major, too.

Which products gain, the kernels say (`TritonProduct.why_token_major`), from what they compile to. Runs of 16 bytes need a
multiple of 16 tokens, which is what the compiler tells numbers apart by. Expects `FuseMlp` before it, whose kernel has no
hidden tensor, and the rules before that, which leave products beside each other. Reads shapes of weights, no values, but
parameters that stay to measure with: a launch in another layout has tiles and a time of its own.
"""

from __future__ import annotations

import functools
import inspect
import math

from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from padst_compile.autotune.effort import Effort
from padst_compile.autotune.entry import MARGIN
from padst_compile.autotune.launches import launch_seconds
from padst_compile.kernels.triton_product import new_outputs
from padst_compile.passes.base import RewriteRule, source_hash
from padst_compile.passes.context import Context
from padst_compile.passes.graph import argument, fake, set_arguments
from padst_compile.passes.native_calls import (
    READS_FEATURES,
    WRITES_FEATURES,
    gate_follows,
    is_triton_linear,
    layouts,
    reads_as_input,
)
from padst_compile.passes.triton_trial import launch_of, trial, why_token_major

_ALIGNED = 16  # tokens


class HandOverFeatureMajor(RewriteRule):
    """Lets Triton products leave their results in the layout that all their readers gain by.

    Args:
        measure: whether measured times may speak against it, where there are some.
        effort: how much may be measured for that.
    """

    def __init__(self, *, measure: bool = False, effort: Effort = "quick") -> None:
        self.measure, self.effort = measure, effort

    def uuid(self) -> str:
        """The rule's identity, with its options and what it asks of products."""
        return f"{super().uuid()}-{source_hash(inspect.getmodule(trial))}-{self.measure}-{self.effort}"

    def matches(self, node: fx.Node) -> bool:
        """A product on Triton that another one reads."""
        return is_triton_linear(node) and any(_reads(user, node) for user in node.users)

    def why_not(self, node: fx.Node, facts: Context) -> str | None:
        """All readers must be products that gain, and nothing token-major may meet the result in the kernel."""
        others = [user.name for user in node.users if not _reads(user, node)]
        if others:
            return f"{others[0]} reads the result too"
        if argument(node, "residual") is not None:
            return "the kernel adds a residual, which is token-major"
        if not gate_follows(node, is_triton_linear):
            return "the kernel reads a gate, which is token-major"
        if fake(node) is None:
            return "capture recorded no shapes"
        if not _runs_align(node):
            return f"the number of tokens is not known to be a multiple of {_ALIGNED}"
        content = ((user, why_token_major(user, facts)) for user in node.users)
        idle = next((f"{user.name} gains nothing: {reason}" for user, reason in content if reason is not None), None)
        return _measured_slower(node, facts, self.effort) if idle is None and self.measure else idle

    def rewrite(self, node: fx.Node, facts: Context) -> None:
        """Tell the producer, and that of its gate."""
        for product in (node, argument(node, "gate")):
            if product is not None:
                _leave_feature_major(product)


def _leave_feature_major(node: fx.Node) -> None:
    known = fake(node)
    assert known is not None
    for key in ("example_value", "val"):
        if key in node.meta:
            node.meta[key] = new_outputs(known, argument(node, "out_features"), feature_major=True)
    set_arguments(node, feature_major=True)


def _reads(user: fx.Node, node: fx.Node) -> bool:
    """Whether `user` is a product that takes `node` as activations alone."""
    return is_triton_linear(user) and reads_as_input(user, node)


def _runs_align(node: fx.Node) -> bool:
    known = fake(node)
    assert known is not None
    return statically_known_true(math.prod(known.shape[:-1]) % _ALIGNED == 0)


def _measured_slower(node: fx.Node, facts: Context, effort: Effort) -> str | None:
    """By how much the products around a result take longer with it feature-major; None where they do not, or nobody knows."""
    writers = [product for product in (node, argument(node, "gate")) if product is not None]
    seconds = []
    for told in (False, True):
        for product in dict.fromkeys((*writers, *node.users)):
            reads, writes = (name in layouts(product) for name in (READS_FEATURES, WRITES_FEATURES))
            reads, writes = reads or (told and product in node.users), writes or (told and product in writers)
            launch = launch_of(product, facts, reads=reads, writes=writes)
            seconds.append(launch_seconds(launch, functools.partial(trial, product, facts, launch), effort))
    known = [time for time in seconds if time is not None]
    before, after = sum(known[: len(known) // 2]), sum(known[len(known) // 2 :])
    if len(known) < len(seconds) or after <= before * (1 + MARGIN):
        return None
    return f"feature-major, the products take {after / before:.2f} of their time"
