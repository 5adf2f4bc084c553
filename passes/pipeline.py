"""The passes in order, over one graph: what `torch.compile(backend="padst")` runs, and what a traced model can be given."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import fx

from padst_compile.errors import UnknownFieldError, UnsupportedGraphError
from padst_compile.passes.absorb_bias import AbsorbBias
from padst_compile.passes.base import RewriteRule, RuleReport
from padst_compile.passes.cancel_permutations import CancelPermutations
from padst_compile.passes.choose_kernels import ChooseKernels, LayerDecision, Policy
from padst_compile.passes.compose_permutations import ComposePermutations
from padst_compile.passes.context import Context, static_tensors
from padst_compile.passes.fold_into_linear import FoldIntoLinear
from padst_compile.passes.fold_into_norm import FoldIntoNorm
from padst_compile.passes.fuse_input_permutation import FuseInputPermutation
from padst_compile.passes.fuse_output_permutation import FuseOutputPermutation
from padst_compile.passes.graph import PERMUTE, is_call
from padst_compile.passes.sparsify_linears import SparsifyLinears
from padst_compile.passes.tanh_gate import TanhGate
from padst_compile.passes.unfold_patches import UnfoldPatches
from padst_compile.spec import SpecLike

logger = logging.getLogger(__name__)

RULES: tuple[type[RewriteRule], ...] = (
    ComposePermutations,
    FoldIntoNorm,
    FoldIntoLinear,
    CancelPermutations,
    FuseInputPermutation,
    FuseOutputPermutation,
    AbsorbBias,
    UnfoldPatches,
    TanhGate,
    ChooseKernels,
)


@dataclasses.dataclass(frozen=True)
class PermutationAccount:
    """What became of the permutations of one graph; `remaining` are ops of their own in the final graph."""

    total: int = 0
    composed: int = 0
    cancelled: int = 0
    folded: int = 0
    fused: int = 0
    remaining: int = 0

    def __add__(self, other: PermutationAccount) -> PermutationAccount:
        return PermutationAccount(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


@dataclasses.dataclass
class PipelineReport:
    """What every rule did, which kernels were chosen, and how long it took in seconds."""

    rules: list[RuleReport]
    decisions: list[LayerDecision]
    permutations: PermutationAccount
    seconds: float


class Pipeline:
    """The rules in order.

    Args:
        kernels: see `ChooseKernels`; None leaves structured products as they are.
        disabled: names of rules to leave out.
        dump: folder to write the graph to, before the first rule and after each that changed it.
    """

    def __init__(self, *, kernels: Policy | None = "measure", disabled: Sequence[str] = (), dump: Path | None = None) -> None:
        known = [rule.__name__ for rule in RULES]
        for name in disabled:
            if name not in known:
                raise UnknownFieldError("pass", name, known)
        self._kernels, self._disabled, self._dump = kernels, frozenset(disabled), dump

    def uuid(self) -> str:
        """Identity of the rules and their options, for compiler caches."""
        return hashlib.sha256("/".join(rule.uuid() for rule in self._rules()).encode()).hexdigest()

    def run(self, facts: Context, *, first: RewriteRule | None = None) -> PipelineReport:
        """Apply the rules to `facts.module` in place."""
        start = time.perf_counter()
        rules = ([first] if first is not None else []) + self._rules()
        dumper = _Dumper(self._dump)
        dumper.write(facts.module, "captured")
        reports, total = [], _count_permutes(facts.module)
        removed: collections.Counter[str] = collections.Counter()
        for rule in rules:
            before = _count_permutes(facts.module)
            report = rule.run(facts)
            reports.append(report)
            removed[rule.effect] += before - _count_permutes(facts.module)
            if rule is first:
                total = _count_permutes(facts.module)
            logger.debug("%s: %d rewritten, %d refused", rule.name, report.rewritten, len(report.refusals))
            if report.rewritten:
                dumper.write(facts.module, rule.name)
        facts.module.graph.lint()
        facts.module.recompile()
        decisions = [d for rule in rules if isinstance(rule, ChooseKernels) for d in rule.decisions]
        return PipelineReport(reports, decisions, _account(removed, total, facts.module), time.perf_counter() - start)

    def _rules(self) -> list[RewriteRule]:
        rules: list[RewriteRule] = []
        for rule in RULES:
            if rule.__name__ in self._disabled or (rule is ChooseKernels and self._kernels is None):
                continue
            rules.append(ChooseKernels(self._kernels or "measure") if rule is ChooseKernels else rule())
        return rules


def run(
    graph_module: fx.GraphModule,
    spec: SpecLike | None = None,
    example_inputs: Sequence[object] | None = None,
    *,
    disabled: Sequence[str] = (),
    dump: str | os.PathLike[str] | None = None,
) -> PipelineReport:
    """Sparsify a traced model and place its permutations, in place.

    For graphs from `torch.fx.symbolic_trace`, `torch.export` (`program.module()`) and Dynamo. Only rules that need no values
    run, so the result can be trained, saved and changed like any other graph module; structured products stay `padst` ops,
    which run everywhere.

    Args:
        graph_module: the traced model.
        spec: what to make sparse; None if the graph holds sparse layers already.
        example_inputs: for a graph from Dynamo, the inputs that its backend received: its parameters are among them.
        disabled: names of rules to leave out.
        dump: folder for the graph before and after every rule.

    Raises:
        UnsupportedGraphError: no graph module, or `example_inputs` that do not fit it.
        PadstError: what `padst.sparsify` raises for a wrong specification; the graph is untouched.
    """
    if not isinstance(graph_module, fx.GraphModule):
        raise UnsupportedGraphError(
            f"passes.run takes a traced fx.GraphModule, not {type(graph_module).__name__}; use padst.sparsify for a module"
        )
    facts = Context(graph_module, _inputs(graph_module, example_inputs), inference=False)
    first = SparsifyLinears(spec, facts) if spec is not None else None
    pipeline = Pipeline(kernels=None, disabled=disabled, dump=None if dump is None else Path(dump))
    report = pipeline.run(facts, first=first)
    graph_module.delete_all_unused_submodules()
    return report


def _inputs(module: fx.GraphModule, example_inputs: Sequence[object] | None) -> dict[str, torch.Tensor]:
    if example_inputs is None:
        return {}
    placeholders = sum(node.op == "placeholder" for node in module.graph.nodes)
    if len(example_inputs) != placeholders:
        raise UnsupportedGraphError(f"the graph has {placeholders} inputs, but example_inputs has {len(example_inputs)}")
    return static_tensors(module.graph, list(example_inputs))


def _count_permutes(module: fx.GraphModule) -> int:
    return sum(is_call(node, PERMUTE) for node in module.graph.nodes)


def _account(removed: Mapping[str, int], total: int, module: fx.GraphModule) -> PermutationAccount:
    counts = {name: removed.get(name, 0) for name in ("composed", "cancelled", "folded", "fused")}
    return PermutationAccount(total=total, remaining=_count_permutes(module), **counts)


class _Dumper:
    """Writes readable graphs, numbered in the order in which they were made."""

    def __init__(self, folder: Path | None) -> None:
        self._folder, self._number = folder, 0
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._number = len(list(folder.glob("*.py")))

    def write(self, module: fx.GraphModule, label: str) -> None:
        """One file per call; also to the log at debug level (`TORCH_LOGS="+padst_compile.passes"`)."""
        if self._folder is None and not logger.isEnabledFor(logging.DEBUG):
            return
        text = module.graph.python_code("self").src
        logger.debug("graph after %s:\n%s", label, text)
        if self._folder is not None:
            (self._folder / f"{self._number:03d}_{label}.py").write_text(text)
            self._number += 1
