"""The operators: against dense float64 references, exactly where whole numbers allow it, else within the error bound."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

from padst_compile.kernels import dispatch, gradient_tap
from padst_compile.kernels.block.reference import block_linear
from padst_compile.kernels.diagonal.reference import diagonal_linear
from padst_compile.kernels.nm.reference import nm_linear
from padst_compile.kernels.permute import permute
from padst_compile.kernels.structured_linear import (
    structured_input_gradient,
    structured_linear,
    structured_value_gradient,
    to_dense,
    to_values,
)
from padst_compile.structures import NM, Block, Diagonal, Shape, Structure, Topology, Unstructured
from padst_compile.testing.accuracy import assert_within_error_bound

pytestmark = pytest.mark.usefixtures("poisoned_memory")

CASES = [
    (Block(8), Shape(24, 32)),
    (Block((4, 6)), Shape(13, 17)),
    (Block((16, 3)), Shape(33, 7)),
    (Block(16), Shape(5, 7)),
    (NM(1, 4), Shape(9, 13)),
    (NM(2, 5, vector=3), Shape(10, 17)),
    (NM(1, 10), Shape(7, 30)),
    (NM(3, 3), Shape(1, 3)),
    (Diagonal(), Shape(7, 12)),
    (Diagonal(), Shape(12, 7)),
    (Diagonal(4), Shape(8, 16)),
    (Diagonal(), Shape(1, 1)),
    (Unstructured(), Shape(11, 6)),
]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
each_case = pytest.mark.parametrize(("structure", "shape"), CASES, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
some_cases = pytest.mark.parametrize(("structure", "shape"), [CASES[i] for i in (1, 5, 8, 12)], ids=str)


@dataclasses.dataclass(frozen=True)
class Problem:
    """Everything one product takes, with parameters that ask for gradients."""

    structure: Structure
    shape: Shape
    topology: Topology
    values: torch.Tensor
    bias: torch.Tensor | None = None
    into: torch.Tensor | None = None
    out: torch.Tensor | None = None

    def arguments(self, x: torch.Tensor) -> tuple[Any, ...]:
        """What `structured_linear` takes."""
        name = self.structure.to_string()
        return (x, self.values, list(self.topology), self.bias, self.into, self.out, self.shape.out_features, name)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The op."""
        result: torch.Tensor = structured_linear(*self.arguments(x))
        return result

    def dense(self, x: torch.Tensor, *, magnitudes: bool = False) -> torch.Tensor:
        """The same through the dense weight and nothing of the op; with `magnitudes`, of the absolute values."""
        weight = self.structure.unpack(self.values, self.topology, self.shape)
        bias = self.bias
        if magnitudes:
            x, weight, bias = x.abs(), weight.abs(), None if bias is None else bias.abs()
        y = linear(x if self.into is None else x[..., self.into.long()], weight)
        y = y if self.out is None else y[..., self.out.long()]
        return y if bias is None else y + bias

    def double(self) -> Problem:
        """The same in float64, cut from the graph."""
        bias = None if self.bias is None else self.bias.detach().double().requires_grad_()
        return dataclasses.replace(self, values=self.values.detach().double().requires_grad_(), bias=bias)

    def gradients(self, y: torch.Tensor, x: torch.Tensor, direction: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Gradients of `y` along `direction` for input, values and bias."""
        inputs = [x, self.values] + ([] if self.bias is None else [self.bias])
        return torch.autograd.grad(y, inputs, direction)


class Heard:
    """A listener that forms the dense gradients it is told of."""

    def __init__(self) -> None:
        self.dense: list[torch.Tensor] = []

    def products(
        self, grad: torch.Tensor, x: torch.Tensor, rows: torch.Tensor | None = None, columns: torch.Tensor | None = None
    ) -> None:
        dense = grad.T @ x
        dense = dense if rows is None else dense[rows.long()]
        self.dense.append(dense if columns is None else dense[:, columns.long()])

    def weight(self, gradient: torch.Tensor) -> None:
        self.dense.append(gradient)


class Recorded(TorchDispatchMode):
    """Names of all operators that run, with the elements of what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.results: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.results.append((str(func), result.numel() if isinstance(result, torch.Tensor) else 0))
        return result


def problem(
    structure: Structure,
    shape: Shape,
    dtype: torch.dtype = torch.float64,
    *,
    whole: bool = True,
    bias: bool = True,
    into: bool = True,
    out: bool = True,
) -> Problem:
    """A random product; `whole` numbers from -1 to 1 make every result exact in every dtype."""
    generator = torch.Generator().manual_seed(shape.numel)
    size = (shape.out_features, shape.in_features)
    topology = structure.choose(torch.rand(size, generator=generator), 0.4)
    weight = numbers(*size, whole=whole, generator=generator).to(dtype)
    return Problem(
        structure,
        shape,
        topology,
        structure.pack(weight, topology).requires_grad_(),
        numbers(shape.out_features, whole=whole, generator=generator).to(dtype).requires_grad_() if bias else None,
        torch.randperm(shape.in_features, generator=generator).int() if into else None,
        torch.randperm(shape.out_features, generator=generator).int() if out else None,
    )


def numbers(*size: int, whole: bool, generator: torch.Generator | None = None) -> torch.Tensor:
    """Random float64 numbers."""
    if whole:
        return torch.randint(-1, 2, size, generator=generator).double()
    return torch.randn(size, generator=generator, dtype=torch.float64)


def inputs(shape: Shape, *leading: int, dtype: torch.dtype = torch.float64, whole: bool = True) -> torch.Tensor:
    """A random input that asks for its gradient."""
    generator = torch.Generator().manual_seed(len(leading))
    return numbers(*leading, shape.in_features, whole=whole, generator=generator).to(dtype).requires_grad_()


def assert_exact(product: Problem, x: torch.Tensor) -> None:
    """Forward and every gradient equal the dense ones bit for bit, with the right dtypes and a contiguous result."""
    y = product(x)
    wide, wide_x = product.double(), x.detach().double().requires_grad_()
    expected = wide.dense(wide_x)
    assert y.dtype == x.dtype
    assert y.is_contiguous()
    assert torch.equal(y.double(), expected)
    direction = numbers(*y.shape, whole=True, generator=torch.Generator().manual_seed(1))
    actual = product.gradients(y, x, direction.to(y.dtype))
    for gradient, exact in zip(actual, wide.gradients(expected, wide_x, direction), strict=True):
        assert gradient.dtype == x.dtype
        assert torch.equal(gradient.double(), exact)


@each_dtype
@each_case
@pytest.mark.parametrize(("bias", "into", "out"), list(itertools.product((False, True), repeat=3)))
def test_product_and_gradients_are_exact_in_whole_numbers(
    structure: Structure, shape: Shape, dtype: torch.dtype, bias: bool, into: bool, out: bool
) -> None:
    product = problem(structure, shape, dtype, bias=bias, into=into, out=out)
    assert_exact(product, inputs(shape, 5, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@each_case
@pytest.mark.parametrize("leading", [(), (0,), (1,), (2, 3), (2, 0, 3), (1, 1, 1, 4), (67,)], ids=str)
def test_any_number_of_tokens_and_leading_dimensions(
    structure: Structure, shape: Shape, dtype: torch.dtype, leading: tuple[int, ...]
) -> None:
    assert_exact(problem(structure, shape, dtype), inputs(shape, *leading, dtype=dtype))


@each_dtype
@each_case
@pytest.mark.parametrize("leading", [(3,), (2, 3)], ids=str)
def test_a_result_may_be_written_to_in_place(
    structure: Structure, shape: Shape, dtype: torch.dtype, leading: tuple[int, ...]
) -> None:
    """As `ReLU(inplace=True)` behind a layer does."""
    product, x = problem(structure, shape, dtype, bias=False, into=False, out=False), inputs(shape, *leading, dtype=dtype)
    direction = torch.ones(*leading, shape.out_features, dtype=dtype)
    found = product.gradients(product(x).mul_(2), x, direction)
    expected = product.gradients(product(x) * 2, x, direction)
    assert all(torch.equal(now, then) for now, then in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@each_case
def test_an_input_that_is_not_contiguous(structure: Structure, shape: Shape, dtype: torch.dtype) -> None:
    product = problem(structure, shape, dtype)
    whole = numbers(6, 2 * shape.in_features, whole=True).to(dtype)
    for x in (
        whole[:, ::2],
        whole[::2, : shape.in_features],
        whole[:, : shape.in_features].T.contiguous().T,
        whole[:1, : shape.in_features].expand(4, -1),
    ):
        assert_exact(product, x.detach().requires_grad_())


@each_dtype
@each_case
def test_product_and_gradients_stay_within_the_error_bound(structure: Structure, shape: Shape, dtype: torch.dtype) -> None:
    product, x = problem(structure, shape, dtype, whole=False), inputs(shape, 19, dtype=dtype, whole=False)
    wide, wide_x = product.double(), x.detach().double().requires_grad_()
    y, exact, magnitude = product(x), wide.dense(wide_x), wide.dense(wide_x, magnitudes=True)
    assert_within_error_bound(y, exact, magnitude, shape.in_features + 2)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    actual = product.gradients(y, x, direction)
    expected = wide.gradients(exact, wide_x, direction.double())
    absolute = dataclasses.replace(wide, values=wide.values.detach().abs().requires_grad_())
    largest_x = wide_x.detach().abs().requires_grad_()
    sizes = absolute.gradients(absolute.dense(largest_x), largest_x, direction.double().abs())
    for gradient, right, size, terms in zip(actual, expected, sizes, (shape.out_features, 19, 19), strict=False):
        assert_within_error_bound(gradient, right, size, terms + 2)


@each_case
def test_gradients_agree_with_finite_differences(structure: Structure, shape: Shape) -> None:
    product, x = problem(structure, shape, whole=False), inputs(shape, 2, whole=False)

    def function(x: torch.Tensor, values: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return dataclasses.replace(product, values=values, bias=bias)(x)

    assert torch.autograd.gradcheck(function, (x, product.values, product.bias), fast_mode=True)


def test_only_the_gradients_that_are_asked_for_are_computed() -> None:
    product = problem(Block(4), Shape(8, 8))
    frozen = dataclasses.replace(product, values=product.values.detach(), bias=None)
    x = inputs(product.shape, 3)
    frozen(x).sum().backward()
    assert x.grad is not None
    assert not frozen(x.detach()).requires_grad


@each_case
def test_to_dense_and_to_values_are_unpack_and_pack_and_each_other_s_gradient(structure: Structure, shape: Shape) -> None:
    product = problem(structure, shape)
    size, name = (shape.out_features, shape.in_features), structure.to_string()
    dense = to_dense(product.values, list(product.topology), *size, name)
    assert torch.equal(dense, structure.unpack(product.values, product.topology, shape))
    weight = numbers(*size, whole=True)
    for laid_out in (weight, weight.T.contiguous().T):
        values = to_values(laid_out, list(product.topology), product.values, name)
        assert torch.equal(values, structure.pack(weight, product.topology))
    (gradient,) = torch.autograd.grad(dense, product.values, weight)
    assert torch.equal(gradient, values)


@each_case
def test_the_readable_references_agree(structure: Structure, shape: Shape) -> None:
    product, x = problem(structure, shape, bias=False, into=False, out=False), inputs(shape, 5).detach()
    dense, arguments = product.dense(x), (x, product.values.detach(), product.topology, shape.out_features)
    if isinstance(structure, Block):
        assert torch.equal(block_linear(structure, *arguments), dense)
    elif isinstance(structure, NM):
        assert torch.equal(nm_linear(structure, *arguments), dense)
    elif isinstance(structure, Diagonal):
        assert torch.equal(diagonal_linear(structure, *arguments), dense)
    else:
        assert torch.equal(product(x), dense)  # the dense product is its own reference


# ---- permute


@each_dtype
@pytest.mark.parametrize("leading", [(), (0,), (3,), (2, 3)], ids=str)
def test_permute_reorders_the_last_axis_and_its_gradient_puts_it_back(dtype: torch.dtype, leading: tuple[int, ...]) -> None:
    p = torch.tensor([3, 0, 4, 1, 2], dtype=torch.int32)
    x = inputs(Shape(1, 5), *leading, dtype=dtype)
    y = permute(x, p)
    assert torch.equal(y, x[..., p.long()])
    assert y.is_contiguous()
    direction = torch.randn_like(y)
    (gradient,) = torch.autograd.grad(y, x, direction)
    assert torch.equal(gradient[..., p.long()], direction)


def test_permute_takes_integers_and_transposed_inputs() -> None:
    p, x = torch.tensor([1, 2, 0]), torch.arange(12).reshape(3, 4).T
    assert torch.equal(permute(x, p), x[:, p])


# ---- autocast


@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16], ids=str)
@each_dtype
@some_cases
def test_autocast_gives_the_types_that_a_dense_layer_has(
    structure: Structure, shape: Shape, dtype: torch.dtype, lower: torch.dtype
) -> None:
    product, x = problem(structure, shape, dtype), inputs(shape, 4, dtype=dtype)
    dense_weight = torch.ones(shape.out_features, shape.in_features, dtype=dtype)
    with torch.autocast("cpu", lower):
        y = product(x)
        assert y.dtype == linear(x, dense_weight, product.bias).dtype
    assert torch.equal(y.double(), product.double().dense(x.double()))
    for gradient in product.gradients(y, x, torch.ones_like(y)):
        assert gradient.dtype == dtype


def test_autocast_mixes_a_lower_input_with_float32_weights() -> None:
    product = problem(Block(4), Shape(8, 12), torch.float32)
    x = inputs(product.shape, 3, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        y = product(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y.double(), product.double().dense(x.double()))


def test_a_region_without_autocast_inside_one_stays_in_float32() -> None:
    product = problem(NM(1, 4), Shape(8, 12), torch.float32)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert product(inputs(product.shape, 3, dtype=torch.float32)).dtype == torch.float32


# ---- what PyTorch expects of an operator


@some_cases
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_structured_linear_is_a_sound_operator(structure: Structure, shape: Shape, permuted: bool, dtype: torch.dtype) -> None:
    product = problem(structure, shape, dtype, bias=permuted, into=permuted, out=permuted)
    torch.library.opcheck(torch.ops.padst.structured_linear.default, product.arguments(inputs(shape, 2, 3, dtype=dtype)))


@some_cases
def test_the_gradient_and_conversion_operators_are_sound(structure: Structure, shape: Shape) -> None:
    product = problem(structure, shape, torch.float32)
    values, topology, name = product.values.detach(), list(product.topology), structure.to_string()
    ops, size = torch.ops.padst, (shape.out_features, shape.in_features)
    grad = torch.randn(2, 3, shape.out_features)
    x = torch.randn(2, 3, shape.in_features)
    torch.library.opcheck(ops.structured_input_gradient.default, (grad, values, topology, shape.in_features, name))
    torch.library.opcheck(ops.structured_value_gradient.default, (grad, x, values, topology, name))
    around = product.into, product.out
    torch.library.opcheck(ops.structured_input_gradient.default, (grad, values, topology, shape.in_features, name, *around))
    torch.library.opcheck(ops.structured_value_gradient.default, (grad, x, values, topology, name, *around))
    torch.library.opcheck(ops.to_dense.default, (product.values, topology, *size, name))
    for weight in (torch.randn(size), torch.randn(size[::-1]).T):
        torch.library.opcheck(ops.to_values.default, (weight, topology, values, name))


@pytest.mark.parametrize("structure", [Block(16), NM(1, 4), Diagonal()], ids=lambda s: s.to_string())
def test_native_gradients_move_permuted_activations_inside_the_kernels(structure: Structure) -> None:
    product = problem(structure, Shape(32, 48), torch.float32, bias=False)
    if not dispatch.has_native_kernel(structure, product.values.device, torch.float32):
        pytest.skip(f"no native kernel for {structure.kind}")
    x, grad = torch.randn(40, 48), torch.randn(40, 32)
    arguments = product.values.detach(), product.topology
    with Recorded() as called:
        dispatch.input_gradient(structure, grad, *arguments, 48, product.into, product.out)
        dispatch.value_gradient(structure, grad, x, *arguments, product.into, product.out)
    # what is as large as the activations; index tensors and blocks of weights are reordered by ATen
    moved = [name for name, elements in called.results if elements >= 40 * 32 and ("permute" in name or "index" in name)]
    assert moved == []
    assert any("value_gradient" in name for name, _ in called.results)


@some_cases
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_listener_hears_the_gradient_of_s_itself(structure: Structure, shape: Shape, dtype: torch.dtype) -> None:
    product, heard = problem(structure, shape, dtype, bias=False), Heard()
    x = inputs(shape, 2, 5, dtype=dtype)
    direction = numbers(2, 5, shape.out_features, whole=True).to(dtype)
    unheard = product.gradients(product(x), x, direction)
    gradient_tap.listen(product.topology[0], heard)
    try:
        gradients = product.gradients(product(x), x, direction)
    finally:
        gradient_tap.forget(product.topology[0])
    assert all(map(torch.equal, gradients, unheard))
    assert torch.equal(structure.pack(heard.dense[0], product.topology), unheard[1])
    weight = structure.unpack(product.values, product.topology, shape).detach().requires_grad_()
    dense = linear(x.detach()[..., product.into.long()], weight)[..., product.out.long()]  # type: ignore[union-attr]
    assert torch.equal(heard.dense[0], *torch.autograd.grad(dense, [weight], direction))


def test_the_gradient_operators_take_inputs_that_are_not_contiguous() -> None:
    product = problem(Block((4, 6)), Shape(13, 17))
    grad, x = numbers(13, 5, whole=True).T, numbers(17, 5, whole=True).T
    weight = product.structure.unpack(product.values.detach(), product.topology, product.shape)
    topology, name = list(product.topology), product.structure.to_string()
    into = structured_input_gradient(grad, product.values.detach(), topology, 17, name)
    assert torch.equal(into, grad @ weight)
    kept = structured_value_gradient(grad, x, product.values.detach(), topology, name)
    assert torch.equal(kept, product.structure.pack(grad.T @ x, product.topology))


@pytest.mark.parametrize("x", [torch.randn(2, 5), torch.randn(5), torch.arange(10).reshape(2, 5)], ids=["2d", "1d", "int"])
def test_permute_is_a_sound_operator(x: torch.Tensor) -> None:
    p = torch.tensor([3, 0, 4, 1, 2], dtype=torch.int32)
    if x.is_floating_point():
        x = x.clone().requires_grad_()
    torch.library.opcheck(torch.ops.padst.permute.default, (x, p))
