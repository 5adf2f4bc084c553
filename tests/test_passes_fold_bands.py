"""linear(x, diagonals, in=p, out=q)  ==  linear(x, blocks, in=p[s], out=t[q]), for diagonals that lie in runs"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import fx, nn

import padst_compile as padst
from padst_compile.autotune import search
from padst_compile.backend import padst as backend
from padst_compile.equivalence import verify
from padst_compile.kernels import dispatch, native
from padst_compile.kernels.formats import Format, register_kernel
from padst_compile.passes.context import Context
from padst_compile.passes.fold_bands import FoldBands
from padst_compile.passes.graph import STRUCTURED_LINEAR, argument
from padst_compile.structures import Diagonal, Shape, Topology, parse

needs_native = pytest.mark.skipif(not native.load(), reason=f"no native kernels: {native.unavailable_reason()}")

TOKENS = 512  # enough for the time of a product to be that of its arithmetic
RUN = range(37, 37 + 97)
# Offsets, sizes, and the blocks that the cost model likes best: bands of blocks of 32, and whole classes of any size.
FOLDS = {
    "a run": (RUN, (512, 512), "block:32x32"),
    "a run round the end": (range(450, 450 + 97), (512, 512), "block:32x32"),
    "a progression": (range(3, 3 + 5 * 97, 5), (512, 512), "block:32x32"),
    "two runs": ([*range(97), *range(288, 288 + 97)], (768, 768), "block:32x32"),
    "a run of a wide layer": (RUN, (256, 512), "block:32x32"),
    "a run of a tall layer": (RUN, (512, 256), "block:32x32"),
    "classes": ([c + 8 * turn for c in (1, 2) for turn in range(16)], (128, 128), "block:16x16"),
    "classes of a wide layer": ([c + 8 * turn for c in (1, 2) for turn in range(32)], (128, 256), "block:16x32"),
    "classes of a tall layer": ([c + 8 * turn for c in (1, 2) for turn in range(32)], (256, 128), "block:32x16"),
}


class Product(nn.Module):
    """One product of diagonals, whole numbers, with tables of its own where asked for."""

    def __init__(self, offsets: Sequence[int], sizes: tuple[int, int], *, into: bool = False, out: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        period = max(sizes)
        self.sizes = sizes
        self.register_buffer("offsets", torch.tensor(sorted({offset % period for offset in offsets}), dtype=torch.int32))
        self.values = nn.Parameter(torch.randint(-4, 5, (self.offsets.numel(), min(sizes)), generator=generator).float())
        self.bias = nn.Parameter(torch.arange(sizes[0]).float())
        self.register_buffer("p", torch.randperm(sizes[1], generator=generator).int() if into else None)
        self.register_buffer("q", torch.randperm(sizes[0], generator=generator).int() if out else None)

    def forward(self, x: Any) -> Any:
        return STRUCTURED_LINEAR(x, self.values, [self.offsets], self.bias, self.p, self.q, self.sizes[0], "diagonal")

    def facts(self, *, inference: bool = True, shapes: bool = True, tokens: int = TOKENS) -> Context:
        facts = Context(fx.symbolic_trace(self), {}, inference)
        for node in facts.module.graph.nodes:
            if shapes and node.op == "placeholder":
                node.meta["example_value"] = torch.empty(tokens, self.sizes[1])
            if shapes and node.target is STRUCTURED_LINEAR:
                node.meta["example_value"] = torch.empty(tokens, self.sizes[0])
        return facts

    def sample(self) -> torch.Tensor:
        return torch.randint(-5, 6, (3, self.sizes[1]), generator=torch.Generator().manual_seed(1)).float()


def folded(facts: Context) -> fx.Node:
    """The product of blocks that the rule makes."""
    assert FoldBands().run(facts).rewritten == 1
    facts.module.graph.lint()
    facts.module.recompile()
    (product,) = facts.module.graph.find_nodes(op="call_function", target=STRUCTURED_LINEAR)
    return product  # type: ignore[no-any-return]  # a node


@needs_native
@pytest.mark.parametrize(("into", "out"), list(itertools.product((False, True), repeat=2)))
@pytest.mark.parametrize("name", FOLDS)
def test_the_function_is_the_same(name: str, into: bool, out: bool) -> None:
    offsets, sizes, structure = FOLDS[name]
    model = Product(offsets, sizes, into=into, out=out)
    facts = model.facts()
    product = folded(facts)
    assert argument(product, "structure") == structure
    x = model.sample()
    assert torch.equal(facts.module(x), model(x))
    assert verify(model, facts.module, x)
    made = [node for node in product.all_input_nodes if node.op == "call_function"]
    assert made
    assert all(map(facts.is_static, made))  # computed once, before any input is known
    assert FoldBands().run(facts).rewritten == 0


@needs_native
def test_bands_of_features_in_their_order_need_no_tables() -> None:
    product = folded(Product(range(97), (512, 512)).facts())
    assert argument(product, "input_permutation") is None
    assert argument(product, "output_permutation") is None


@needs_native
@pytest.mark.parametrize(("sizes", "moved"), [((512, 512), "input"), ((256, 512), "input"), ((512, 256), "output")], ids=str)
def test_a_shift_moves_the_longer_side_alone(sizes: tuple[int, int], moved: str) -> None:
    product = folded(Product(RUN, sizes).facts())
    tables = [side for side in ("input", "output") if argument(product, f"{side}_permutation") is not None]
    assert tables == [moved]


@needs_native
def test_new_weights_are_followed_and_the_offsets_watched() -> None:
    model = Product(RUN, (512, 512))
    facts = model.facts()
    folded(facts)
    with torch.no_grad():
        model.values.add_(1)
    assert torch.equal(facts.module(model.sample()), model(model.sample()))
    assert [facts.tensor(node) is model.offsets for node in facts.assumed] == [True]


def refusals(facts: Context, rule: FoldBands | None = None) -> list[str]:
    report = (rule or FoldBands()).run(facts)
    assert report.rewritten == 0
    assert not facts.assumed
    return [refusal.reason for refusal in report.refusals]


def test_only_in_inference() -> None:
    assert refusals(Product(RUN, (512, 512)).facts(inference=False)) == ["training: the offsets may move"]


def test_without_shapes_nothing_is_folded() -> None:
    assert refusals(Product(RUN, (512, 512)).facts(shapes=False)) == ["capture recorded no shapes"]


def test_weights_computed_from_the_inputs_are_left_alone() -> None:
    class Computed(Product):
        def forward(self, x: Any) -> Any:
            return STRUCTURED_LINEAR(x, x.sum() * self.values, [self.offsets], None, None, None, 512, "diagonal")

    assert refusals(Computed(RUN, (512, 512)).facts()) == ["the weights are computed from the inputs"]


def test_offsets_computed_from_the_inputs_are_left_alone() -> None:
    class Computed(Product):
        def forward(self, x: Any) -> Any:
            return STRUCTURED_LINEAR(x, self.values, [self.offsets + x.sum().int()], None, None, None, 512, "diagonal")

    assert refusals(Computed(RUN, (512, 512)).facts()) == ["the weights are computed from the inputs"]


NO_BANDS = "the offsets form no bands that blocks hold with few zeros"
NO_FASTER = "blocks, which would store {} times the values, would not be faster"


@pytest.mark.parametrize("offsets", [[], [0], [3, 4, 90, 200, 201, 444]], ids=str)
def test_scattered_diagonals_stay(offsets: Sequence[int]) -> None:
    assert refusals(Product(offsets, (512, 512)).facts()) == [NO_BANDS]


@needs_native
def test_classes_of_small_blocks_stay() -> None:
    assert refusals(Product(range(0, 512, 32), (256, 512)).facts()) == [NO_FASTER.format("2.0")]


def test_offsets_that_are_wrong_are_left_for_the_kernel_to_refuse() -> None:
    model = Product(RUN, (512, 512))
    model.offsets[0] = model.offsets[1]
    assert refusals(model.facts()) == [NO_BANDS]


def test_without_a_kernel_for_blocks_diagonals_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "has_native_kernel", lambda structure, device, dtype: structure.kind == "diagonal")
    assert refusals(Product(RUN, (512, 512)).facts()) == [NO_BANDS]


@needs_native
def test_few_tokens_would_wait_for_the_zeros_to_arrive() -> None:
    assert refusals(Product(RUN, (512, 512)).facts(tokens=1)) == [NO_FASTER.format("1.2")]


@pytest.mark.usefixtures("fresh_registries")
def test_a_registered_kernel_for_diagonals_keeps_them() -> None:
    class Kernel(Format[Diagonal]):
        def forward(
            self, structure: Diagonal, x: torch.Tensor, values: torch.Tensor, topology: Topology, out_features: int
        ) -> torch.Tensor:
            return x @ structure.unpack(values, topology, Shape(out_features, x.shape[1])).T

    register_kernel("diagonal", Kernel())
    assert refusals(Product(RUN, (512, 512)).facts()) == ["a registered kernel multiplies diagonals"]


def test_other_structures_do_not_match() -> None:
    model = Product(range(2), (32, 32))
    blocks = parse("block:16")
    topology = blocks.choose(torch.rand(32, 32), 0.5)

    class Blocks(Product):
        def forward(self, x: Any) -> Any:
            return STRUCTURED_LINEAR(x, self.values, [self.pointers, self.columns], None, None, None, 32, "block:16x16")

    model = Blocks(range(2), (32, 32))
    model.pointers, model.columns = (nn.Parameter(index, requires_grad=False) for index in topology)
    assert refusals(model.facts()) == []


# ---- measured


@pytest.mark.parametrize(
    ("blocks", "diagonals", "folds"),
    [(1.0, 1.2, True), (1.0, 1.02, False), (1.2, 1.0, False)],
    ids=["faster", "tied", "slower"],
)
@needs_native
def test_measurements_decide_where_they_may(
    blocks: float, diagonals: float, folds: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """Times are made up, so that each outcome occurs: what is raced is the product in both forms, each beside dense."""
    raced: list[float] = []

    def race(runs: Any, device: str, budget: object) -> dict[Any, float]:
        for run in runs.values():
            run()
        raced.append(diagonals if len(raced) else blocks)
        return {candidate: 5.0 if candidate.kernel == "dense" else raced[-1] for candidate in runs}

    monkeypatch.setenv("PADST_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(search, "raced_seconds", race)
    monkeypatch.setattr(search, "launches_of", lambda run: [])
    facts, rule = Product(RUN, (512, 512), into=True).facts(), FoldBands(measure=True)
    if folds:
        assert rule.run(facts).rewritten == 1
    else:
        assert refusals(facts, rule) == ["blocks, which would store 1.3 times the values, were measured to be no faster"]
    assert len(raced) == 2


@needs_native
def test_where_nothing_may_be_measured_the_cost_model_decides() -> None:
    assert FoldBands(measure=True, effort="off").run(Product(RUN, (512, 512)).facts()).rewritten == 1


def test_options_are_part_of_the_identity() -> None:
    rules = FoldBands(), FoldBands(measure=True), FoldBands(measure=True, effort="full")
    assert len({rule.uuid() for rule in rules}) == 3


# ---- compiled


def banded_layers(permutation: str) -> nn.Module:
    """Two layers of diagonals, each of which lies in one run."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 512)).eval()
    padst.sparsify(model, padst.SparsitySpec(structure=Diagonal(), sparsity=1 - 97 / 512, permutation=permutation))
    for layer in (model[0], model[2]):
        layer.offsets.copy_(torch.arange(97) + 37)
    return model


@needs_native
@pytest.mark.parametrize("permutation", ["none", "random"])
def test_compiled_layers_give_the_same_and_notice_other_offsets(permutation: str) -> None:
    model, x = banded_layers(permutation), torch.randn(TOKENS, 512)
    with torch.no_grad():
        compiled = torch.compile(model, backend=backend, options={"kernels": "sparse", "verify": True})
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-4)
        model[2].values.mul_(2)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-4)
        model[2].offsets.copy_(torch.arange(97) * 3)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-4)


@needs_native
def test_explanations_name_both_forms_and_count_weights_without_zeros() -> None:
    with torch.no_grad():
        explanation = padst.explain(banded_layers("random"), torch.randn(TOKENS, 512), options={"kernels": "sparse"})
    assert [layer.structure for layer in explanation.layers] == ["diagonal as block:32x32"] * 2
    assert [layer.density for layer in explanation.layers] == [97 / 512] * 2
    assert explanation.permutations.total == 2
