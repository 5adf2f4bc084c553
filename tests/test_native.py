"""The C++ kernels against float64 references, and the loader that builds them."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch

from padst_compile.kernels import native
from padst_compile.kernels.native import minimax
from padst_compile.structures.base import Shape, Structure
from padst_compile.structures.block import Block
from padst_compile.structures.diagonal import Diagonal
from padst_compile.structures.nm import NM
from padst_compile.testing.native_products import ACTIVATIONS, DTYPES, Layer

STRUCTURES: tuple[Structure, ...] = (
    Block(64),
    Block((5, 7)),
    Block((32, 16)),
    NM(1, 10),
    NM(2, 7),
    NM(2, 4, vector=6),
    Diagonal(),
)
SHAPES = (
    Shape(96, 64),
    Shape(64, 96),
    Shape(70, 70),
    Shape(33, 131),
    Shape(131, 33),
    Shape(7, 300),
    Shape(300, 7),
    Shape(301, 300),
)


needs_native = pytest.mark.skipif(not native.load(), reason=f"no native kernels: {native.unavailable_reason()}")


def fits(structure: Structure, shape: Shape) -> bool:
    """Whether `structure` can be built on `shape`."""
    try:
        structure.check(shape, 0.6, "layer")
    except ValueError:
        return False
    return True


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fills whatever `at::empty` returns with NaN."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


@needs_native
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda s: s.to_string())
class TestAccuracy:
    def test_permutations_sizes_and_token_counts(self, structure: Structure, dtype: torch.dtype) -> None:
        for shape in (shape for shape in SHAPES if fits(structure, shape)):
            layer = Layer.random(structure, shape, dtype)
            for extras in itertools.product((False, True), repeat=3):
                for tokens in (0, 1, 3, 17, 70):
                    layer.with_extras(*extras).check(torch.randn(tokens, shape.in_features).to(dtype))

    @pytest.mark.parametrize("threads", [1, 2, 3])
    def test_thread_counts(self, structure: Structure, dtype: torch.dtype, threads: int) -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            for shape, tokens in itertools.product((Shape(300, 131), Shape(131, 300)), (2, 64, 200)):
                Layer.random(structure, shape, dtype).with_extras(True, True, True).check(
                    torch.randn(tokens, shape.in_features).to(dtype)
                )
        finally:
            torch.set_num_threads(before)

    def test_streamed_outputs(self, structure: Structure, dtype: torch.dtype) -> None:
        shape, tokens = Shape(1024, 96), 2500
        Layer.random(structure, shape, dtype).with_extras(True, True, True).check(torch.randn(tokens, 96).to(dtype))

    def test_leading_dimensions_and_strides(self, structure: Structure, dtype: torch.dtype) -> None:
        layer = Layer.random(structure, Shape(70, 70), dtype).with_extras(True, True, True)
        for x in (
            torch.randn(70),
            torch.randn(2, 3, 4, 70),
            torch.randn(5, 0, 70),
            torch.randn(70, 9).T,
            torch.randn(9, 140)[:, ::2],
        ):
            layer.check(x.to(dtype))

    def test_does_not_read_past_a_row(self, structure: Structure, dtype: torch.dtype) -> None:
        # The last row of the buffer is followed by NaN, and NaN times a padded zero weight would show.
        shape = Shape(70, 67)
        buffer = torch.full((4, 67), float("nan")).to(dtype)
        buffer[:3] = torch.randn(3, 67).to(dtype)
        Layer.random(structure, shape, dtype).check(buffer[:3])


@needs_native
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda s: s.to_string())
class TestEpilogue:
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_activation_gate_and_residual(self, structure: Structure, dtype: torch.dtype, activation: str) -> None:
        for shape in (shape for shape in (Shape(70, 70), Shape(33, 131), Shape(300, 7)) if fits(structure, shape)):
            layer = dataclasses.replace(Layer.random(structure, shape, dtype), activation=activation)
            for tokens, (permute_out, add, gated) in itertools.product((0, 3, 70), itertools.product((False, True), repeat=3)):
                residual = torch.randn(tokens, shape.out_features).to(dtype) if add else None
                gate = torch.randn(tokens, shape.out_features).to(dtype) if gated else None
                layer = dataclasses.replace(layer.with_extras(tokens != 3, False, permute_out), residual=residual, gate=gate)
                layer.check(torch.randn(tokens, shape.in_features).to(dtype) * 4)

    @pytest.mark.parametrize("threads", [1, 3])
    def test_few_tokens(self, structure: Structure, dtype: torch.dtype, threads: int) -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            layer = Layer.random(structure, Shape(131, 300), dtype)
            for tokens, permute_out in itertools.product(range(1, 10), (False, True)):
                residual, gate = torch.randn(2, tokens, 131).to(dtype)
                layer = layer.with_extras(True, True, permute_out)
                layer = dataclasses.replace(layer, activation="gelu", residual=residual, gate=gate)
                layer.check(torch.randn(tokens, 300).to(dtype))
        finally:
            torch.set_num_threads(before)

    def test_strided_gate_and_residual(self, structure: Structure, dtype: torch.dtype) -> None:
        layer = Layer.random(structure, Shape(70, 70), dtype)
        for residual in (torch.randn(70, 9).T, torch.randn(9, 140)[:, ::2], torch.randn(1, 70).expand(9, 70)):
            layer = dataclasses.replace(layer, activation="silu", residual=residual.to(dtype), gate=residual.to(dtype))
            layer.check(torch.randn(70, 9).T.to(dtype))


def multiply_by_one(structure: Structure, activation: str, dtype: torch.dtype) -> Layer:
    """A layer 64 -> 64 that leaves the activation alone."""
    topology = structure.choose(torch.eye(64), 63 / 64)
    return Layer(structure, Shape(64, 64), structure.pack(torch.eye(64), topology).to(dtype), topology, activation=activation)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
class TestActivations:
    @pytest.mark.parametrize("structure", [Block(1), Diagonal()], ids=lambda s: s.to_string())
    def test_accuracy(self, name: str, dtype: torch.dtype, structure: Structure) -> None:
        near, far = torch.linspace(-20, 20, 64 * 4000), torch.logspace(-37, 36, 64 * 500)
        x = torch.cat([near, far, -far]).to(dtype)
        x = x[x.isfinite()]
        x = x[: len(x) // 64 * 64].reshape(-1, 64)
        y, wide, activation = multiply_by_one(structure, name, dtype)(x), x.double(), ACTIVATIONS[name]
        exact, rounding = activation.exact(wide), torch.finfo(dtype)
        bound = activation.error(wide)
        bound = bound + (exact.abs() + bound) * rounding.eps / 2 + rounding.smallest_normal * rounding.eps
        assert bool(((y.double() - exact).abs() <= bound).all())

    def test_limits(self, name: str, dtype: torch.dtype) -> None:
        x = torch.tensor([[float("inf")], [float("nan")], [0.0], [1e4]]).to(dtype).expand(4, 64)
        assert torch.equal(multiply_by_one(Diagonal(), name, dtype)(x).nan_to_num(1.0, 2.0), x.nan_to_num(1.0, 2.0))

    def test_far_arguments_give_no_subnormal_numbers(self, name: str, dtype: torch.dtype) -> None:
        x = -torch.linspace(8, 200, 64 * 500).to(dtype).reshape(-1, 64)
        y = multiply_by_one(Diagonal(), name, torch.float32)(x.float())
        assert not bool(((y != 0) & (y.abs() < torch.finfo(torch.float32).smallest_normal)).any())


@needs_native
@pytest.mark.usefixtures("poisoned")
class TestHandfulsOfTokens:
    """Of N:M and diagonals: vectors hold outputs there, not tokens."""

    STRUCTURES = (NM(1, 16), NM(3, 17), NM(1, 32), NM(1, 40), NM(1, 8, vector=16), NM(2, 9, vector=20), Diagonal())

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("structure", STRUCTURES, ids=lambda s: s.to_string())
    def test_sizes_that_no_vector_divides(self, structure: Structure, dtype: torch.dtype) -> None:
        for shape in (Shape(64, 128), Shape(131, 300), Shape(300, 131), Shape(7, 300), Shape(2100, 70)):
            layer = Layer.random(structure, shape, dtype, 0.9) if fits(structure, shape) else None
            for tokens, extras in itertools.product((1, 5, 6, 7), (False, True)):
                if layer is not None:
                    layer.with_extras(extras, extras, extras).check(torch.randn(tokens, shape.in_features).to(dtype))

    @pytest.mark.parametrize("structure", [NM(1, 16), NM(1, 20), NM(1, 8, vector=16)], ids=lambda s: s.to_string())
    def test_inputs_that_no_weight_reads_do_not_matter(self, structure: NM) -> None:
        layer = Layer.random(structure, Shape(40, 4 * structure.m), torch.float32)
        x = torch.full((3, layer.shape.in_features), float("nan"))
        x[:, 3 :: structure.m] = torch.randn(3, 4)
        layer = dataclasses.replace(layer, topology=(torch.full_like(layer.topology[0], 3),))
        assert layer(x).isfinite().all()


def to_panels(x: torch.Tensor) -> torch.Tensor:
    """Tokens [..., features] as feature-major panels, with NaN for tokens that the last one lacks."""
    rows, width = x.reshape(-1, x.shape[-1]), torch.ops.padst_native.panel_tokens()
    padded = torch.nn.functional.pad(rows, (0, 0, 0, -rows.shape[0] % width), value=float("nan"))
    return padded.reshape(-1, width, x.shape[-1]).transpose(1, 2).contiguous()


def from_panels(panels: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
    """The reverse, for tokens of these sizes."""
    rows = panels.transpose(1, 2).reshape(-1, panels.shape[1])[: math.prod(sizes)]
    return rows.reshape(*sizes, panels.shape[1])


def among_many(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    """The result for x when more tokens are multiplied with it: a handful alone is added up in another order."""

    def repeated(rows: torch.Tensor | None) -> torch.Tensor | None:
        return None if rows is None else torch.cat([rows.reshape(-1, rows.shape[-1])] * 8)

    tokens, sizes = math.prod(x.shape[:-1]), (*x.shape[:-1], layer.shape.out_features)
    many = torch.cat([x.reshape(-1, x.shape[-1])] * 8)
    layer = dataclasses.replace(layer, gate=repeated(layer.gate), residual=repeated(layer.residual))
    return layer(many)[:tokens].reshape(sizes)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("structure", [NM(1, 10), NM(2, 4, vector=6), Diagonal()], ids=lambda s: s.to_string())
@pytest.mark.parametrize("threads", [1, 3])
class TestPanels:
    @pytest.mark.usefixtures("poisoned_memory")
    def test_panels_hold_what_tokens_would(self, structure: Structure, dtype: torch.dtype, threads: int) -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            for shape in (Shape(70, 54), Shape(54, 70)):
                layer = Layer.random(structure, shape, dtype).with_extras(True, True, True)
                layer = dataclasses.replace(layer, activation="gelu")
                for sizes in ((), (0,), (1,), (2, 9), (64,), (3, 50), (200,)):
                    self.compare(layer, torch.randn(*sizes, shape.in_features).to(dtype))
        finally:
            torch.set_num_threads(before)

    def compare(self, layer: Layer, x: torch.Tensor) -> None:
        sizes, expected = x.shape[:-1], among_many(layer, x)
        assert torch.equal(layer(to_panels(x), panels_of=sizes), expected)
        assert torch.equal(from_panels(layer(x, to_panels=True), sizes), expected)
        assert torch.equal(from_panels(layer(to_panels(x), panels_of=sizes, to_panels=True), sizes), expected)
        added = dataclasses.replace(layer, residual=torch.randn(expected.shape).to(expected.dtype))
        assert torch.equal(added(to_panels(x), panels_of=sizes), among_many(added, x))
        # Not below one: a subnormal product is rounded to zero by some instructions, and kept by others.
        gate = (1 + torch.rand(expected.shape)).to(expected.dtype)
        gated, gated_panels = (dataclasses.replace(layer, gate=form) for form in (gate, to_panels(gate)))
        assert torch.equal(from_panels(gated_panels(x, to_panels=True), sizes), among_many(gated, x))


@needs_native
class TestPanelArguments:
    layer = Layer.random(NM(1, 4), Shape(8, 8), torch.float32)

    @pytest.mark.parametrize(
        ("x", "sizes", "message"),
        [
            (torch.randn(4, 8), [4], "x must be panels"),
            (torch.randn(1, 8, 5), [4], "x must be panels"),
            (torch.randn(1, 8, 1), [-1], "must not be negative|x must be panels"),
            (torch.randn(2, 8, 1), [4], "2 panels for 4 tokens|x must be panels"),
        ],
    )
    def test_wrong_panels_are_refused(self, x: torch.Tensor, sizes: list[int], message: str) -> None:
        if x.shape[-1] == 1:  # the width is the machine's
            x = x.expand(-1, -1, torch.ops.padst_native.panel_tokens())
        with pytest.raises(RuntimeError, match=message):
            self.layer(x, panels_of=sizes)

    def test_a_residual_is_not_added_to_panels(self) -> None:
        layer = dataclasses.replace(self.layer, residual=torch.randn(4, 8))
        with pytest.raises(RuntimeError, match=r"residual must be|a residual is added to tokens"):
            layer(torch.randn(4, 8), to_panels=True)

    @pytest.mark.parametrize("structure", [NM(1, 10), Diagonal()], ids=lambda s: s.to_string())
    def test_opcheck(self, structure: Structure) -> None:
        layer = Layer.random(structure, Shape(48, 64), torch.float32)
        op = getattr(torch.ops.padst_native, f"{structure.kind}_linear").default
        sizes = (structure.n, structure.m) if isinstance(structure, NM) else ()
        x = torch.randn(2, 5, 64)
        for operand, panels_of in ((x, None), (to_panels(x), [2, 5])):
            form = ("relu", None, to_panels(torch.randn(2, 5, 48)), panels_of, True)
            arguments = (operand, layer.values, *layer.topology, None, None, None, 48, *sizes, *form)
            torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("token_tile", [1, 5, 16, 1000])
def test_the_token_tile_changes_no_result(dtype: torch.dtype, token_tile: int) -> None:
    layer = Layer.random(Block(16), Shape(70, 53), dtype).with_extras(True, True, True)
    for tokens in (1, 7, 33):
        x = torch.randn(tokens, 53).to(dtype)
        assert torch.equal(layer(x, token_tile=token_tile), layer(x))


@needs_native
def test_a_negative_token_tile_is_refused() -> None:
    layer = Layer.random(Block(8), Shape(16, 16), torch.float32)
    with pytest.raises(RuntimeError, match="token_tile must not be negative"):
        torch.ops.padst_native.block_linear(
            torch.randn(2, 16), layer.values, *layer.topology, None, None, None, 16, token_tile=-1
        )


@needs_native
@pytest.mark.parametrize("rows", [1, 3, 16, 17, 32, 40, 48, 63, 64, 65, 130])
def test_permuted_inputs_of_blocks_of_any_height_and_width(rows: int) -> None:
    """All sizes of the kernel that reads lines, whose sums fill registers in as many ways."""
    for columns, tokens in itertools.product((1, 4, 19), (7, 8, 9, 15, 16, 17, 31, 32, 33, 70)):
        layer = Layer.random(Block((rows, columns)), Shape(3 * rows - rows // 2, 5 * columns - columns // 3), torch.float32)
        layer.with_extras(True, True, False).check(torch.randn(tokens, layer.shape.in_features))


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_permutations_of_any_width_and_any_number_of_tokens(dtype: torch.dtype) -> None:
    for features in (*range(1, 40), 97, 530):
        for shape, permute_out in ((Shape(24, features), False), (Shape(features, 24), True)):
            layer = Layer.random(Block(16), shape, dtype).with_extras(True, not permute_out, permute_out)
            for tokens in range(1, 10):
                layer.check(torch.randn(tokens, shape.in_features).to(dtype))


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestBlockEdges:
    def test_empty_block_rows_give_the_bias(self, dtype: torch.dtype) -> None:
        structure, shape = Block(16), Shape(64, 48)
        mask = torch.zeros(64, 48)
        mask[16:32, :16] = 1.0
        topology = structure.choose(mask, 11 / 12)
        values = structure.pack(torch.randn(64, 48), topology).to(dtype)
        layer = Layer(structure, shape, values, topology)
        x = torch.randn(20, 48).to(dtype)
        layer.check(x)
        assert not layer(x)[:, 32:].any()
        layer.with_extras(True, False, True).check(x)

    def test_no_blocks_at_all(self, dtype: torch.dtype) -> None:
        topology = (torch.zeros(3, dtype=torch.int32), torch.zeros(0, dtype=torch.int32))
        layer = Layer(Block(16), Shape(32, 48), torch.empty(0, 16, 16, dtype=dtype), topology)
        layer.with_extras(True, True, True).check(torch.randn(20, 48).to(dtype))

    def test_padding_of_edge_blocks_is_never_used(self, dtype: torch.dtype) -> None:
        structure, shape = Block(16), Shape(21, 23)
        layer = Layer.random(structure, shape, dtype, sparsity=0.1)
        clean = layer(x := torch.randn(20, 23).to(dtype))
        block_rows, columns = structure.block_rows(layer.topology), layer.topology[1]
        layer.values[block_rows == 1, :, 5:] = float("nan")
        layer.values[columns == 1, 7:] = float("nan")
        assert torch.equal(layer(x), clean)


@needs_native
class TestArguments:
    @pytest.mark.parametrize(
        ("structure", "damage", "message"),
        [
            (Block(16), lambda layer: layer.topology[1].fill_(4), "columns holds an index"),
            (Block(16), lambda layer: layer.topology[1].fill_(-1), "columns holds an index"),
            (Block(16), lambda layer: layer.topology[0][1:-1].fill_(99), "row_pointers"),
            (Block(16), lambda layer: layer.topology[0].add_(1), "row_pointers"),
            (Block(16), lambda layer: layer.topology[1].fill_(0), "must ascend"),
            (NM(1, 8), lambda layer: layer.topology[0].fill_(8), "offsets"),
            (NM(1, 7), lambda layer: layer.topology[0][:, -1].fill_(6), "offsets"),
            (Diagonal(), lambda layer: layer.topology[0][-1:].fill_(64), "offsets"),
            (Diagonal(), lambda layer: layer.topology[0][:1].fill_(-1), "offsets"),
            (Diagonal(), lambda layer: layer.topology[0].copy_(layer.topology[0].flip(0)), "offsets"),
        ],
    )
    def test_bad_indices_raise(self, structure: Structure, damage: Callable[[Layer], object], message: str) -> None:
        layer = Layer.random(structure, Shape(64, 64), torch.float32)
        damage(layer)
        with pytest.raises(RuntimeError, match=message):
            layer(torch.randn(8, 64))

    @pytest.mark.parametrize("structure", [Block(16), NM(1, 8), Diagonal()], ids=lambda s: s.to_string())
    @pytest.mark.parametrize("which", ["input_permutation", "output_permutation"])
    def test_bad_permutations_raise(self, structure: Structure, which: str) -> None:
        layer = Layer.random(structure, Shape(64, 64), torch.float32)
        wrong = (torch.full((64,), 64), torch.full((64,), -1), torch.arange(63), torch.arange(65), torch.arange(64)[None])
        for table in (*(t.int() for t in wrong), torch.arange(64)):
            with pytest.raises(RuntimeError, match=which):
                dataclasses.replace(layer, **{which: table})(torch.randn(100, 64))

    @pytest.mark.parametrize("structure", [Block(16), NM(1, 8), Diagonal()], ids=lambda s: s.to_string())
    def test_wrong_shapes_and_dtypes_raise(self, structure: Structure) -> None:
        layer = Layer.random(structure, Shape(64, 64), torch.float32)
        x = torch.randn(8, 64)
        with pytest.raises(RuntimeError, match="values"):
            dataclasses.replace(layer, values=layer.values.half())(x.bfloat16())
        with pytest.raises(RuntimeError, match="bias"):
            dataclasses.replace(layer, bias=torch.randn(63))(x)
        with pytest.raises(RuntimeError, match="values|row_pointers|offsets"):
            dataclasses.replace(layer, shape=Shape(40, 64))(x)
        with pytest.raises(RuntimeError, match="values|blocks"):
            dataclasses.replace(layer, values=layer.values[:-1])(x)
        with pytest.raises(RuntimeError, match="Double"):
            dataclasses.replace(layer, values=layer.values.double())(x.double())
        with pytest.raises(RuntimeError, match="activation must be"):
            dataclasses.replace(layer, activation="tanh")(x)
        for other, which in itertools.product((torch.randn(8, 63), torch.randn(64), x.bfloat16()), ("residual", "gate")):
            with pytest.raises(RuntimeError, match=which):
                dataclasses.replace(layer, **{which: other})(x)
        with pytest.raises(RuntimeError, match="offsets|row_pointers"):
            dataclasses.replace(layer, topology=tuple(t.long() for t in layer.topology))(x)


@needs_native
@pytest.mark.parametrize("structure", [Block(16), NM(1, 8), Diagonal()], ids=lambda s: s.to_string())
class TestOperators:
    def test_fake_agrees_with_real(self, structure: Structure) -> None:
        layer = Layer.random(structure, Shape(48, 64), torch.bfloat16).with_extras(True, True, True)
        op = getattr(torch.ops.padst_native, f"{structure.kind}_linear").default
        sizes = (structure.n, structure.m) if isinstance(structure, NM) else ()
        extras = (layer.bias, layer.input_permutation, layer.output_permutation)
        epilogue = ("gelu", *torch.randn(2, 2, 5, 48).bfloat16())
        arguments = (torch.randn(2, 5, 64).bfloat16(), layer.values, *layer.topology, *extras, 48, *sizes, *epilogue)
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))

    def test_compiles_with_dynamic_tokens_and_strided_input(self, structure: Structure) -> None:
        layer = Layer.random(structure, Shape(48, 64), torch.float32).with_extras(True, True, True)
        compiled = torch.compile(lambda x: layer(x.T) + 1, dynamic=True, fullgraph=True, backend="aot_eager")
        for tokens in (3, 50):
            x = torch.randn(64, tokens)
            torch.testing.assert_close(compiled(x), layer(x.T) + 1, rtol=0, atol=0)


def run_python(code: str, cache: pathlib.Path, **environment: str) -> subprocess.Popen[str]:
    """Starts `code` in a new interpreter that keeps its kernels in `cache`."""
    root = pathlib.Path(__file__).parent.parent
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH", "")]))
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, "PADST_CACHE_DIR": str(cache), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output_of(process: subprocess.Popen[str]) -> str:
    """What a finished process printed; its errors, if it failed."""
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return printed


REPORT = """
import warnings, torch
from padst_compile.kernels import native
from padst_compile.kernels.native import minimax
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    answers = [native.load() for _ in range(3)]
    supported = [native.supports(kind, torch.float32) for kind in ("block", "nm", "diagonal") for _ in range(2)]
