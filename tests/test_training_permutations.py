"""The mathematics of learning permutations: hardening, soft matrices, gradients, and that learners find what is planted."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from padst_compile import permutation
from padst_compile.errors import InvalidPermutationError, PermutationScoresError, ResumeError
from padst_compile.layers import LayerConfig, PermutedSparseLinear
from padst_compile.permutation_search.assignment import harden, harden_blocks
from padst_compile.structures import Block, Shape
from padst_compile.testing.strategies import permutations
from padst_compile.training.permutations import birkhoff, blocks
from padst_compile.training.permutations.autoshuffle import AutoShuffle, should_harden, weight_at
from padst_compile.training.permutations.report import distance
from padst_compile.training.permutations.sinkhorn import SinkhornSTE, sinkhorn, temperature_at

TURN = torch.tensor([2, 0, 1, 5, 3, 4], dtype=torch.int32)  # its inverse is another permutation
SIZES = st.integers(1, 12)
SEEDS = st.integers(0, 2**32 - 1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def integers(*shape: int, seed: int) -> torch.Tensor:
    """Whole numbers, whose sums and products are exact in float64."""
    return torch.randint(-9, 10, shape, generator=seeded(seed)).double()


# Soft and hard


@pytest.mark.parametrize("side", ["input", "output"])
def test_soft_and_hard_application_agree_exactly_on_both_sides_forward_and_backward(side: str) -> None:
    structure, shape = Block(2), Shape(6, 6)
    topology = structure.choose(integers(6, 6, seed=0).abs(), 0.5)
    weight = structure.pack(integers(6, 6, seed=1), topology)
    layer = PermutedSparseLinear(LayerConfig(shape, structure, side), nn.Parameter(weight), topology, TURN)
    plain = PermutedSparseLinear(LayerConfig(shape, structure), nn.Parameter(weight), topology)
    matrix = birkhoff.matrix_of(TURN, torch.float64)
    x, cotangent = integers(5, 6, seed=2), integers(5, 6, seed=3)

    def soft(inputs: torch.Tensor) -> torch.Tensor:
        return plain(F.linear(inputs, matrix)) if side == "input" else F.linear(plain(inputs), matrix)

    results = []
    for function, values in ((layer, layer.values), (soft, plain.values)):
        inputs = x.clone().requires_grad_()
        y = function(inputs)
        results.append((y, *torch.autograd.grad(y, (inputs, values), cotangent)))
    for hard, relaxed in zip(*results, strict=True):
        assert torch.equal(hard, relaxed)


@given(SIZES.flatmap(permutations))
def test_hardening_the_matrix_of_a_permutation_gives_it_back(p: torch.Tensor) -> None:
    assert torch.equal(harden(birkhoff.matrix_of(p)), p)


# Assignment


@given(st.integers(1, 5), SEEDS)
def test_harden_finds_the_largest_total(size: int, seed: int) -> None:
    scores = integers(size, size, seed=seed)
    p = harden(scores)
    permutation.check(p, size, "harden")
    totals = [sum(float(scores[i, j]) for i, j in enumerate(order)) for order in itertools.permutations(range(size))]
    assert float(scores[torch.arange(size), p.long()].sum()) == max(totals)


def test_assignment_gives_a_permutation_where_the_largest_entry_of_each_row_does_not() -> None:
    scores = torch.tensor([[0.5, 0.4, 0.1], [0.5, 0.2, 0.3], [0.0, 0.4, 0.6]])
    assert scores.argmax(1).tolist() == [0, 0, 2]
    assert harden(scores).tolist() == [1, 0, 2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64], ids=str)
def test_harden_takes_every_dtype_and_equal_scores_give_the_identity(dtype: torch.dtype) -> None:
    p = harden(torch.ones(7, 7, dtype=dtype))
    assert p.dtype == torch.int32
    assert permutation.is_identity(p)


def test_harden_decides_in_float64() -> None:
    scores = torch.zeros(2, 2, dtype=torch.float64)
    scores[0, 1] = 1 + 2**-40
    scores[0, 0] = 1
    assert harden(scores).tolist() == [1, 0]


def test_blocks_harden_one_by_one() -> None:
    scores = integers(4, 5, 5, seed=4)
    assert torch.equal(harden_blocks(scores), torch.stack([harden(block) for block in scores]))
    assert harden_blocks(torch.zeros(0, 3, 3)).shape == (0, 3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_harden_refuses_scores_that_are_not_finite_and_names_their_owner(value: float) -> None:
    scores = torch.eye(3)
    scores[1, 2] = value
    with pytest.raises(PermutationScoresError, match="blocks.0.fc: the scores hold NaN or infinite"):
        harden(scores, "blocks.0.fc")


@pytest.mark.parametrize("shape", [(3,), (2, 3), (1, 3, 3)], ids=str)
def test_harden_refuses_scores_that_are_not_square(shape: tuple[int, ...]) -> None:
    with pytest.raises(PermutationScoresError, match="fc: .* square"):
        harden(torch.zeros(shape), "fc")
    with pytest.raises(PermutationScoresError, match="fc: .* square"):
        harden_blocks(torch.zeros(2, 3, 4), "fc")


# The Birkhoff polytope


@given(SIZES.flatmap(permutations))
def test_the_penalty_is_zero_for_permutations(p: torch.Tensor) -> None:
    assert float(birkhoff.penalty(birkhoff.matrix_of(p))) == 0.0


@given(st.integers(1, 40))
def test_the_penalty_of_the_uniform_matrix_is_known_and_below_one(size: int) -> None:
    uniform = torch.full((size, size), 1 / size, dtype=torch.float64)
    assert float(birkhoff.penalty(uniform)) == pytest.approx(1 - size**-0.5, abs=1e-12)


@given(st.integers(2, 10), SEEDS)
def test_the_penalty_lies_between_both_on_the_polytope(size: int, seed: int) -> None:
    matrix = birkhoff.project_(torch.rand(size, size, generator=seeded(seed), dtype=torch.float64), 50)
    assert 0 < float(birkhoff.penalty(matrix)) <= 1 - size**-0.5 + 1e-6


def penalty_as_defined(matrix: torch.Tensor) -> torch.Tensor:
    lines = [line for dim in (0, 1) for line in matrix.unbind(dim)]
    return torch.stack([line.abs().sum() - line.square().sum().sqrt() for line in lines]).sum() / (2 * matrix.shape[0])


@given(st.integers(1, 8), SEEDS)
def test_penalty_and_gradient_agree_with_autograd_of_the_definition(size: int, seed: int) -> None:
    matrix = torch.randn(size, size, generator=seeded(seed), dtype=torch.float64)  # no entry is zero
    leaf = matrix.clone().requires_grad_()
    value = penalty_as_defined(leaf)
    value.backward()
    torch.testing.assert_close(birkhoff.penalty(matrix), value.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(birkhoff.penalty_gradient(matrix), leaf.grad, rtol=1e-12, atol=1e-12)


def test_the_gradient_at_zeros_is_that_towards_positive_values() -> None:
    matrix = torch.zeros(3, 3, dtype=torch.float64)
    matrix[0, 1] = matrix[1, 0] = 1.0  # the third row and column are zero
    gradient = birkhoff.penalty_gradient(matrix)
    assert torch.isfinite(gradient).all()
    assert gradient[0, 1] == gradient[1, 0] == 0.0
    step = 1e-7
    moved = matrix.clone()
    moved[0, 0] += step
    rate = (birkhoff.penalty(moved) - birkhoff.penalty(matrix)) / step
    assert float(gradient[0, 0]) == pytest.approx(float(rate), abs=1e-6)
    assert float(gradient[2, 2]) == pytest.approx(2 / 6)


def test_the_penalty_of_16_bit_matrices_is_computed_in_float32() -> None:
    matrix = torch.full((300, 300), 2.0**-9).bfloat16()
    assert birkhoff.penalty(matrix).dtype == birkhoff.penalty_gradient(matrix).dtype == torch.float32
    torch.testing.assert_close(birkhoff.penalty(matrix), birkhoff.penalty(matrix.double()).float())


@given(st.integers(1, 12), SEEDS)
def test_projection_ends_on_the_polytope_in_place(size: int, seed: int) -> None:
    matrix = torch.rand(size, size, generator=seeded(seed)) + 0.01
    memory = matrix.data_ptr()
    assert birkhoff.project_(matrix, 100) is matrix
    assert matrix.data_ptr() == memory
    assert bool((matrix >= 0).all())
    torch.testing.assert_close(matrix.sum(0), torch.ones(size), rtol=0, atol=1e-4)
    torch.testing.assert_close(matrix.sum(1), torch.ones(size), rtol=0, atol=1e-5)


def test_projection_makes_lines_without_a_positive_entry_uniform() -> None:
    matrix = torch.eye(4)
    matrix[2] = -1.0
    matrix[:, 2] = -1.0
    birkhoff.project_(matrix, 1)
    assert torch.isfinite(matrix).all()
    torch.testing.assert_close(matrix.sum(1), torch.ones(4))
    assert bool((matrix[:, 2] > 0).all())
    hollow = birkhoff.project_(torch.zeros(3, 3))
    torch.testing.assert_close(hollow, torch.full((3, 3), 1 / 3))


def test_a_permutation_is_a_fixed_point_of_projection() -> None:
    matrix = birkhoff.matrix_of(TURN)
    assert torch.equal(birkhoff.project_(matrix.clone(), 3), matrix)


def test_projection_refuses_16_bits() -> None:
    with pytest.raises(PermutationScoresError, match=r"float32, not torch\.bfloat16"):
        birkhoff.project_(torch.eye(3, dtype=torch.bfloat16))


def test_the_initial_matrix_is_doubly_stochastic_and_nearly_uniform() -> None:
    matrix = birkhoff.initial(6, generator=seeded())
    torch.testing.assert_close(matrix.sum(0), torch.ones(6), rtol=0, atol=1e-5)
    torch.testing.assert_close(matrix.sum(1), torch.ones(6), rtol=0, atol=1e-5)
    assert float((matrix * 6 - 1).abs().max()) < 0.15
    assert matrix.unique().numel() > 6
    assert torch.equal(matrix, birkhoff.initial(6, generator=seeded()))


# AutoShuffle


def test_the_penalty_warms_up_linearly_and_stays() -> None:
    assert [weight_at(step, 4, 2.0) for step in (0, 1, 4, 9)] == [0.0, 0.5, 2.0, 2.0]
    assert weight_at(0, 0, 2.0) == 2.0


@pytest.mark.parametrize(
    ("penalty", "step", "deadline", "expected"),
    [(0.1, 0, None, True), (0.11, 0, None, False), (0.5, 99, 100, False), (0.5, 100, 100, True), (0.5, 10**9, None, False)],
)
def test_a_layer_hardens_under_the_threshold_or_at_the_deadline(
    penalty: float, step: int, deadline: int | None, expected: bool
) -> None:
    assert should_harden(penalty, step, threshold=0.11, deadline=deadline) is expected


def noisy_task(target: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The gradient of a loss that is linear in M and least at `target`, buried in noise."""
    size = target.numel()
    return (torch.randn(size, size, generator=generator) - birkhoff.matrix_of(target)) / size


