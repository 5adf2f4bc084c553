"""linear(x, diagonals, in=p, out=q)  ==  linear(x, blocks, in=p[s], out=t[q])

Diagonals that were chosen one by one may still lie side by side, or `step` apart all the way round. Read along that step they
are bands, which dense blocks hold with few zeros between two permutations `s` and `t`: see `kernels/diagonal/bands.py`. Whole
residue classes fill their blocks, as after `FoldDiagonals`, which knows them by the structure. It leaves the others to this
rule.

Holds for the present offsets alone, which are watched. Expects `PlacePermutations` behind it, to which `s` and `t` are tables
like any others. Folds where the cost model expects blocks to be faster with their zeros, and measurements, where they are
allowed, agree.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import fx

from padst_compile.autotune.cost_model import layer_seconds
from padst_compile.autotune.effort import Effort
from padst_compile.autotune.entry import MARGIN
from padst_compile.autotune.kernel_choice import KernelChoice, compare_kernels
from padst_compile.autotune.machine import machine
from padst_compile.autotune.problem import Kernel, LayerProblem, token_bucket
from padst_compile.kernels import dispatch, triton_support
from padst_compile.kernels.diagonal.band_search import Fold, count_blocks, few_enough, folds
from padst_compile.kernels.diagonal.bands import band_tables
from padst_compile.passes.base import RewriteRule
from padst_compile.passes.context import Context
from padst_compile.passes.fold_diagonals import FOLDED_ACTIVE, made, multiply_blocks
from padst_compile.passes.graph import STRUCTURED_LINEAR, argument, fake, is_call, rows
from padst_compile.passes.trial import Trial
from padst_compile.permutation import compose
from padst_compile.structures import Diagonal, Shape, Structure, parse

_aten = torch.ops.aten


class FoldBands(RewriteRule):
    """Makes block products of diagonals whose offsets lie in runs.

    Args:
        measure: whether measurements may decide.
        effort: how much may be measured for that.
    """

    def __init__(self, *, measure: bool = False, effort: Effort = "quick") -> None:
        self.measure, self.effort = measure, effort
        self._chosen: dict[fx.Node, Fold] = {}

    def uuid(self) -> str:
        """The rule's identity, with its options."""
        return f"{super().uuid()}-{self.measure}-{self.effort}"

    def matches(self, node: fx.Node) -> bool:
        """A product of diagonals."""
        return is_call(node, STRUCTURED_LINEAR) and isinstance(parse(argument(node, "structure")), Diagonal)

    def why_not(self, node: fx.Node, facts: Context) -> str | None:
        """The offsets must stay, lie close enough, and blocks be faster with the zeros between them."""
        if not facts.inference:
            return "training: the offsets may move"
        if fake(node) is None or fake(argument(node, "x")) is None:
            return "capture recorded no shapes"
        if not all(map(facts.is_static, [argument(node, "values"), *argument(node, "topology")])):
            return "the weights are computed from the inputs"
        product = _Product(node, facts)
        if product.kernel() == "registered":
            return "a registered kernel multiplies diagonals"
        fold = product.best()
        if fold is None:
            return "the offsets form no bands that blocks hold with few zeros"
        blocks = f"blocks, which would store {fold.stored / product.values.numel():.1f} times the values,"
        if not product.looks_faster(fold):
            return f"{blocks} would not be faster"
        if self.measure and not product.is_faster(fold, self.effort):
            return f"{blocks} were measured to be no faster"
        self._chosen[node] = fold
        return None

    def rewrite(self, node: fx.Node, facts: Context) -> None:
        """Compute tables and values from those of the diagonals."""
        fold, product = self._chosen.pop(node), _Product(node, facts)
        bands, blocks, shape, (offsets,) = fold.bands, fold.bands.blocks, product.shape, argument(node, "topology")
        facts.assume(offsets)
        sizes = shape.out_features, shape.in_features, bands.step, bands.shift, blocks.rows, blocks.columns
        count = fold.stored // (blocks.rows * blocks.columns)
        node.meta[FOLDED_ACTIVE] = product.values.numel()
        with node.graph.inserting_before(node):
            tables = made(node, facts, torch.ops.padst.diagonal_bands.default, offsets, *sizes, count)
            flat = made(node, facts, _aten.reshape.default, argument(node, "values"), [-1])
            padded = made(node, facts, _aten.constant_pad_nd.default, flat, [0, 1])
            reads, writes = bands.moves_inputs(shape), bands.moves_outputs(shape)
            multiply_blocks(node, facts, blocks, tables, padded, reads=reads, writes=writes)


