"""structured_linear(x, S, …)  ==  native or Triton kernel of S   or   F.linear(x, dense(S), b)   or   2:4 product of dense(S)

Lowers every structured product to the fastest thing that computes it here. In inference the native op is called directly,
and the dense weight of a layer that stays dense, its permutations folded in, is made once. So is the packed weight of an N:M
layer that sparse tensor cores multiply: its rows take on the order of the outputs, while another order of its columns would
not be 2:4 any more, so that inputs are permuted before the product. While training the op keeps its gradients, so only the
choice between sparse and dense is made.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, TypeAlias

import torch
from torch import fx
from torch.nn import functional as F

from padst_compile.autotune.effort import Effort
from padst_compile.autotune.kernel_choice import KernelChoice, choose_kernel
from padst_compile.autotune.problem import Kernel, LayerProblem, token_bucket
from padst_compile.autotune.search import Run
from padst_compile.kernels import dispatch, triton_support
from padst_compile.kernels.cusparselt import support
from padst_compile.passes.base import RewriteRule, RuleReport, Side
from padst_compile.passes.context import Context
from padst_compile.passes.costs import kind_of
from padst_compile.passes.fold_diagonals import FOLDED_ACTIVE, FOLDED_FROM, has_equal_rows
from padst_compile.passes.graph import STRUCTURED_LINEAR, TO_DENSE, argument, fake, is_call, layer_name, rows
from padst_compile.passes.index_nodes import invert, select
from padst_compile.passes.native_calls import fate
from padst_compile.passes.trial import Trial
from padst_compile.structures import Shape, Structure, Unstructured, parse

Policy: TypeAlias = Literal["measure", "sparse", "dense"]

_TWO_OF_FOUR_PACK = torch.ops.padst.two_of_four_pack.default
_TWO_OF_FOUR_LINEAR = torch.ops.padst.two_of_four_linear.default


@dataclasses.dataclass(frozen=True)
class LayerDecision:
    """What became of one structured product of the graph; `folded_from` is its structure before it became blocks."""

    layer: str
    shape: Shape
    structure: str
    active: int
    tokens: int
    dtype: str
    fused: tuple[str, ...]
    choice: KernelChoice
    folded_from: str = ""

    @property
    def tables(self) -> tuple[Side, ...]:
        """The sides that the product reads or writes through an index table."""
        sides: tuple[Side, ...] = ("input", "output")
        return tuple(side for side in sides if f"{side}_permutation" in self.fused)

    @property
    def folded(self) -> tuple[Side, ...]:
        """Those of them whose order a weight took on that is made once."""
        if self.choice.kernel == "cusparselt":
            return tuple(side for side in self.tables if side == "output")
        return self.tables if self.choice.kernel == "dense" else ()


class ChooseKernels(RewriteRule):
    """Lowers structured products; `decisions` tells what was chosen for each, and what later rules fused with it.

    Args:
        policy: "measure" takes the faster of sparse and dense; "sparse" and "dense" do not ask.
        effort: how much may be measured for that.
    """

    effect = "folded"  # into the order of the dense weight's columns and rows

    def __init__(self, policy: Policy = "measure", effort: Effort = "quick") -> None:
        self.policy, self.effort = policy, effort
        self._decided: list[tuple[LayerDecision, fx.Node | None]] = []

    @property
    def decisions(self) -> list[LayerDecision]:
        """One for each structured product, in the order of the graph; what a native call does besides is read when asked."""
        return [decision if native is None else _with_fusions(decision, native) for decision, native in self._decided]

    def uuid(self) -> str:
        """The rule's identity, with its options."""
        return f"{super().uuid()}-{self.policy}-{self.effort}"

    def run(self, facts: Context) -> RuleReport:
        """Choose for every product."""
        report = super().run(facts)
        report.tables_removed = sum(len(decision.folded) for decision in self.decisions)
        return report

    def matches(self, node: fx.Node) -> bool:
        """Any structured product."""
        return is_call(node, STRUCTURED_LINEAR)

    def why_not(self, node: fx.Node, facts: Context) -> str | None:
        """The dtype and the weights must be known to choose anything."""
        if fake(node) is None or fake(argument(node, "x")) is None:
            return "capture recorded no shapes"
        known = facts.is_static(argument(node, "values")) and all(map(facts.is_static, argument(node, "topology")))
        return None if known else "the weights are computed from the inputs"

    def rewrite(self, node: fx.Node, facts: Context) -> None:
        """Decide, then rewrite."""
        call = _Call(node, facts)
        choice = self._choose(call)
        decision, native = call.decision(choice), None
        if choice.kernel == "dense":
            _lower_to_dense(call)
        elif choice.kernel == "cusparselt":
            _lower_to_two_of_four(call)
        elif facts.inference and choice.kernel in ("native", "triton"):
            native = _lower_to_native(call, choice)
        self._decided.append((decision, native))

    def _choose(self, call: _Call) -> KernelChoice:
        if isinstance(call.structure, Unstructured):
            return KernelChoice("dense", "unstructured sparsity has no kernel that beats dense; it is the accuracy baseline")
        sparse = dispatch.kernel_for(call.structure, call.device, call.dtype)
        if self.policy == "dense":
            return KernelChoice("dense", "asked for by options={'kernels': 'dense'}")
        if self.policy == "sparse":
            return KernelChoice(sparse, "asked for by options={'kernels': 'sparse'}")
        if sparse == "aten" and kind_of(call.structure) == "dense":
            return KernelChoice("dense", f"nobody registered a kernel for {call.structure.kind} that runs here")
        kernels, note = call.candidates(sparse)
        choice = choose_kernel(call.problem(kernels), lambda: call.runs(kernels), self.effort)
        return dataclasses.replace(choice, reason="; ".join(filter(None, (choice.reason, note))))


