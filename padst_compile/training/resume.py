"""What keeps a training state from being loaded: it is none, or of another model, specification or configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from padst_compile.errors import ResumeError
from padst_compile.training.config import DSTConfig
from padst_compile.training.trained_layer import TrainedLayer

VERSION = 1
_KEYS = ("version", "config", "steps", "updates", "skipped", "last_update", "layers")


def check_state(state: Mapping[str, Any], config: DSTConfig, layers: Sequence[TrainedLayer], optimizers: int) -> None:
    """Compare a state with what it is to be loaded into, but for weights, topologies and permutations.

    Args:
        state: from `Runtime.state_dict`.
        config: of the runtime.
        layers: of the runtime.
        optimizers: how many it has.

    Raises:
        ResumeError: they do not belong together; the message says in what they differ.
    """
    missing = [name for name in _KEYS if name not in state]
    if missing:
        raise ResumeError(f"this is no training state: it has no {', '.join(missing)}; save runtime.state_dict()")
    if state["version"] != VERSION:
        raise ResumeError(f"training states of version {VERSION} can be loaded, this one has version {state['version']!r}")
    for name, value in config.to_dict().items():
        if state["config"].get(name) != value:
            raise ResumeError(
                f"the checkpoint was made with {name}={state['config'].get(name)!r}, this runtime has {value!r}; attach with it"
            )
    if len(state["steps"]) != optimizers:
        raise ResumeError(f"the checkpoint has {len(state['steps'])} optimizers, this runtime {optimizers}")
    names = {layer.name for layer in layers}
    if names != state["layers"].keys():
        odd = sorted(names ^ state["layers"].keys())
        raise ResumeError(f"the checkpoint has other sparse layers than this model: they differ in {', '.join(odd[:3])}")
    for layer in layers:
        _check_layer(layer, state["layers"][layer.name])


def check_fingerprints(state: Mapping[str, Any], layers: Sequence[TrainedLayer]) -> None:
    """See whether the model has the topology and permutations that the state goes with.

    Raises:
        ResumeError: it has not.
    """
    for layer in layers:
        if layer.fingerprint() != state["layers"][layer.name]["fingerprint"]:
            raise ResumeError(
                f"layer {layer.name!r} has another topology or permutation than the checkpoint; "
                "load the model's state_dict first"
            )


def _check_layer(layer: TrainedLayer, stored: Mapping[str, Any]) -> None:
    own = layer.state_dict()
    for key in ("structure", "shape"):
        if own[key] != stored[key]:
            raise ResumeError(f"layer {layer.name!r} has {key} {stored[key]} in the checkpoint and {own[key]} here")
