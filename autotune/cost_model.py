"""A roofline: seconds = launch + max(operations / rate, bytes / bandwidth).

A product runs at the rate of the machine's arithmetic or at that of its memory, whichever is the slower. The model decides
between sparse and dense where nothing may be measured, and ranks tiles, so that few of them have to be. The formulas are
`sympy` expressions; `print(DENSE)` shows one.

    T tokens   K inputs   N outputs   A stored weights   R rows of a block   e bytes of an element
    t tokens, n outputs and d inputs of one tile
    F operations per second   V the same without matrix units   U units
    B bytes per second of memory   C of the cache   S bytes of the cache   L seconds of a launch

The efficiencies are those that benchmarks/results/cpu-layers.json shows, rounded.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import sympy
import torch

from padst_compile.autotune.machine import Machine
from padst_compile.autotune.problem import Kernel, LayerProblem
from padst_compile.kernels.launch import Problem, Tile
from padst_compile.kernels.native.tiles import usual_tokens
from padst_compile.structures import Block, parse

T, K, N, A, R, e, t, n, d, F, V, U, B, C, S, L = sympy.symbols("T K N A R e t n d F V U B C S L", positive=True)

_BLOCK_EFFICIENCY = sympy.Rational(3, 4) * R / (R + 16)
_GATHER_EFFICIENCY = sympy.Rational(1, 3)
_BATCHED_EFFICIENCY = sympy.Rational(3, 10)  # gather and batched product through ATen, relative to a block kernel

_SPARSE_BYTES = e * (T * K + A + T * N)

DENSE = L + sympy.Max(2 * T * K * N / F, e * (T * K + K * N + T * N) / B)
BLOCK = L + sympy.Max(2 * T * A / (_BLOCK_EFFICIENCY * F), _SPARSE_BYTES / B)
BATCHED = L + sympy.Max(2 * T * A / (_BATCHED_EFFICIENCY * _BLOCK_EFFICIENCY * F), 3 * _SPARSE_BYTES / B)
REGISTERED = L + sympy.Max(2 * T * A / (F / 2), _SPARSE_BYTES / B)
"""A kernel of somebody else's, of which nothing is known: half of the machine's rate."""
GATHER = L + sympy.Max(2 * T * A / (_GATHER_EFFICIENCY * V), _SPARSE_BYTES / B)
UNPACKED = DENSE + 2 * e * K * N / B
"""The product through a dense weight that is made anew for each call."""
_TWO_OF_FOUR_RATE = sympy.Rational(4, 3)  # twice by the data sheet; 1.2 to 1.5 times was published for large products
TWO_OF_FOUR = L + sympy.Max(2 * T * K * N / (_TWO_OF_FOUR_RATE * F), e * (T * K + sympy.Rational(9, 16) * K * N + T * N) / B)
"""On sparse tensor cores, which multiply half of the dense weight, and read two bits for each number of that."""
TWO_OF_FOUR_GATHERED = TWO_OF_FOUR + L + 2 * e * T * K / B
"""The same behind a gather of the inputs."""

_TILES = sympy.ceiling(T / t)
_SCRATCH = t * (e * K + 4 * N) + e * A
_OVERFLOW = sympy.Max(0, _SCRATCH - S)
CPU_TILE = L + 2 * T * A * (1 + F / V / t) / (_BLOCK_EFFICIENCY * F) + _TILES * (e * A / C + _OVERFLOW / (2 * B))
"""A block product on a CPU. Every tile of tokens reads all weights from the cache, and what does not fit into it from the next
one, at about twice the memory's rate. A call of the micro-kernel costs as much as a token, and more where matrix units make
tokens cheap."""

_PROGRAMS = sympy.ceiling(T / t) * sympy.ceiling(N / n)
_DEPTH = A / N  # stored weights of one output
GPU_TILE = L + sympy.Max(
    sympy.ceiling(_PROGRAMS / U) * U * 2 * t * n * _DEPTH / F, _PROGRAMS * e * _DEPTH * (t + n) / C, _SPARSE_BYTES / B
)
"""A sparse product on a GPU: whole waves of programs, each of which reads its part of the inputs through the cache."""

GRADIENT_TILE = L + sympy.Max(2 * T * A / F, A / (d * n) * e * T * (d + n) / C, _SPARSE_BYTES / B)
"""The gradient of the weights on a GPU: a program has `d * n` of them and reads `d` inputs and `n` outputs of every token."""

_SYMBOLS = (T, K, N, A, R, e, t, n, d, F, V, U, B, C, S, L)


def layer_seconds(problem: LayerProblem, kernel: Kernel, machine: Machine) -> float:
    """What a layer takes on one of its kernels; while training with both gradients, each a product of the same size."""
    seconds = _function(_formula(problem, kernel))(*_values(problem, machine, tile=None, kernel=kernel))
    return 3 * seconds if problem.training else seconds


def tile_seconds(problem: Problem, tile: Tile, machine: Machine) -> float:
    """What a launch takes with a tile; the CPU's kernels leave a tile without outputs."""
    if not tile.outputs:
        tile = dataclasses.replace(tile, tokens=tile.tokens or usual_tokens(problem))
        return _function(CPU_TILE)(*_values(problem, machine, tile))
    formula = GRADIENT_TILE if problem.kernel.endswith("value_gradient") else GPU_TILE
    return _function(formula)(*_values(problem, machine, tile))