def _with_fusions(decision: LayerDecision, native: fx.Node) -> LayerDecision:
    """What later rules made of a native call."""
    became = fate(native)
    reason = "; ".join(filter(None, (decision.choice.reason, became.reason)))
    choice = dataclasses.replace(decision.choice, reason=reason)
    return dataclasses.replace(decision, fused=decision.fused + became.fused, choice=choice)


class _Call:
    """One structured product: what it is called with, and what follows from it."""

    def __init__(self, node: fx.Node, facts: Context) -> None:
        self.node, self.facts = node, facts
        self.structure: Structure = parse(argument(node, "structure"))
        result, x = fake(node), fake(argument(node, "x"))
        assert result is not None
        assert x is not None
        self.dtype, self.device = result.dtype, result.device
        self.tokens = token_bucket(rows(x), self.device.type)
        self.shape = Shape(argument(node, "out_features"), int(x.shape[-1]))

    def static(self, name: str) -> torch.Tensor | None:
        """The present value of an argument, in the product's dtype where it is floating."""
        node = argument(self.node, name)
        if node is None or not self.facts.is_static(node):
            return None
        value = self.facts.value(node)
        return value.to(self.dtype) if value.is_floating_point() else value

    def candidates(self, sparse: Kernel) -> tuple[tuple[Kernel, ...], str]:
        """What can run the product, the default first and dense last, and what is told of others."""
        if not support.considered(self.structure, self.device):
            return (sparse, "dense"), ""
        reason: str | None = "it computes no gradients"
        if self.facts.inference:
            reason = support.why_not(self.structure, self.shape, self.device, self.dtype)
        if reason is None:
            return (sparse, "cusparselt", "dense"), ""
        return (sparse, "dense"), f"cusparselt is left out: {reason}"

    def problem(self, kernels: tuple[Kernel, ...]) -> LayerProblem:
        tables = [side for side, name in _SIDES if argument(self.node, name) is not None]
        return LayerProblem(
            argument(self.node, "structure"), self.shape.in_features, self.shape.out_features, self._stored(), self.tokens,
            str(self.dtype).removeprefix("torch."), "+".join(tables), not self.facts.inference, self.device.type,
            kernels, "" if argument(self.node, "bias") is None else "bias",
            precision=triton_support.precision_on(self.device, self.dtype),
        )  # fmt: skip

    def runs(self, kernels: tuple[Kernel, ...]) -> dict[Kernel, Run]:
        """The product on random activations, by kernel, with the backward pass while training."""
        values, topology = self.static("values"), tuple(self.facts.value(index) for index in argument(self.node, "topology"))
        assert values is not None
        tables = self.static("input_permutation"), self.static("output_permutation")
        trial = Trial(self.structure, self.shape, values, topology, self.static("bias"), tables)
        return trial.runs(self.tokens, kernels, training=not self.facts.inference)

    def decision(self, choice: KernelChoice) -> LayerDecision:
        fused = tuple(name for _, name in _SIDES if argument(self.node, name) is not None)
        bias = ("bias",) if argument(self.node, "bias") is not None else ()
        return LayerDecision(
            layer_name(self.node), self.shape, argument(self.node, "structure"), self._active(), self.tokens,
            str(self.dtype).removeprefix("torch."), bias + fused, choice, self.node.meta.get(FOLDED_FROM, ""),
        )  # fmt: skip

    def _stored(self) -> int:
        return self.facts.value(argument(self.node, "values")).numel()

    def _active(self) -> int:
        folded: int | None = self.node.meta.get(FOLDED_ACTIVE)
        if folded is not None:
            return folded
        topology = tuple(self.facts.value(index).cpu() for index in argument(self.node, "topology"))
        ones = torch.ones(self.shape.out_features, self.shape.in_features)
        return int(self.structure.pack(ones, topology).count_nonzero())