caught = [w for w in caught if issubclass(w.category, native.NativeKernelsUnavailable)]
text = [native.unavailable_reason(), *(w.message for w in caught)]
print(answers[0], len(set(answers)), supported[::2], len(caught), *text, sep="|")
"""


@dataclasses.dataclass(frozen=True)
class Report:
    """What `REPORT` printed."""

    loaded: bool
    supported: str
    warnings: int
    text: str

    @classmethod
    def of(cls, process: subprocess.Popen[str]) -> Report:
        loaded, answers, supported, warnings, text = output_of(process).strip().split("|", 4)
        assert answers == "1"
        return cls(loaded == "True", supported, int(warnings), text)


def compiler(folder: pathlib.Path) -> str:
    """The path of a C++ compiler in `folder`, which fails where COMPILER_FAILS is set, and adds COMPILER_FLAGS."""
    script = folder / "compiler"
    script.write_text(
        '#!/bin/sh\nif [ -n "$COMPILER_FAILS" ] && [ "$1" != --version ]; then\n'
        'echo "x.cpp:1: error: out of order" >&2\nexit 1\nfi\nexec c++ "$@" $COMPILER_FLAGS\n'
    )
    script.chmod(0o755)
    return str(script)


def copy_of_library(cache: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    """The library in a copy of `cache`."""
    shutil.copytree(cache, target, dirs_exist_ok=True)
    (library,) = target.rglob("*.so")
    return library


@pytest.fixture(scope="module")
def built_cache(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A cache that two processes filled at the same time."""
    if not native.load():
        pytest.skip("no native kernels")
    cache = tmp_path_factory.mktemp("cache")
    for process in [run_python(REPORT, cache, CXX=compiler(cache)) for _ in range(2)]:
        report = Report.of(process)
        assert report.loaded and report.warnings == 0, report
    return cache