def ranked(problem: Problem, tiles: Sequence[Tile], machine: Machine) -> list[Tile]:
    """The tiles, the fastest by the model first; those that it cannot tell apart stay in their order."""
    return sorted(tiles, key=lambda tile: tile_seconds(problem, tile, machine))


def _formula(problem: LayerProblem, kernel: Kernel) -> sympy.Expr:
    """Of the product, and of each gradient: all compute active weights alone, or all the dense product."""
    if kernel == "dense":
        return DENSE
    if kernel == "registered":
        return REGISTERED
    if kernel == "cusparselt":
        return TWO_OF_FOUR_GATHERED if "in" in problem.permuted else TWO_OF_FOUR
    if isinstance(parse(problem.structure), Block):
        return BATCHED if kernel == "aten" else BLOCK
    return UNPACKED if kernel == "aten" else GATHER


def _values(
    problem: LayerProblem | Problem, machine: Machine, tile: Tile | None, kernel: Kernel = "triton"
) -> tuple[float, ...]:
    structure = parse(problem.structure)
    rows = structure.rows if isinstance(structure, Block) else 1
    rate = _matrix_rate(problem, machine, kernel)
    if tile is not None and tile.variant == "gather":  # of single weights, which no matrix unit multiplies
        rate = machine.vector_rate
    size: tuple[float, ...] = (problem.tokens, problem.in_features, problem.out_features, problem.active, rows)
    cut = (1, 1, 1) if tile is None else (max(tile.tokens, 1), max(tile.outputs, 1), max(tile.depth, 1))
    rates = (rate, machine.vector_rate, machine.units)
    memory = (machine.bandwidth, machine.cache_bandwidth, machine.cache_bytes, machine.launch_seconds)
    return (*size, getattr(torch, problem.dtype).itemsize, *cut, *rates, *memory)


def _matrix_rate(problem: LayerProblem | Problem, machine: Machine, kernel: Kernel) -> float:
    """Of products in the problem's dtype and precision; only Triton's kernels split products into three."""
    if problem.precision == "tf32x3" and kernel == "triton":
        return machine.rate("tf32") / 3
    return machine.rate("tf32" if problem.precision == "tf32" else problem.dtype)


@functools.cache
def _function(formula: sympy.Expr) -> Callable[..., float]:
    return sympy.lambdify(_SYMBOLS, formula, modules="math")  # type: ignore[no-any-return]  # sympy is not typed