def descend(learner: AutoShuffle, target: torch.Tensor, steps: range, generator: torch.Generator) -> None:
    for step in steps:
        learner.step(noisy_task(target, generator), weight_at(step, 100, 1.0))


@pytest.mark.parametrize("size", [16, 48])
def test_autoshuffle_finds_a_planted_permutation_and_becomes_hard(size: int) -> None:
    generator = seeded(size)
    target = permutation.random(size, generator)
    learner = AutoShuffle(birkhoff.initial(size, generator=generator), learning_rate=0.3)
    assert not torch.equal(learner.harden(), target)
    assert not should_harden(learner.penalty(), 0)
    descend(learner, target, range(400), generator)
    assert should_harden(learner.penalty(), 400)
    assert torch.equal(learner.harden(), target)
    torch.testing.assert_close(learner.matrix.sum(1), torch.ones(size))


def test_without_a_task_the_penalty_alone_makes_a_matrix_hard() -> None:
    matrix = birkhoff.project_(0.5 + torch.rand(32, 32, generator=seeded()), 20)
    learner = AutoShuffle(matrix, learning_rate=0.1)
    for _ in range(600):
        learner.step(torch.zeros(32, 32), 1.0)
    assert learner.penalty() < 0.11
    permutation.check(learner.harden(), 32, "learner")