class TestLoader:
    def test_import_does_not_build(self, tmp_path: pathlib.Path) -> None:
        output_of(run_python("import padst_compile.kernels.native", tmp_path))
        assert not any(tmp_path.iterdir())

    def test_concurrent_first_builds_leave_one_library(self, built_cache: pathlib.Path) -> None:
        assert len(list(built_cache.rglob("*.so"))) == 1
        assert not list(built_cache.rglob("*-build"))
        assert (built_cache / "native").stat().st_mode & 0o777 == 0o700

    def test_cached_library_needs_no_builder(self, built_cache: pathlib.Path) -> None:
        builder = "'torch.utils.cpp_extension' in sys.modules"
        code = f"import sys; from padst_compile.kernels import native; print(native.load(), {builder})"
        assert output_of(run_python(code, built_cache, CXX=compiler(built_cache))).strip() == "True False"

    def test_truncated_library_is_rebuilt(self, built_cache: pathlib.Path, tmp_path: pathlib.Path) -> None:
        library = copy_of_library(built_cache, tmp_path)
        library.write_bytes(library.read_bytes()[:5000])
        report = Report.of(run_python(REPORT, tmp_path, CXX=compiler(built_cache)))
        assert report.loaded and report.warnings == 0 and library.stat().st_size > 5000

    def test_library_that_does_not_load_is_reported_where_it_cannot_be_rebuilt(
        self, built_cache: pathlib.Path, tmp_path: pathlib.Path
    ) -> None:
        library = copy_of_library(built_cache, tmp_path)
        library.write_bytes(b"not a library")
        library.with_suffix(".sha256").write_text(hashlib.sha256(b"not a library").hexdigest())
        report = Report.of(run_python(REPORT, tmp_path, CXX=compiler(built_cache), COMPILER_FAILS="1"))
        assert not report.loaded and report.warnings == 1 and "error: out of order" in report.text

    def test_no_compiler(self, tmp_path: pathlib.Path) -> None:
        report = Report.of(run_python(REPORT, tmp_path, CXX="/nonexistent"))
        assert not report.loaded and report.warnings == 1
        assert "there is no C++ compiler" in report.text and "/nonexistent" in report.text and "g++" in report.text

    def test_compiler_with_arguments(self, tmp_path: pathlib.Path) -> None:
        report = Report.of(run_python(REPORT, tmp_path, CXX="c++ -g"))
        assert not report.loaded and report.warnings == 1 and "CXX is 'c++ -g'" in report.text and "script" in report.text

    def test_nothing_on_path(self, tmp_path: pathlib.Path) -> None:
        report = Report.of(run_python(REPORT, tmp_path, CXX="", PATH=str(tmp_path)))
        assert not report.loaded and report.warnings == 1 and "there is no C++ compiler" in report.text

    def test_failed_build_names_the_error(self, tmp_path: pathlib.Path) -> None:
        report = Report.of(run_python(REPORT, tmp_path, CXX=compiler(tmp_path), COMPILER_FAILS="1"))
        assert not report.loaded and report.warnings == 1 and "error: out of order" in report.text
        assert not list(tmp_path.rglob("*-build"))

    def test_turned_off(self, tmp_path: pathlib.Path) -> None:
        report = Report.of(run_python(REPORT, tmp_path, PADST_NATIVE="0"))
        assert not report.loaded and report.warnings == 1 and "PADST_NATIVE=0" in report.text
        assert "[False, False, False]" in report.supported

    def test_unusable_cache_folder(self, tmp_path: pathlib.Path) -> None:
        (tmp_path / "native").write_text("a file where the folder should be")
        report = Report.of(run_python(REPORT, tmp_path))
        assert not report.loaded and report.warnings == 1 and "PADST_CACHE_DIR" in report.text

    def test_cache_folder_open_to_others_is_refused(self, tmp_path: pathlib.Path) -> None:
        (tmp_path / "native").mkdir()
        (tmp_path / "native").chmod(0o777)
        report = Report.of(run_python(REPORT, tmp_path))
        assert not report.loaded and "written by others" in report.text

    def test_without_the_micro_kernel(self, built_cache: pathlib.Path) -> None:
        report = Report.of(run_python(REPORT, built_cache, CXX=compiler(built_cache), PADST_FORCE_NO_BRGEMM="1"))
        assert report.loaded and report.supported == "[False, True, True]"
        assert report.warnings == 1 and "micro-kernel" in report.text


