"""Σ gathers that remain  →  min, over one channel order per class of tensor axes

Every tensor of a graph may be kept in another channel order, as long as all that operators tie together agree (`axes`). An
order `L` of a tensor `x` (stored: `permute(x, L)`) changes nothing but index tables and parameters:

    linear(x, S, in=p)        ==  linear(permute(x, L), S, in=L⁻¹[p])       no table is left where L == p
    permute(linear(x, S, b, out=q), L)  ==  linear(x, S, b[L], out=q[L])    no table is left where L == q⁻¹
    permute(x, p) in order M  ==  permute(permute(x, L), L⁻¹[p[M]])         nothing is left where L == p[M]
    dense linear, norm, bias, embedding, …                                  their parameters are reordered once

The pass takes the orders under which what remains is cheapest, exactly (`labelling`), by the costs of `costs`. Doing nothing is
always one of the choices and wins ties. It looks at the values of tables, so it runs in inference; tables whose values it
relied on are watched.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import sympy
import torch
from torch import fx

from padst_compile import permutation
from padst_compile.errors import UnsupportedGraphError
from padst_compile.passes import costs, label_candidates, labelling
from padst_compile.passes.axes import axis as axes_module
from padst_compile.passes.axes import orders as orders_module
from padst_compile.passes.axes import rules, trace
from padst_compile.passes.axes.axis import Axis
from padst_compile.passes.axes.orders import Freedom, Label, Order
from padst_compile.passes.axes.registry import rule_for
from padst_compile.passes.axes.trace import AxisGraph, Permute, Product, StaticUse
from padst_compile.passes.base import Pass, Refusal, RuleReport, Side, remove_dead, source_hash
from padst_compile.passes.cancel_permutations import why_no_copy
from padst_compile.passes.context import Context
from padst_compile.passes.graph import argument, fake, layer_name, make_positional, rows, set_arguments
from padst_compile.passes.index_nodes import compose, select
from padst_compile.passes.why_left import why_left, why_link_left
from padst_compile.structures import parse

Outcome: TypeAlias = Literal["same", "changed", "added", "removed"]
_MOST_LABELS = 32  # per leaf: more demands than that only arise where hardly any can be met together


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """One end of a structured product: the order it would like, and what it costs not to get it.

    Args:
        node: the product.
        side: which end.
        axis: of its input or output.
        table: the node of its index table, or None.
        demand: the order under which no table is needed.
        cost: of a table, in bytes for all tokens.
        bytes_per_token: how it grows.
    """

    node: fx.Node
    side: Side
    axis: Axis
    table: fx.Node | None
    demand: Order
    cost: int
    bytes_per_token: int


class PlacePermutations(Pass):
    """Chooses an order for every class of axes and rewrites tables and parameters to it."""

    effect = "folded"

    def uuid(self) -> str:
        """The pass's identity: it is spread over several modules."""
        spread = [costs, labelling, label_candidates, axes_module, orders_module, trace]
        spread += [getattr(rules, name) for name in rules.__all__]
        return f"{super().uuid()}-{source_hash(*spread)}"

    def run(self, facts: Context) -> RuleReport:
        """Place all permutations of the graph at once."""
        report = RuleReport(self.name, self.effect)
        if not facts.inference:
            return report
        make_positional(facts.module.graph)
        try:
            problem = Placement(facts)
            if not problem.worth_while:
                return report
            labels = problem.solve()
        except (UnsupportedGraphError, labelling.LabellingTooLargeError) as error:
            report.refusals.append(Refusal(self.name, "graph", "the whole graph", str(error)))
            return report
        rewriting = _Rewriting(facts, problem, labels)
        report.rewritten, report.tables_removed = rewriting.apply()
        report.refusals += rewriting.remaining(self.name)
        if report.rewritten:
            remove_dead(facts.module.graph, keep=facts.assumed)
        return report


