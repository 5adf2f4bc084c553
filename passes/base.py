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

from padst_compile import registered
from padst_compile.passes import context, graph, native_calls
from padst_compile.passes.context import Context

Side: TypeAlias = Literal["input", "output"]
Effect: TypeAlias = Literal["composed", "cancelled", "moved", "folded", "fused", "other"]


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why a rule that matched a node left it alone.

    Attributes:
        side: the end of a structured product that it is about, where it is about one.
    """

    rule: str
    node: str
    layer: str
    reason: str
    side: Side | None = None


@dataclasses.dataclass
class RuleReport:
    """What one pass did to one graph.

    Attributes:
        effect: what the pass does to permutations that it removes.
        rewritten: how many nodes it changed.
        tables_removed: by how many index tables inside of structured products there are fewer.
        refusals: matches that it left alone.
    """

    rule: str
    effect: Effect
    rewritten: int = 0
    tables_removed: int = 0
    refusals: list[Refusal] = dataclasses.field(default_factory=list)


class Pass(abc.ABC):
    """A change to a whole graph.

    Attributes:
        effect: what becomes of permutations that the pass removes, for the account in `explain`.
    """

    effect: ClassVar[Effect] = "other"

    @property
    def name(self) -> str:
        """The pass's name in reports, dumps and options."""
        return type(self).__name__

    @abc.abstractmethod
    def run(self, facts: Context) -> RuleReport:
        """Change `facts.module` in place and say what was done."""

    def uuid(self) -> str:
        """Identity for compiler caches: changes when the pass's module, or what all passes build on, does."""
        shared = (context, graph, native_calls, inspect.getmodule(Pass))
        if registered.is_ours(type(self)):
            return source_hash(inspect.getmodule(type(self)), *shared)
        return f"{registered.code_version(type(self))}-{source_hash(*shared)}"


class RewriteRule(Pass):
    """One algebraic identity, applied wherever it holds in a graph."""

    @abc.abstractmethod
    def matches(self, node: fx.Node) -> bool:
        """Whether `node` has the shape that this rule is about."""

    def why_not(self, node: fx.Node, facts: Context) -> str | None:
        """A sentence for the user if the rule must not fire on a match, else None."""
        return None

    @abc.abstractmethod
    def rewrite(self, node: fx.Node, facts: Context) -> None:
        """Replace `node`. Called only on a match that `why_not` let through."""

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
def source_hash(*modules: object) -> str:
    """One hash over the sources of modules."""
    sources = "\n".join(inspect.getsource(module) for module in modules)  # type: ignore[arg-type]  # modules
    return hashlib.sha256(sources.encode()).hexdigest()