def test_polynomials_are_the_minimax_ones() -> None:
    source = (pathlib.Path(minimax.__file__).parent / "activation.h").read_text()
    rows = re.findall(r"kCoefficients\[\] = \{(.*?)\}", source, re.DOTALL)
    for fit, bits, row in zip((minimax.exponential(), minimax.normal_tail()), (23.6, 25.2), rows, strict=True):
        assert fit.error < 2**-bits
        assert [float(c) for c in re.findall(r"[-\d.]+", row)] == pytest.approx(fit.coefficients, rel=1e-6)


SCRATCH = """
import torch, sys
sys.path.insert(0, {tests!r})
import test_native as t
for structure in t.STRUCTURES:
    for dtype in t.DTYPES:
        for shape in (t.Shape(131, 33), t.Shape(33, 131)):
            if t.fits(structure, shape):
                layer = t.Layer.random(structure, shape, dtype)
                for tokens in (1, 20, 100):
                    layer.with_extras(True, tokens != 20, tokens != 1).check(torch.randn(tokens, shape.in_features).to(dtype))
"""

OTHER_MACHINE = """
import torch, sys
sys.path.insert(0, {tests!r})
import dataclasses, test_native as t
for structure in t.STRUCTURES:
    for dtype, name in zip(t.DTYPES * 2, t.ACTIVATIONS):
        layer = t.Layer.random(structure, t.Shape(70, 70), dtype)
        for tokens in (1, 5, 70):
            layer = dataclasses.replace(layer.with_extras(True, True, True), activation=name)
            layer.check(torch.randn(tokens, 70).to(dtype) * 4)
"""