class Placement:
    """The choice of orders as a labelling problem.

    Attributes:
        graph: the axes of the captured graph.
        freedom: which orders they can have.
        sites: the ends of structured products.
    """

    def __init__(self, facts: Context) -> None:
        self._facts = facts
        self.graph: AxisGraph = trace.trace(facts, rule_for)
        self.sites = [site for product in self.graph.products for site in self._sites(product)]
        self.links = [permute for permute in self.graph.permutes if self._table(permute.node, permute.node.args[1]) is not None]
        self.freedom = Freedom(self.graph.seen, self.graph.mixed)
        self._wanted = {site: self.freedom.decompose(site.axis, site.demand) for site in self.sites}

    def wanted(self, site: Site) -> Mapping[Axis, Label] | None:
        """The labels under which a site needs no table; None where the graph allows none such."""
        return self._wanted[site]

    @property
    def worth_while(self) -> bool:
        """Whether there is any table or permutation to place."""
        return bool(self.links) or any(site.table is not None for site in self.sites)

    def solve(self) -> dict[Axis, Label]:
        """The cheapest label of every leaf, those that stay as they are left out.

        Raises:
            LabellingTooLargeError: too many orders are wanted at once.
        """
        domains = self._domains()
        best = labelling.minimise(domains, self._factors(domains))
        return {leaf: label for leaf, label in best.items() if label != self.freedom.identity(leaf)}

    def objective(self) -> Callable[[Mapping[Axis, Label]], float]:
        """What remains under a labelling, in bytes, as a function; leaves without a label stay as they are."""
        stay = {leaf: self.freedom.identity(leaf) for leaf in self.free_leaves()}
        factors = self._factors({leaf: [label] for leaf, label in stay.items()})
        fixed = sum(site.cost for site in self.sites if self.wanted(site) is None)
        return lambda labels: fixed + float(labelling.total_cost({**stay, **labels}, factors))

    def free_leaves(self) -> list[Axis]:
        """The leaves that sites and links speak of and whose order is not fixed."""
        ends = [site.axis for site in self.sites]
        ends += [end for link in self.links for end in (link.inputs, link.outputs)]
        leaves = dict.fromkeys(leaf for end in ends for leaf in self.freedom.leaves(end))
        return [leaf for leaf in leaves if leaf.pinned is None]

    def table(self, node: fx.Node | None, size: int) -> Order:
        """The order in an index table; None stands for the identity."""
        return np.arange(size, dtype=np.int32) if node is None else trace.order_of(self._facts.value(node))

    def _sites(self, product: Product) -> Iterable[Site]:
        node, x = product.node, fake(argument(product.node, "x"))
        kind = costs.kind_of(parse(argument(node, "structure")))
        features, out_features = int(product.inputs.size), argument(node, "out_features")
        model = _cost_model(x)
        ends: tuple[tuple[Side, Axis, int, sympy.Expr], ...] = (
            ("input", product.inputs, features, model.load(features, kind)),
            ("output", product.outputs, out_features, model.store(out_features, kind)),
        )
        for side, axis, size, cost in ends:
            table = argument(node, f"{side}_permutation")
            order = self._table(node, table, size)
            if order is None:
                axis.pin("its index table is computed from the inputs")
            else:
                yield Site(
                    node,
                    side,
                    axis,
                    table,
                    order if side == "input" else invert(order),
                    costs.at(cost, rows(x)),
                    costs.per_token(cost),
                )

    def _table(self, node: fx.Node, table: Any, size: int | None = None) -> Order | None:
        """The order in an index table, checked; None where it is known at run time only."""
        if table is None:
            return np.arange(size or 0, dtype=np.int32)
        if not self._facts.is_static(table):
            return None
        value = self._facts.value(table)
        return trace.order_of(permutation.check(value, size or value.numel(), layer_name(node)))

    def _domains(self) -> dict[Axis, list[Label]]:
        """Labels that could be of use: the identity, what sites demand, and what links make of these.

        That loses nothing where the ends of links are leaves (`label_candidates`).
        """
        domains: dict[Axis, dict[Label, None]] = {}
        for site in self.sites:
            self._admit(domains, self.wanted(site))
        for axis, orders in self._transported().items():
            for order in orders:
                self._admit(domains, self.freedom.decompose(axis, np.frombuffer(order, dtype=np.int32)))
        return {leaf: list(labels) for leaf, labels in domains.items()}

    def _admit(self, domains: dict[Axis, dict[Label, None]], labels: Mapping[Axis, Label] | None) -> None:
        for leaf, label in (labels or {}).items():
            if leaf.pinned is None:
                known = domains.setdefault(leaf, {self.freedom.identity(leaf): None})
                if len(known) < _MOST_LABELS:
                    known[label] = None

    def _transported(self) -> dict[Axis, tuple[bytes, ...]]:
        """Orders for the ends of links: what is demanded of them, there or beyond other links."""
        ends = [axis.root() for link in self.links for axis in (link.inputs, link.outputs)]
        demands: dict[Axis, list[bytes]] = {axis: [np.arange(axis.size, dtype=np.int32).tobytes()] for axis in ends}
        for site in self.sites:
            if site.axis.root() in demands:
                demands[site.axis.root()].append(site.demand.tobytes())
        links = [self._transport(link) for link in self.links]
        return label_candidates.candidates(demands, links, default=b"", cap=_MOST_LABELS)

    def _transport(self, link: Permute) -> label_candidates.Link[bytes]:
        table = self.table(link.node.args[1], 0)  # type: ignore[arg-type]  # a node: tables of links are static
        back = invert(table)
        return label_candidates.Link(
            link.inputs.root(),
            link.outputs.root(),
            lambda order: table[np.frombuffer(order, dtype=np.int32)].tobytes(),
            lambda order: back[np.frombuffer(order, dtype=np.int32)].tobytes(),
        )

    def _factors(self, domains: Mapping[Axis, Sequence[Label]]) -> list[labelling.Factor[Label]]:
        sites = [factor for site in self.sites if (factor := self._site_factor(site)) is not None]
        links = [self._link_factor(link, domains) for link in self.links]
        return [*sites, *links, *self._static_factors(domains)]

    def _site_factor(self, site: Site) -> labelling.Factor[Label] | None:
        wanted = self.wanted(site)
        if wanted is None:
            return None  # costs the same whatever is chosen
        leaves = tuple(leaf for leaf in wanted if leaf.pinned is None)
        labels = tuple(wanted[leaf] for leaf in leaves)
        return labelling.Factor(leaves, lambda *chosen: 0 if chosen == labels else site.cost, f"{site.node.name} {site.side}")

    def _link_factor(self, link: Permute, domains: Mapping[Axis, Sequence[Label]]) -> labelling.Factor[Label]:
        table = self.table(link.node.args[1], 0)  # type: ignore[arg-type]  # a node
        both = dict.fromkeys([*self.freedom.leaves(link.inputs), *self.freedom.leaves(link.outputs)])
        leaves = tuple(leaf for leaf in both if leaf in domains)
        x = fake(link.node)
        price = costs.at(_cost_model(x).separate(table.size), rows(x))
        removable = why_no_copy(link.node) is None

        def cost(*chosen: Label) -> int:
            labels = dict(zip(leaves, chosen, strict=True))
            inputs, outputs = (self.freedom.assemble(axis, labels) for axis in (link.inputs, link.outputs))
            return 0 if removable and np.array_equal(inputs, table[outputs]) else price

        return labelling.Factor(leaves, cost, link.node.name)

    def _static_factors(self, domains: Mapping[Axis, Sequence[Label]]) -> list[labelling.Factor[Label]]:
        """Reordered copies of parameters: cheap, but dear enough that nothing is copied for nothing."""
        prices: collections.Counter[Axis] = collections.Counter()
        for use in self.graph.statics:
            size = self._bytes(use.node)
            for leaf in dict.fromkeys(leaf for axis in use.axes for leaf in self.freedom.leaves(axis) if leaf in domains):
                prices[leaf] += int(costs.CostModel().fold(int(leaf.size), size))
        return [self._fold_factor(leaf, price) for leaf, price in prices.items()]

    def _bytes(self, node: fx.Node) -> int:
        value = fake(node)
        value = self._facts.value(node) if value is None else value
        return int(value.numel()) * value.element_size()

    def _fold_factor(self, leaf: Axis, price: int) -> labelling.Factor[Label]:
        identity = self.freedom.identity(leaf)
        return labelling.Factor((leaf,), lambda label: 0 if label == identity else price, "parameters")