def test_the_step_changes_the_given_matrix_in_place_and_leaves_the_gradient_alone() -> None:
    matrix = birkhoff.initial(6, generator=seeded())
    before, gradient = matrix.clone(), noisy_task(TURN, seeded(1))
    kept = gradient.clone()
    AutoShuffle(matrix).step(gradient, 1.0)
    assert not torch.equal(matrix, before)
    assert torch.equal(gradient, kept)
    AutoShuffle(matrix).step(gradient.bfloat16(), 1.0)
    assert matrix.dtype == torch.float32


def test_autoshuffle_resumes_bit_for_bit() -> None:
    generator = seeded(3)
    learner = AutoShuffle(birkhoff.initial(6, generator=generator))
    descend(learner, TURN, range(20), generator)
    state, random_state = copy.deepcopy(learner.state_dict()), generator.get_state()
    descend(learner, TURN, range(20, 40), generator)

    resumed = AutoShuffle(torch.zeros(6, 6))
    matrix = resumed.matrix
    resumed.load_state_dict(state)
    assert resumed.matrix is matrix
    descend(resumed, TURN, range(20, 40), torch.Generator().set_state(random_state))
    assert torch.equal(resumed.matrix, learner.matrix)
    for name, value in learner.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


@pytest.mark.parametrize("change", ["size", "missing", "empty"])
def test_autoshuffle_refuses_the_state_of_something_else_and_keeps_its_own(change: str) -> None:
    learner = AutoShuffle(birkhoff.matrix_of(TURN), owner="blocks.0.fc")
    state = AutoShuffle(torch.zeros(4, 4)).state_dict() if change == "size" else dict(learner.state_dict())
    if change == "missing":
        del state["mean"]
    if change == "empty":
        state = {}
    with pytest.raises(ResumeError, match=r"blocks\.0\.fc: "):
        learner.load_state_dict(state)
    assert torch.equal(learner.matrix, birkhoff.matrix_of(TURN))