@pytest.mark.parametrize("instruction_set", ["default", "avx2"])
def test_scratch_memory_does_not_leak_into_results(built_cache: pathlib.Path, instruction_set: str) -> None:
    # glibc fills fresh memory with 0x7f: huge in float32 and bfloat16, NaN in float16. With oneDNN held to AVX2 there is no
    # 16-bit micro-kernel, and activations are converted.
    code = SCRATCH.format(tests=str(pathlib.Path(__file__).parent))
    environment = {"CXX": compiler(built_cache), "MALLOC_PERTURB_": "128"}
    if instruction_set != "default":
        environment["ONEDNN_MAX_CPU_ISA"] = instruction_set
    output_of(run_python(code, built_cache, **environment))


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="chooses between instruction sets of x86-64")
@pytest.mark.parametrize("flags", ["-march=haswell", "-march=x86-64"])
def test_code_for_other_machines_is_right(tmp_path: pathlib.Path, flags: str) -> None:
    # The last -march wins: without AVX-512, and without even AVX and fused multiplication.
    if not native.load():
        pytest.skip("no native kernels")
    code = OTHER_MACHINE.format(tests=str(pathlib.Path(__file__).parent))
    output_of(run_python(code, tmp_path / "cache", CXX=compiler(tmp_path), COMPILER_FLAGS=flags))


def test_source_hash_is_stable() -> None:
    assert native.source_hash() == native.source_hash() and len(native.source_hash()) == 16
