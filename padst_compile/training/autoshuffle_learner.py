"""A layer's permutation as a soft matrix under a penalty: what the matrix listens to, and when it becomes hard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from padst_compile.errors import AttachError
from padst_compile.kernels import gradient_tap
from padst_compile.kernels.soft_permute import HARD, SOFT
from padst_compile.layers import SoftPermutation
from padst_compile.training.config import DSTConfig, LearnedPermutation
from padst_compile.training.learner import NOTHING
from padst_compile.training.passes import Passes
from padst_compile.training.permutations import birkhoff
from padst_compile.training.permutations.autoshuffle import AutoShuffle, should_harden, weight_at
from padst_compile.training.reducer import Reducer, Sum
from padst_compile.training.schedule import is_due
from padst_compile.training.trained_layer import TrainedLayer
from padst_compile.training.world import World

# Of Adam, in units of 1/n. In an experiment with a planted permutation of 64 features under noise, 1.0/n found 0.3 of it in
# 400 steps, 0.3/n 0.4 in 700, and 0.1/n 0.5 in 1200.
_LEARNING_RATE = 0.2


class AutoShuffleLearner:
    """A soft matrix under a penalty until it is nearly hard (PA-DST section 4); `permutations.autoshuffle` has the method."""

    def __init__(self, trained: TrainedLayer, config: DSTConfig, method: LearnedPermutation) -> None:
        start = trained.permutation
        assert config.total_steps is not None
        if bool((trained.exchange_sets() != 0).any()):
            raise AttachError(
                f"layer {trained.name!r} may exchange only some features (permutation_group='foldable'), while the matrix of "
                "autoshuffle mixes all; learn with 'sinkhorn_ste' or 'regroup', or sparsify with permutation_group='any'"
            )
        self.trained, self.config, self.method = trained, config, method
        self._warmup, self._deadline = (int(part * config.total_steps) for part in (method.warmup, method.deadline))
        generator = trained.generator(config.seed, 0, "soft permutation")
        matrix = birkhoff.initial(start.numel(), generator=generator).to(start.device)
        anchor = torch.zeros(1, device=matrix.device, requires_grad=True)
        self._soft = SoftPermutation(matrix, torch.tensor([SOFT], dtype=torch.uint8), anchor)
        for layer in trained.layers:
            layer.soft = self._soft
        learner = self._make(matrix)
        self._learner: AutoShuffle | None = learner
        self._penalty = learner.penalty()
        self.hardened_at: int | None = None
        self._gradient = _MatrixGradient(trained.passes)

    def _make(self, matrix: torch.Tensor) -> AutoShuffle:
        return AutoShuffle(matrix, learning_rate=_LEARNING_RATE * self.method.learning_rate, owner=self.trained.name)

    @property
    def penalty(self) -> float:
        """See `PermutationLearner`."""
        return self._penalty

    @property
    def hard(self) -> bool:
        """See `PermutationLearner`."""
        return self._learner is None

    def permutation(self) -> torch.Tensor:
        """See `PermutationLearner`."""
        return self.trained.permutation if self._learner is None else self._learner.harden()

    def listen(self, step: int) -> tuple[Sequence[Reducer], Sequence[Reducer]]:
        """See `PermutationLearner`; listens to its own matrix instead, at every step."""
        self._gradient = _MatrixGradient(self.trained.passes)
        if self._learner is None:
            gradient_tap.forget(self._soft.state)
        else:
            gradient_tap.listen(self._soft.state, self._gradient)
        return NOTHING

    def after_step(self, step: int, world: World, loss_scale: float) -> None:
        """See `PermutationLearner`."""
        if self._learner is None:
            return
        self._follow_device()
        own = self._gradient.sum_like(self._learner.matrix)
        total = world.add_up(own).div_(world.size * loss_scale)
        if bool(total.sum().isfinite()):  # alike on all ranks: NaN spreads
            self._learner.step(total, weight_at(step - 1, self._warmup, self.method.penalty_weight))
            self._penalty = world.agree_on_number(self._learner.penalty(), total.device)
        ready = should_harden(self._penalty, step, threshold=self.method.threshold, deadline=self._deadline)
        if ready and not is_due(step, self.config, self.trained.offset):  # else what has just grown would meet another order
            self._harden(world)
            self.hardened_at = step

    def finish(self, world: World) -> None:
        """See `PermutationLearner`."""
        self._harden(world)
        gradient_tap.forget(self._soft.state)
        for layer in self.trained.layers:
            layer.soft = None

    def state_dict(self) -> dict[str, Any]:
        """See `PermutationLearner`."""
        # detached, so that a state in memory keeps its matrix when the layer gives its own back
        soft = None if self._learner is None else {k: v.detach() for k, v in self._learner.state_dict().items()}
        return {"soft": soft, "penalty": self._penalty, "hardened_at": self.hardened_at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `PermutationLearner`."""
        if state["soft"] is None:
            self._release()
        elif self._learner is not None:
            self._learner.load_state_dict(state["soft"])
        else:  # hard here, soft in the checkpoint
            self._soft.matrix.untyped_storage().resize_(self._soft.matrix.numel() * self._soft.matrix.element_size())
            self._learner = self._make(self._soft.matrix)
            self._learner.load_state_dict(state["soft"])
            self._soft.state.fill_(SOFT)
        self._penalty, self.hardened_at = state["penalty"], state["hardened_at"]

    def _harden(self, world: World) -> None:
        if self._learner is not None:
            chosen = world.agree(self._learner.harden().to(self._soft.matrix.device))
            self.trained.layer.set_permutation(chosen)
            self._release()

    def _release(self) -> None:
        """From here on the permutation counts; the matrix keeps its shape, which programs check, and gives back its memory."""
        self._soft.state.fill_(HARD)
        self._learner, self._penalty = None, 0.0
        matrix = self._soft.matrix
        with torch.no_grad():
            matrix.set_(torch.empty_like(matrix))  # type: ignore[call-overload]  # takes a tensor
        matrix.untyped_storage().resize_(0)

    def _follow_device(self) -> None:
        if self._learner is not None and self._learner.matrix is not self._soft.matrix:  # the model was moved
            state = self._learner.state_dict()
            self._learner = self._make(self._soft.matrix)
            self._learner.load_state_dict(state)


class _MatrixGradient(Sum):
    """Adds up the gradient of a soft matrix over the backward passes before a step (`gradient_tap`)."""

    def __init__(self, passes: Passes) -> None:
        super().__init__()
        self.poisoned = 0
        self._passes = passes
        passes.watch(self)

    def products(
        self, grad: torch.Tensor, x: torch.Tensor, rows: torch.Tensor | None = None, columns: torch.Tensor | None = None
    ) -> None:
        """See `GradientListener.products`."""
        self.weight(gradient_tap.product(grad, x, rows, columns))

    def weight(self, gradient: torch.Tensor) -> None:
        """See `GradientListener.weight`."""
        self._passes.enter()
        if not bool(gradient.sum().isfinite()):
            self.poisoned += 1
        else:
            self.gather(gradient)

    def clear(self) -> None:
        """See `Restartable.clear`."""
        super().clear()
        self.poisoned = 0

    def sum_like(self, matrix: torch.Tensor) -> torch.Tensor:
        """The sum in the shape of `matrix`, zeros if nothing came, NaN if anything was not finite."""
        if self.poisoned:
            return torch.full_like(matrix, torch.nan)
        return torch.zeros_like(matrix) if self.total is None else self.total
