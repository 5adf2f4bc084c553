"""Who learns the permutation of which layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from padst_compile import permutation
from padst_compile.errors import AttachError
from padst_compile.training.autoshuffle_learner import AutoShuffleLearner
from padst_compile.training.config import DSTConfig, LearnedPermutation
from padst_compile.training.following_learner import FollowingLearner
from padst_compile.training.learner import PermutationLearner
from padst_compile.training.regroup_learner import RegroupLearner
from padst_compile.training.sinkhorn_learner import SinkhornLearner
from padst_compile.training.trained_layer import TrainedLayer


def make_learners(layers: Sequence[TrainedLayer], config: DSTConfig) -> list[PermutationLearner | None]:
    """The learner of each layer's permutation; None where there is none to learn, or nothing that it may exchange.

    Layers that may only have one permutation together (`Exchanges`) learn it together under sinkhorn_ste and keep it under
    the other methods, or where some of them are not in training or have another optimizer.

    Raises:
        AttachError: no layer has anything to learn, or autoshuffle, whose matrices mix all features, may not.
    """
    if config.permutation is None:
        return [None] * len(layers)
    together = _sharing(layers)
    leaders: dict[int, SinkhornLearner] = {}
    learners: list[PermutationLearner | None] = []
    for trained in layers:
        exchanges, mates = trained.exchanges, together.get(id(trained.exchanges), [trained])
        alone = exchanges is None or exchanges.holders == len(trained.layers)
        if trained.layer.permutation is None or (exchanges is not None and not exchanges.sets):
            learners.append(None)
        elif alone:
            learners.append(_make_learner(trained, config, config.permutation))
        elif config.permutation.method != "sinkhorn_ste" or not _complete(mates):
            learners.append(None)
        elif trained is mates[0]:
            leaders[id(exchanges)] = SinkhornLearner(trained, config, config.permutation, mates[1:])
            learners.append(leaders[id(exchanges)])
        else:
            learners.append(FollowingLearner(leaders[id(exchanges)], trained))
    if not any(learners):
        raise AttachError(
            "no layer in training has a permutation that it may learn: what folds for free is the identity alone, or must be "
            "shared; sparsify with permutation_group='any', or leave DSTConfig.permutation out"
        )
    return learners


def _make_learner(trained: TrainedLayer, config: DSTConfig, method: LearnedPermutation) -> PermutationLearner | None:
    start = trained.permutation
    permutation.check(start, start.numel(), trained.name)
    match method.method:
        case "autoshuffle":
            return AutoShuffleLearner(trained, config, method)
        case "sinkhorn_ste":
            return SinkhornLearner(trained, config, method)
        case "regroup":
            return None if bool((trained.exchange_sets() < 0).all()) else RegroupLearner(trained, config, method)


def _sharing(layers: Sequence[TrainedLayer]) -> dict[int, list[TrainedLayer]]:
    """The layers that hold each `Exchanges`, by its id."""
    found: dict[int, list[TrainedLayer]] = {}
    for trained in layers:
        if trained.exchanges is not None:
            found.setdefault(id(trained.exchanges), []).append(trained)
    return found


def _complete(mates: Sequence[TrainedLayer]) -> bool:
    """Whether all layers that must have one permutation take part, and step together."""
    first = mates[0]
    assert first.exchanges is not None  # or it would have no mates
    alike = all(each.optimizer is first.optimizer and torch.equal(each.permutation, first.permutation) for each in mates)
    return alike and sum(len(each.layers) for each in mates) == first.exchanges.holders
