"""triton_linear(triton_linear(x, S), T)  ==  triton_linear(triton_linear(x, S, feature_major), T)

The Triton kernels read and write their activations through strides. A product that finds its inputs one by one, through an
index or a table, takes 16 bytes of them at a time only where tokens are adjacent in memory; with features adjacent, a gather
of 16-bit numbers cannot be in flight while others are multiplied. Writing costs the product before it the same either way. Its
result stays what it was, `[..., out_features]`, with other strides, so that nobody has to be told. A gate is laid out like the
result, so that the product that computes it leaves it feature-major, too.

Which products gain, the kernels say (`TritonProduct.why_token_major`), from what they compile to. Runs of 16 bytes need a
multiple of 16 tokens, which is what the compiler tells numbers apart by. Expects `FuseMlp` before it, whose kernel has no
hidden tensor, and the rules before that, which leave products beside each other. Reads shapes of weights, no values, but
parameters that stay to measure tiles with: those that were measured for one layout say nothing of another.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from padst_compile.autotune.effort import Effort
from padst_compile.autotune.launches import tune_launches
from padst_compile.autotune.problem import token_bucket
from padst_compile.kernels import dispatch, triton_support
from padst_compile.kernels.launch import Problem
from padst_compile.kernels.triton_product import new_outputs
from padst_compile.passes.base import RewriteRule, RuleReport
from padst_compile.passes.context import Context
from padst_compile.passes.graph import argument, fake, rows, set_arguments
from padst_compile.passes.native_calls import activations, is_block_linear, is_nm_linear, is_triton_linear, layouts
from padst_compile.structures import NM, Block, Diagonal, Structure

_ALIGNED = 16  # tokens


class HandOverFeatureMajor(RewriteRule):
    """Lets Triton products leave their results in the layout that all their readers gain by.

    Args:
        measure: whether tiles may be measured for products whose activations it laid out anew.
        effort: how much, if so.
    """

    def __init__(self, *, measure: bool = False, effort: Effort = "quick") -> None:
        self.measure, self.effort = measure, effort

    def uuid(self) -> str:
        """The rule's identity, with its options."""
        return f"{super().uuid()}-{self.measure}-{self.effort}"

    def run(self, facts: Context) -> RuleReport:
        """Apply the rule, then tune what has activations in a layout that it was not tuned for."""
        report = super().run(facts)
        if report.rewritten and self.measure:
            for node in facts.module.graph.nodes:
                if is_triton_linear(node) and layouts(node):
                    tune_launches(_trial(node, facts), self.effort)
        return report

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
        if not _gate_follows(node):
            return "the kernel reads a gate, which is token-major"
        if fake(node) is None:
            return "capture recorded no shapes"
        if not _runs_align(node):
            return f"the number of tokens is not known to be a multiple of {_ALIGNED}"
        content = ((user, _why_token_major(user, facts)) for user in node.users)
        return next((f"{user.name} gains nothing: {reason}" for user, reason in content if reason is not None), None)

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
    """Whether `user` is a product that takes `node` as activations, and as nothing else."""
    if not is_triton_linear(user) or argument(user, "x") is not node:
        return False
    return all(argument(user, name) is not node for name in ("residual", "gate"))


def _gate_follows(node: fx.Node) -> bool:
    """Whether what gates a product, if anything does, is a product that can leave its result feature-major for that alone."""
    gate = argument(node, "gate")
    if gate is None:
        return True
    alone = is_triton_linear(gate) and len(gate.users) == 1 and argument(node, "x") is not gate and fake(gate) is not None
    return alone and argument(gate, "gate") is None and argument(gate, "residual") is None


def _runs_align(node: fx.Node) -> bool:
    known = fake(node)
    assert known is not None
    return statically_known_true(math.prod(known.shape[:-1]) % _ALIGNED == 0)


def _why_token_major(node: fx.Node, facts: Context) -> str | None:
    """Why a product does not gain by inputs with tokens adjacent; None where it does."""
    structure, known = _structure(node, facts), fake(argument(node, "x"))
    assert known is not None
    product = dispatch.triton_product(structure, known.device, known.dtype)
    assert product is not None
    return product.why_token_major(_problem(node, structure, facts))


def _structure(node: fx.Node, facts: Context) -> Structure:
    sizes = facts.value(argument(node, "values")).shape
    if is_block_linear(node):
        return Block((sizes[2], sizes[1]))
    return NM(argument(node, "n"), argument(node, "m"), sizes[2]) if is_nm_linear(node) else Diagonal()


def _problem(node: fx.Node, structure: Structure, facts: Context) -> Problem:
    """The launch of a product on inputs with tokens adjacent."""
    known, values = fake(argument(node, "x")), facts.value(argument(node, "values"))
    assert known is not None
    x = known.new_empty((rows(known), int(known.shape[-1])))
    tables = (argument(node, name) for name in ("input_permutation", "output_permutation"))
    return triton_support.problem(
        f"{structure.kind}_forward", structure.to_string(), x, values, argument(node, "out_features"),
        permuted=triton_support.permuted_name(*tables),
    )  # fmt: skip


def _trial(node: fx.Node, facts: Context) -> Callable[[], torch.Tensor]:
    """The product on random activations in the layouts of its own."""
    x, y = activations(node), fake(node)
    assert x is not None
    assert y is not None
    tokens, out_features = token_bucket(rows(x), x.device.type), argument(node, "out_features")
    reads = "feature-major input" in layouts(node)
    # Its own generator: compiling must not change the random numbers that a model draws.
    generator = torch.Generator(x.device).manual_seed(0)

    def random(features: int, *, feature_major: bool) -> torch.Tensor:
        sizes = (features, tokens) if feature_major else (tokens, features)
        drawn = torch.randn(sizes, device=x.device, generator=generator).to(y.dtype)
        return drawn.T if feature_major else drawn

    drawn = {argument(node, "x"): random(int(x.shape[-1]), feature_major=reads)}
    for name in ("gate", "residual"):
        if argument(node, name) is not None:
            drawn[argument(node, name)] = random(out_features, feature_major=argument(node, "feature_major"))
    given = fx.map_arg((node.args, node.kwargs), lambda other: drawn[other] if other in drawn else facts.value(other))
    arguments, options = given
    product = node.target
    assert callable(product)
    return lambda: product(*arguments, **options)
