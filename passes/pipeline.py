"""The passes in order, over one graph: what `torch.compile(backend="padst")` runs, and what a traced model can be given."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, get_args, overload

import torch
from torch import fx

from padst_compile.autotune.effort import Effort
from padst_compile.errors import NameTakenError, RegistrationError, UnknownFieldError, UnsupportedGraphError
from padst_compile.passes.absorb_bias import AbsorbBias
from padst_compile.passes.base import Effect, Pass, RuleReport
from padst_compile.passes.cancel_permutations import CancelPermutations
from padst_compile.passes.choose_kernels import ChooseKernels, LayerDecision, Policy
from padst_compile.passes.compose_permutations import ComposePermutations
from padst_compile.passes.context import Context, static_tensors
from padst_compile.passes.fold_bands import FoldBands
from padst_compile.passes.fold_diagonals import FoldDiagonals
from padst_compile.passes.fold_into_norm import FoldIntoNorm
from padst_compile.passes.fuse_activation import FuseActivation
from padst_compile.passes.fuse_gate import FuseGate
from padst_compile.passes.fuse_input_permutation import FuseInputPermutation
from padst_compile.passes.fuse_mlp import FuseMlp
from padst_compile.passes.fuse_output_permutation import FuseOutputPermutation
from padst_compile.passes.fuse_residual import FuseResidual
from padst_compile.passes.graph import PERMUTE, is_call, layer_name
from padst_compile.passes.hand_over_feature_major import HandOverFeatureMajor
from padst_compile.passes.interleave_blocks import InterleaveBlocks
from padst_compile.passes.keep_feature_major import KeepFeatureMajor
from padst_compile.passes.place_permutations import PlacePermutations
from padst_compile.passes.recognize_gelu import RecognizeGelu
from padst_compile.passes.remove_dropout import RemoveDropout
from padst_compile.passes.sparsify_linears import SparsifyLinears
from padst_compile.passes.split_gates import SplitGates
from padst_compile.passes.tanh_gate import TanhGate
from padst_compile.passes.unfold_patches import UnfoldPatches
from padst_compile.passes.widen_values import WidenValues
from padst_compile.registered import record, same_origin
from padst_compile.spec import SpecLike

logger = logging.getLogger(__name__)

Check: TypeAlias = "Callable[[str, fx.GraphModule, fx.GraphModule], None]"

RULES: tuple[type[Pass], ...] = (
    ComposePermutations,
    FoldIntoNorm,
    CancelPermutations,
    FuseInputPermutation,
    FuseOutputPermutation,
    FoldDiagonals,
    FoldBands,
    PlacePermutations,
    AbsorbBias,
    UnfoldPatches,
    RemoveDropout,
    RecognizeGelu,
    ChooseKernels,
    SplitGates,
    FuseActivation,
    FuseGate,
    FuseResidual,
    KeepFeatureMajor,
    InterleaveBlocks,
    WidenValues,
    FuseMlp,
    HandOverFeatureMajor,
    TanhGate,
)


P = TypeVar("P", bound=Pass)

_registered: list[tuple[type[Pass], str]] = []  # passes of others, and the names of those that each stands before


@overload
def register_pass(rule: type[P], *, before: str = ...) -> type[P]: ...


@overload
def register_pass(*, before: str = ...) -> Callable[[type[P]], type[P]]: ...


def register_pass(
    rule: type[P] | None = None, *, before: str = ChooseKernels.__name__
) -> type[P] | Callable[[type[P]], type[P]]:
    """Add a pass of your own to all compilations. A decorator, with or without arguments.

    Args:
        rule: a subclass of `padst_compile.passes.base.RewriteRule` or `Pass` that is made without arguments. Its class name is
            the pass's name, in `explain` and in `options={"disable": [...]}`.
        before: name of the pass that it runs before, one of ours or one registered earlier. Until "ChooseKernels", sparse
            layers are `padst::structured_linear`.

    Returns:
        The class itself.

    Raises:
        NameTakenError: another pass has its name. The same class defined again, as in a notebook, replaces itself.
        RegistrationError: it lacks part of the interface; the message says which.
        UnknownFieldError: no such pass is called `before`.
    """
    if rule is None:
        return lambda later: register_pass(later, before=before)
    _check_registrable(rule)
    name = rule.__name__
    place = next((i for i, (other, _) in enumerate(_registered) if other.__name__ == name), len(_registered))
    known = [other.__name__ for other in (*RULES, *(other for other, _ in _registered[:place]))]
    if before not in known:
        raise UnknownFieldError("pass", before, known)
    taken = next((other for other in rules() if other.__name__ == name), rule)
    if not same_origin(taken, rule):
        raise NameTakenError(f"a pass {name!r} is there already, {taken!r}; rename the class")
    _registered[place : place + 1] = [(rule, before)]
    record("pass", name, rule)
    return rule


def rules() -> tuple[type[Pass], ...]:
    """All passes in order, those that others registered among them."""
    ordered = list(RULES)
    for rule, before in _registered:
        ordered.insert(next(i for i, other in enumerate(ordered) if other.__name__ == before), rule)
    return tuple(ordered)


def _check_registrable(rule: Any) -> None:
    name = getattr(rule, "__name__", repr(rule))
    if not (isinstance(rule, type) and issubclass(rule, Pass)):
        raise RegistrationError(f"{name} is no pass: it must be a subclass of padst_compile.passes.base.RewriteRule or Pass")
    if rule.__abstractmethods__:
        raise RegistrationError(f"pass {name} does not define {', '.join(sorted(rule.__abstractmethods__))}")
    if rule.effect not in get_args(Effect):
        raise RegistrationError(f"pass {name} has effect {rule.effect!r}; choose from {', '.join(get_args(Effect))}")
    try:
        rule()
    except TypeError as error:
        raise RegistrationError(f"pass {name} is made without arguments, which fails: {error}") from error


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
    """What every rule did, which kernels were chosen, and how long it took in seconds.

    Attributes:
        ended: for each permutation that is no operation any more, its layer and what the rule does that ended it.
    """

    rules: list[RuleReport]
    decisions: list[LayerDecision]
    permutations: PermutationAccount
    seconds: float
    ended: list[tuple[str, Effect]] = dataclasses.field(default_factory=list)


class Pipeline:
    """The rules in order.

    Args:
        kernels: see `ChooseKernels`; None leaves structured products as they are.
        autotune: how much may be measured to choose them.
        disabled: names of rules to leave out.
        dump: folder to write the graph to, before the first rule and after each that changed it.
        check: called with a rule's name and the graphs before and after it, for each rule that changed the graph.
    """

    def __init__(
        self,
        *,
        kernels: Policy | None = "measure",
        autotune: Effort = "quick",
        disabled: Sequence[str] = (),
        dump: Path | None = None,
        check: Check | None = None,
    ) -> None:
        known = [rule.__name__ for rule in rules()]
        for name in disabled:
            if name not in known:
                raise UnknownFieldError("pass", name, known)
        self._kernels, self._autotune, self._disabled = kernels, autotune, frozenset(disabled)
        self._dump, self._check = dump, check

    def uuid(self) -> str:
        """Identity of the rules and their options, for compiler caches."""
        return hashlib.sha256("/".join(rule.uuid() for rule in self._rules()).encode()).hexdigest()

    def run(self, facts: Context, *, first: Pass | None = None) -> PipelineReport:
        """Apply the rules to `facts.module` in place."""
        start = time.perf_counter()
        chosen = ([first] if first is not None else []) + self._rules()
        dumper = _Dumper(self._dump)
        dumper.write(facts.module, "captured")
        checker = _Checker(self._check, facts.module)
        reports, total = [], _count_permutes(facts.module)
        removed: collections.Counter[str] = collections.Counter()
        ended: list[tuple[str, Effect]] = []
        for rule in chosen:
            before = _permuted_layers(facts.module)
            report = rule.run(facts)
            reports.append(report)
            gone = before - _permuted_layers(facts.module)
            ended += [(layer, rule.effect) for layer in gone.elements()]
            from_kernels = min(report.tables_removed, removed["fused"])  # one permutation may have become two tables
            removed[rule.effect] += before.total() - _count_permutes(facts.module) + from_kernels
            removed["fused"] -= from_kernels
            if rule is first:
                total = _count_permutes(facts.module)
            logger.debug("%s: %d rewritten, %d refused", rule.name, report.rewritten, len(report.refusals))
            if report.rewritten:
                dumper.write(facts.module, rule.name)
                checker.compare(facts.module, rule.name)
        facts.module.graph.lint()
        facts.module.recompile()
        decisions = [d for rule in chosen if isinstance(rule, ChooseKernels) for d in rule.decisions]
        account = _account(removed, total, facts.module)
        return PipelineReport(reports, decisions, account, time.perf_counter() - start, ended)

    def _rules(self) -> list[Pass]:
        chosen: list[Pass] = []
        for rule in rules():
            choosing = rule in (ChooseKernels, FuseMlp)
            if rule.__name__ in self._disabled or (choosing and self._kernels is None):
                continue
            if rule in (FoldBands, HandOverFeatureMajor):
                chosen.append(rule(measure=self._kernels == "measure", effort=self._autotune))
                continue
            chosen.append(rule(self._kernels, self._autotune) if choosing else rule())  # type: ignore[call-arg]  # of those two
        return chosen


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


def _permuted_layers(module: fx.GraphModule) -> collections.Counter[str]:
    """The layers whose permutations are operations of their own, and how many."""
    return collections.Counter(layer_name(node) for node in module.graph.nodes if is_call(node, PERMUTE))


def _count_permutes(module: fx.GraphModule) -> int:
    return sum(is_call(node, PERMUTE) for node in module.graph.nodes)


def _account(removed: Mapping[str, int], total: int, module: fx.GraphModule) -> PermutationAccount:
    counts = {name: removed.get(name, 0) for name in ("composed", "cancelled", "folded", "fused")}
    return PermutationAccount(total=total, remaining=_count_permutes(module), **counts)


class _Checker:
    """Hands a check the graph before and after every rule."""

    def __init__(self, check: Check | None, module: fx.GraphModule) -> None:
        self._check = check
        self._before = module if check is None else _copy(module)

    def compare(self, module: fx.GraphModule, rule: str) -> None:
        """Called after each rule that changed the graph."""
        if self._check is not None:
            after = _copy(module)
            self._check(rule, self._before, after)
            self._before = after


def _copy(module: fx.GraphModule) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    return fx.GraphModule(module, graph)


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