class _Rewriting:
    """Carries out a labelling."""

    def __init__(self, facts: Context, problem: Placement, labels: Mapping[Axis, Label]) -> None:
        self._facts, self._problem, self._labels = facts, problem, labels
        self._constants: dict[bytes, fx.Node] = {}
        self._device = self._find_device()  # now: a node that was erased has no arguments

    def apply(self) -> tuple[int, int]:
        """Rewrite all that an order reaches; how many nodes changed, and by how many there are fewer tables of products."""
        # Orders first: a rewritten node is not the one that was traced.
        statics = [(use, [self._order(axis) for axis in use.axes]) for use in self._problem.graph.statics]
        sites = [(site, self._order(site.axis)) for site in self._problem.sites]
        links = [(link, self._order(link.inputs), self._order(link.outputs)) for link in self._problem.links]
        changed = sum(self._rewrite_static(use, orders) for use, orders in statics)
        outcomes = [self._rewrite_site(site, order) for site, order in sites]
        tables = outcomes.count("removed") - outcomes.count("added")
        outcomes += [self._rewrite_link(link, inputs, outputs) for link, inputs, outputs in links]
        return changed + sum(outcome != "same" for outcome in outcomes), max(tables, 0)

    def remaining(self, rule: str) -> list[Refusal]:
        """Why each table and each permutation that is left could not vanish."""
        sites = [
            Refusal(rule, site.node.name, layer_name(site.node), why_left(self._problem, site), site.side)
            for site in self._problem.sites
            if argument(site.node, f"{site.side}_permutation") is not None
        ]
        links = [
            Refusal(rule, link.node.name, layer_name(link.node), why_link_left(self._problem, link))
            for link in self._problem.links
            if not link.node._erased
        ]
        return sites + links

    def _order(self, axis: Axis) -> Order | None:
        """The order that an axis got; None if it stays as it is."""
        if not any(leaf in self._labels for leaf in self._problem.freedom.leaves(axis)):
            return None
        order = self._problem.freedom.assemble(axis, self._labels)
        return None if is_identity(order) else order

    def _rewrite_static(self, use: StaticUse, orders: Sequence[Order | None]) -> bool:
        node = use.node
        for position, order in enumerate(orders):
            if order is not None:
                with self._before(use.user):
                    node = self._facts.hoist(select(use.user.graph, node, self._constant(order), position))
        if node is not use.node:
            use.user.replace_input_with(use.node, node)
        return node is not use.node

    def _rewrite_site(self, site: Site, order: Order | None) -> Outcome:
        name, size = f"{site.side}_permutation", site.demand.size
        own = self._problem.table(site.table, size)
        placed = np.arange(size, dtype=np.int32) if order is None else order
        residual = invert(placed)[own] if site.side == "input" else own[placed]
        if is_identity(residual):
            if site.table is None:
                return "same"
            self._facts.assume(site.table)
            set_arguments(site.node, **{name: None})
            return "removed"
        if order is None:
            return "same"
        parts = (invert(order), site.table) if site.side == "input" else (site.table, order)
        with self._before(site.node):
            set_arguments(site.node, **{name: self._composed(*parts)})
        return "added" if site.table is None else "changed"

    def _rewrite_link(self, link: Permute, inputs: Order | None, outputs: Order | None) -> Outcome:
        x, table = link.node.args
        assert isinstance(x, fx.Node)
        assert isinstance(table, fx.Node)
        own = self._problem.table(table, 0)
        residual = own if outputs is None else own[outputs]
        residual = residual if inputs is None else invert(inputs)[residual]
        if is_identity(residual) and why_no_copy(link.node) is None:
            self._facts.assume(table)
            link.node.replace_all_uses_with(x)
            link.node.graph.erase_node(link.node)
            return "removed"
        if inputs is None and outputs is None:
            return "same"
        with self._before(link.node):
            node = self._composed(None if inputs is None else invert(inputs), table, outputs)
        link.node.args = (x, node)
        return "changed"

    def _composed(self, *parts: Order | fx.Node | None) -> fx.Node:
        nodes = [part if isinstance(part, fx.Node) else self._constant(part) for part in parts if part is not None]
        result = nodes[0]
        for node in nodes[1:]:
            result = self._facts.hoist(compose(result.graph, result, node))
        return result

    def _constant(self, order: Order) -> fx.Node:
        """A node that holds an order; equal orders share one."""
        module, key = self._facts.module, order.tobytes()
        if key not in self._constants:
            name = f"_padst_order_{len(self._constants)}"
            while hasattr(module, name):  # from an earlier run
                name += "_"
            # No buffer: AOTAutograd expects Dynamo to have named the source of each.
            setattr(module, name, torch.from_numpy(order.copy()).to(self._device))
            first = next(node for node in module.graph.nodes if node.op != "placeholder")
            with module.graph.inserting_before(first):
                # Hoisted even where a kernel reads it as it is: AOTAutograd takes no tensor that is not an input.
                self._constants[key] = self._facts.hoist(module.graph.create_node("get_attr", name))
        return self._constants[key]

    def _find_device(self) -> torch.device:
        nodes = [*(site.node for site in self._problem.sites), *(link.node for link in self._problem.links)]
        value = fake(nodes[0].args[0])
        assert value is not None
        return value.device

    def _before(self, node: fx.Node) -> Any:
        return node.graph.inserting_before(node)


def _cost_model(x: torch.Tensor | None) -> costs.CostModel:
    return costs.CostModel() if x is None else costs.CostModel(x.element_size(), x.device.type)


def invert(order: Order) -> Order:
    """The order that undoes another."""
    return np.argsort(order).astype(np.int32)


def is_identity(order: Order) -> bool:
    """Whether an order moves nothing."""
    return bool(np.array_equal(order, np.arange(order.size)))