def test_a_gradient_that_is_not_finite_shows_when_hardening() -> None:
    learner = AutoShuffle(birkhoff.initial(6, generator=seeded()), owner="fc")
    learner.step(torch.full((6, 6), float("nan")), 1.0)
    with pytest.raises(PermutationScoresError, match="fc: "):
        learner.harden()


# Blocks


@given(st.integers(1, 60), st.integers(1, 20))
def test_blocks_cover_every_place_once_and_are_about_equal(size: int, width: int) -> None:
    parts = blocks.split([torch.arange(size)], size, width)
    assert sorted(parts.places[parts.valid].tolist()) == list(range(size))
    counts = parts.valid.sum(1)
    assert int(counts.max()) <= width
    assert int(counts.max() - counts.min()) <= 1


def test_a_block_takes_places_from_all_over_its_group() -> None:
    parts = blocks.split([torch.arange(8), torch.arange(8, 12)], 12, 4)
    assert parts.places.tolist() == [[0, 2, 4, 6], [1, 3, 5, 7], [8, 9, 10, 11]]


@given(st.integers(1, 20), st.integers(1, 7), SEEDS, st.data())
def test_permutations_within_blocks_stay_within_and_apply_after_the_start(
    size: int, width: int, seed: int, data: st.DataObject
) -> None:
    start = data.draw(permutations(size))
    parts = blocks.split([torch.arange(size // 2, size)], size, width)
    scores = torch.rand(parts.places.shape[0], *[parts.places.shape[1]] * 2, generator=seeded(seed))
    learner = SinkhornSTE(start, parts, updates=5)
    learner.update(scores - 0.5)
    p = permutation.check(learner.hard(), size, "learner")
    assert torch.equal(p[: size // 2], start[: size // 2])
    for places in (row[valid] for row, valid in zip(parts.places, parts.valid, strict=True)):
        assert sorted(p[places].tolist()) == sorted(start[places].tolist())


def test_copies_of_a_group_move_alike_and_add_their_gradients() -> None:
    parts = blocks.split([torch.tensor([[0, 1, 2], [3, 4, 5]]), torch.tensor([6, 7])], 8, 3)
    assert parts.orders.tolist() == [0, 0, 1]
    for sign, moves in ((1, False), (-1, True)):
        learner = SinkhornSTE(torch.arange(8), parts, updates=1, learning_rate=1.0)
        assert learner.logits.shape == (2, 3, 3)
        gradient = torch.zeros(3, 3, 3)
        gradient[0] = sign * 3 * torch.eye(3)  # alone it would decide otherwise
        gradient[1] = sign * -4 * torch.eye(3)
        learner.update(gradient)
        found = learner.hard()
        assert (found[:3].tolist() != [0, 1, 2]) == moves
        assert torch.equal(found[3:6], found[:3] + 3)
        assert found[6:].tolist() == [6, 7]


@pytest.mark.parametrize(
    "groups", [[], [torch.tensor([0, 5])], [torch.tensor([-1])], [torch.tensor([0, 1]), torch.tensor([1])]]
)
def test_groups_that_are_no_disjoint_lists_of_places_are_refused(groups: list[torch.Tensor]) -> None:
    with pytest.raises(InvalidPermutationError, match=r"fc: groups .* disjoint lists of 0 … 4"):
        blocks.split(groups, 5, 2, "fc")


# Sinkhorn and straight-through


def test_sinkhorn_makes_rows_and_columns_sum_to_one_and_keeps_the_order_of_logits() -> None:
    logits = torch.randn(3, 7, 7, generator=seeded(), dtype=torch.float64)
    soft = sinkhorn(logits, 200)
    torch.testing.assert_close(soft.sum(1), torch.ones(3, 7, dtype=torch.float64))
    torch.testing.assert_close(soft.sum(2), torch.ones(3, 7, dtype=torch.float64))
    assert torch.equal(harden_blocks(soft.log()), harden_blocks(logits))
    assert float(birkhoff.penalty(sinkhorn(logits, 50, 0.02)[0])) < float(birkhoff.penalty(soft[0]))


def test_the_temperature_falls_linearly_and_stays() -> None:
    assert [temperature_at(update, 10) for update in (0, 5, 10, 99)] == [1.0, pytest.approx(0.55), 0.1, 0.1]
    assert temperature_at(0, 0) == 0.1


def test_before_the_first_update_the_start_is_hard() -> None:
    parts = blocks.split([torch.arange(6)], 6, 4)
    assert torch.equal(SinkhornSTE(TURN, parts, updates=1).hard(), TURN)


@pytest.mark.parametrize(("size", "width"), [(12, 12), (24, 8), (23, 8)])
def test_sinkhorn_ste_finds_a_planted_permutation_within_its_blocks(size: int, width: int) -> None:
    generator = seeded(size)
    start = permutation.random(size, generator)
    parts = blocks.split([torch.arange(size)], size, width)
    target = start.clone()
    for places in (row[valid] for row, valid in zip(parts.places, parts.valid, strict=True)):
        target[places] = start[places[torch.randperm(places.numel(), generator=generator)]]
    learner = SinkhornSTE(start, parts, updates=60)
    assert not torch.equal(learner.hard(), target)
    for _ in range(60):
        x = torch.randn(64, size, generator=generator)
        difference = x[:, learner.hard().long()] - x[:, target.long()]  # of the loss |x[p] - x[target]|^2 / 2
        whole = difference.T @ x / 64  # of the loss by the permutation's matrix
        learner.update(whole[learner.places[:, :, None], learner.features[:, None, :]])
    assert torch.equal(learner.hard(), target)
    assert learner.update_count == 60


def test_what_fills_up_a_block_gets_no_share_and_no_gradient() -> None:
    parts = blocks.split([torch.arange(5), torch.arange(5, 7)], 7, 5)
    assert parts.valid.tolist()[1] == [True, True, False, False, False]
    learner = SinkhornSTE(permutation.identity(7), parts, updates=1)
    learner.update(torch.randn(2, 5, 5, generator=seeded()))
    soft = learner.soft()[1]
    assert torch.equal(soft[2:, 2:], torch.eye(3))
    assert soft[:2, 2:].abs().sum() == soft[2:, :2].abs().sum() == 0
    torch.testing.assert_close(soft[:2, :2].sum(0), torch.ones(2))
    first = SinkhornSTE(permutation.identity(7), parts, updates=1).logits
    assert torch.equal(learner.logits[1, 2:], first[1, 2:])
    assert torch.equal(learner.logits[1, :, 2:], first[1, :, 2:])


def test_sinkhorn_ste_passes_the_gradient_of_the_hard_matrix_to_the_soft_one() -> None:
    parts = blocks.split([torch.arange(6)], 6, 6)
    learner = SinkhornSTE(TURN, parts, updates=4, learning_rate=0.1)
    cotangent = torch.randn(1, 6, 6, generator=seeded())
    logits = learner.logits.clone().requires_grad_()
    sinkhorn(logits, 5, 1.0).mul(cotangent).sum().backward()
    expected = learner.logits - 0.1 * logits.grad.sign()  # what Adam does first
    learner.update(cotangent)
    torch.testing.assert_close(learner.logits, expected, rtol=0, atol=1e-4)


def test_sinkhorn_ste_resumes_bit_for_bit_in_the_midst_of_annealing() -> None:
    generator = seeded(5)
    parts = blocks.split([torch.arange(10)], 10, 4)

    def updates(learner: SinkhornSTE, count: int, generator: torch.Generator) -> None:
        for _ in range(count):
            learner.update(torch.randn(learner.logits.shape, generator=generator))

    start = permutation.random(10, generator)
    learner = SinkhornSTE(start, parts, updates=12)
    updates(learner, 6, generator)
    state, random_state = copy.deepcopy(learner.state_dict()), generator.get_state()
    updates(learner, 6, generator)
    resumed = SinkhornSTE(permutation.identity(10), parts, updates=12)
    resumed.load_state_dict(state)
    updates(resumed, 6, torch.Generator().set_state(random_state))
    assert torch.equal(resumed.logits, learner.logits)
    assert torch.equal(resumed.soft(), learner.soft())
    assert torch.equal(resumed.hard(), learner.hard())


def test_sinkhorn_ste_refuses_other_blocks_layers_and_methods() -> None:
    six = SinkhornSTE(TURN, blocks.split([torch.arange(6)], 6, 3), updates=1, owner="fc")
    other = SinkhornSTE(TURN, blocks.split([torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5])], 6, 3), updates=1)
    for state, message in (
        (other.state_dict(), "other blocks"),
        (SinkhornSTE(torch.arange(9), blocks.split([torch.arange(9)], 9, 3), updates=1).state_dict(), "'start' does not fit"),
        (AutoShuffle(torch.eye(6)).state_dict(), "another method"),
    ):
        with pytest.raises(ResumeError, match=f"fc: .*{message}"):
            six.load_state_dict(state)


# Report


def test_equal_permutations_are_at_no_distance_and_the_reverse_is_farthest() -> None:
    assert distance(TURN, TURN) == distance(torch.arange(5)) == distance(torch.tensor([0]))
    assert (distance(TURN, TURN).moved, distance(TURN, TURN).displacement, distance(TURN, TURN).inversions) == (0, 0, 0)
    reverse = distance(torch.arange(9, -1, -1))
    assert (reverse.moved, reverse.inversions) == (1.0, 1.0)
    assert reverse.displacement == pytest.approx(5.0 * 30 / 99)


def test_a_random_permutation_is_at_the_distances_that_the_definitions_say() -> None:
    found = distance(permutation.random(2000, seeded(0)), permutation.random(2000, seeded(1)))
    assert found.moved > 0.99
    assert found.displacement == pytest.approx(1.0, abs=0.1)
    assert found.inversions == pytest.approx(0.5, abs=0.05)


@given(st.integers(2, 8).flatmap(lambda size: st.tuples(permutations(size), permutations(size))))
def test_distances_follow_their_definitions(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    p, other = (one.tolist() for one in pair)
    size = len(p)
    elsewhere = [other.index(feature) for feature in p]
    pairs = list(itertools.combinations(range(size), 2))
    found = distance(*pair)
    assert found.moved == pytest.approx(sum(i != j for i, j in enumerate(elsewhere)) / size)
    mean = sum(abs(i - j) for i, j in enumerate(elsewhere)) / size
    assert found.displacement == pytest.approx(mean / ((size**2 - 1) / (3 * size)))
    assert found.inversions == pytest.approx(sum(elsewhere[i] > elsewhere[j] for i, j in pairs) / len(pairs))