class _Product:
    """One product of diagonals, and what it would be as one of blocks."""

    def __init__(self, node: fx.Node, facts: Context) -> None:
        result, x = fake(node), fake(argument(node, "x"))
        assert result is not None
        assert x is not None
        self.node, self.facts = node, facts
        self.dtype, self.device = result.dtype, result.device
        self.tokens = token_bucket(rows(x), self.device.type)
        self.shape = Shape(argument(node, "out_features"), int(x.shape[-1]))
        self.structure = parse(argument(node, "structure"))
        self.values = facts.value(argument(node, "values"))
        self.offsets = facts.value(argument(node, "topology")[0])

    def kernel(self, structure: Structure | None = None) -> Kernel:
        """What would multiply a structure here, by default its own."""
        return dispatch.kernel_for(self.structure if structure is None else structure, self.device, self.dtype)

    def best(self) -> Fold | None:
        """The fold into few blocks that the cost model likes best, with the number of its values as it is."""
        if self.structure.check_topology((self.offsets,), self.shape) is not None:
            return None
        usable = [fold for fold in folds(self.offsets, self.shape) if self.kernel(fold.bands.blocks) != "aten"]
        if not usable:
            return None
        bands = min(usable, key=lambda fold: self._seconds(fold.bands.blocks, fold.stored)).bands
        stored = count_blocks(bands, self.offsets, self.shape) * bands.blocks.rows * bands.blocks.columns
        return Fold(bands, stored) if few_enough(stored, self.values.numel(), self.shape) else None

    def looks_faster(self, fold: Fold) -> bool:
        """Whether the cost model expects more of blocks."""
        alone = self._seconds(self.structure, self.values.numel())
        return self._seconds(fold.bands.blocks, fold.stored) * (1 + MARGIN) < alone

    def is_faster(self, fold: Fold, effort: Effort) -> bool:
        """Whether blocks gain more over the dense product than diagonals do, as far as both were measured."""
        blocks, diagonals = (_gain(self._compared(trial, effort)) for trial in (self._folded(fold), self._as_it_is()))
        return blocks is None or diagonals is None or blocks > diagonals * (1 + MARGIN)

    def _seconds(self, structure: Structure, stored: int) -> float:
        return layer_seconds(self._problem(structure, stored), self.kernel(structure), machine(self.device.type))

    def _problem(self, structure: Structure, stored: int, *tables: torch.Tensor | None) -> LayerProblem:
        permuted = "+".join(side for side, table in zip(("in", "out"), tables, strict=False) if table is not None)
        return LayerProblem(
            structure.to_string(), self.shape.in_features, self.shape.out_features, stored, self.tokens,
            str(self.dtype).removeprefix("torch."), permuted, False, self.device.type, (self.kernel(structure), "dense"),
            "" if argument(self.node, "bias") is None else "bias",
            precision=triton_support.precision_on(self.device, self.dtype),
        )  # fmt: skip

    def _compared(self, trial: Trial, effort: Effort) -> KernelChoice:
        problem = self._problem(trial.structure, trial.values.numel(), *trial.tables)
        return compare_kernels(problem, lambda: trial.runs(self.tokens, problem.kernels, training=False), effort)

    def _as_it_is(self) -> Trial:
        into, out = self._static("input_permutation"), self._static("output_permutation")
        values, bias = self.values.to(self.dtype), self._static("bias")
        return Trial(self.structure, self.shape, values, (self.offsets,), bias, (into, out))

    def _folded(self, fold: Fold) -> Trial:
        """With all the tables that it begins with: placement may take them away."""
        trial, bands, blocks = self._as_it_is(), fold.bands, fold.bands.blocks
        tables, (into, out) = band_tables(bands, self.offsets, self.shape), trial.tables
        before, behind = tables.input_permutation, tables.output_permutation
        if bands.moves_inputs(self.shape):
            into = before if into is None else compose(into, before)
        if bands.moves_outputs(self.shape):
            out = behind if out is None else compose(behind, out)
        values = tables.blocks(trial.values, blocks)
        return dataclasses.replace(trial, structure=blocks, values=values, topology=tables.topology, tables=(into, out))

    def _static(self, name: str) -> torch.Tensor | None:
        """The present value of an argument, in the product's dtype where it is floating; None where there is none."""
        node = argument(self.node, name)
        if node is None or not self.facts.is_static(node):
            return None
        value = self.facts.value(node)
        return value.to(self.dtype) if value.is_floating_point() else value


def _gain(choice: KernelChoice) -> float | None:
    """By how much the sparse kernel was faster than the dense product, which ran beside it."""
    if choice.sparse_seconds is None or choice.dense_seconds is None:
        return None
    return choice.dense_seconds / choice.sparse_seconds
