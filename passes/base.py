"""The shape of a rewrite rule: match, refuse with a reason, rewrite.

A rule looks at one node at a time. `why_not` is apart from `rewrite`, so that every refusal can be reported to the user
with the layer it concerns, and so that `rewrite` can assume all it needs.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import hashlib
import inspect
from collections.abc import Container
from typing import ClassVar, Literal, TypeAlias

from torch import fx

from padst_compile.passes import context, graph
from padst_compile.passes.context import Context

Effect: TypeAlias = Literal["composed", "cancelled", "moved", "folded", "fused", "other"]


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why a rule that matched a node left it alone."""

    rule: str
    node: str
    layer: str
    reason: str


@dataclasses.dataclass
class RuleReport:
    """What one rule did to one graph."""

    rule: str
    effect: Effect
    rewritten: int = 0
    refusals: list[Refusal] = dataclasses.field(default_factory=list)


class RewriteRule(abc.ABC):
    """One algebraic identity, applied wherever it holds in a graph.

    Attributes:
        effect: what becomes of a permutation when the rule fires, for the account in `explain`.
    """

    effect: ClassVar[Effect] = "other"

    @property
    def name(self) -> str:
        """The rule's name in reports, dumps and options."""
        return type(self).__name__

    @abc.abstractmethod
    def matches(self, node: fx.Node) -> bool:
        """Whether `node` has the shape that this rule is about."""

    def why_not(self, node: fx.Node, facts: Context) -> str | None:
        """A sentence for the user if the rule must not fire on a match, else None."""
        return None

    @abc.abstractmethod
    def rewrite(self, node: fx.Node, facts: Context) -> None:
        """Replace `node`. Called only on a match that `why_not` let through."""

    def uuid(self) -> str:
        """Identity for compiler caches: changes when the rule's module, or what all rules build on, does."""
        return _source_hash(inspect.getmodule(type(self)), context, graph, inspect.getmodule(RewriteRule))

    def run(self, facts: Context) -> RuleReport:
        """Apply the rule to every node of the graph, in order, once."""
        report = RuleReport(self.name, self.effect)
        graph.make_positional(facts.module.graph)
        for node in list(facts.module.graph.nodes):
            if node._erased or not self.matches(node):
                continue
            reason = self.why_not(node, facts)
            if reason is not None:
                report.refusals.append(Refusal(self.name, node.name, graph.layer_name(node), reason))
                continue
            self.rewrite(node, facts)
            report.rewritten += 1
        if report.rewritten:
            remove_dead(facts.module.graph, keep=facts.assumed)
        return report


def remove_dead(of: fx.Graph, keep: Container[fx.Node] = ()) -> None:
    """Erase this package's own nodes that nothing reads any more; a model's other nodes are not ours to judge."""
    for node in reversed(list(of.nodes)):
        ours = node.target in (graph.PERMUTE, graph.STRUCTURED_LINEAR, graph.TO_DENSE) or node.meta.get(context.HOISTED)
        if ours and not node.users and node not in keep:
            of.erase_node(node)


@functools.cache
def _source_hash(*modules: object) -> str:
    sources = "\n".join(inspect.getsource(module) for module in modules)  # type: ignore[arg-type]  # modules
    return hashlib.sha256(sources.encode()).hexdigest()