_SIDES = (("in", "input_permutation"), ("out", "output_permutation"))


def _lower_to_native(call: _Call, choice: KernelChoice) -> fx.Node:
    assert choice.kernel in ("native", "triton")
    node, graph = call.node, call.node.graph
    names = ("x", "values", "bias")
    tokens = 0 if choice.tile is None else choice.tile.tokens
    with graph.inserting_before(node):
        x, values, bias = (_cast(call, argument(node, name)) for name in names)
        native = graph.call_function(
            dispatch.kernel_op(call.structure, choice.kernel),
            (
                x, values, *argument(node, "topology"), bias, argument(node, "input_permutation"),
                argument(node, "output_permutation"), argument(node, "out_features"), *dispatch.native_sizes(call.structure),
            ),
            dispatch.tile_arguments(call.structure, choice.kernel, tokens)
            | dispatch.row_arguments(choice.kernel, equal_rows=has_equal_rows(node)),
        )  # fmt: skip
    _replace(node, native)
    return native


def _lower_to_dense(call: _Call) -> None:
    """`F.linear` with the dense weight; its permutations become the order of the weight's columns and rows."""
    node, graph = call.node, call.node.graph
    x, bias = argument(node, "x"), argument(node, "bias")
    in_table, out_table = argument(node, "input_permutation"), argument(node, "output_permutation")
    with graph.inserting_before(node):
        weight = _dense_weight(call, argument(node, "values"))
        if in_table is not None:
            weight = call.facts.hoist(select(graph, weight, call.facts.hoist(invert(graph, in_table)), axis=1))
        if out_table is not None:
            weight = call.facts.hoist(select(graph, weight, out_table, axis=0))
        dense = graph.call_function(F.linear, (x, weight, bias))
    _replace(node, dense)


def _lower_to_two_of_four(call: _Call) -> None:
    """The product on sparse tensor cores with a weight packed once, its rows in the order of the outputs."""
    node, graph = call.node, call.node.graph
    out_table = argument(node, "output_permutation")
    with graph.inserting_before(node):
        x, values, bias = (_cast(call, argument(node, name)) for name in ("x", "values", "bias"))
        weight = _dense_weight(call, values)
        if out_table is not None:
            weight = call.facts.hoist(select(graph, weight, out_table, axis=0))
        packed = call.facts.hoist(graph.call_function(_TWO_OF_FOUR_PACK, (weight,)))
        product = graph.call_function(
            _TWO_OF_FOUR_LINEAR, (x, packed, bias, argument(node, "input_permutation"), call.shape.out_features)
        )
    _replace(node, product)


def _dense_weight(call: _Call, values: fx.Node) -> fx.Node:
    sizes = call.shape.out_features, call.shape.in_features
    arguments = values, argument(call.node, "topology"), *sizes, argument(call.node, "structure")
    return call.facts.hoist(call.node.graph.call_function(TO_DENSE, arguments))


def _replace(node: fx.Node, product: fx.Node) -> None:
    product.meta = dict(node.meta)
    node.replace_all_uses_with(product)
    node.graph.erase_node(node)


def _cast(call: _Call, node: Any) -> Any:
    """`node` in the product's dtype: what autocast does to the op before lowering, and nothing elsewhere."""
    if not isinstance(node, fx.Node):
        return node
    known = fake(node)
    dtype = known.dtype if known is not None else call.facts.value(node).dtype
    if dtype == call.dtype:
        return node
    cast = node.graph.call_function(torch.ops.aten.to.dtype, (node, call.dtype))
    return call.facts.hoist(cast)
