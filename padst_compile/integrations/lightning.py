"""Sparse training in Lightning's `Trainer`.

    from padst_compile.integrations.lightning import PadstCallback

    module = padst.sparsify(module, spec)
    config = lambda steps: padst.DSTConfig(method="rigl", total_steps=steps)
    lightning.Trainer(callbacks=[PadstCallback(config)]).fit(module, data)

The callback attaches when the training starts, logs the runtime's metrics, keeps its state in Lightning's checkpoints, goes on
from there, and finalizes the module when the training ends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from padst_compile.errors import ResumeError
from padst_compile.training import DSTConfig, Runtime, attach, finalize


class PadstCallback(Callback):
    """See the module.

    Args:
        config: of the training, or a function that makes it from the number of optimizer steps, which the trainer knows.

    Attributes:
        runtime: of the training, from its start on.
    """

    def __init__(self, config: DSTConfig | Callable[[int], DSTConfig]) -> None:
        self.config = config
        self.runtime: Runtime | None = None
        self._stored: dict[str, Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach, and load what was in the checkpoint.

        Raises:
            AttachError: see `padst.attach`.
            ResumeError: the checkpoint has no state of the runtime, or another's.
        """
        config = self.config(int(trainer.estimated_stepping_batches)) if callable(self.config) else self.config
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.runtime = attach(pl_module, trainer.optimizers, config, grad_scaler=scaler)
        if self._stored is not None:
            self.runtime.load_state_dict(self._stored)
        elif trainer.global_step > 0:
            raise ResumeError(f"{trainer.ckpt_path} has no state of the sparse training; it was saved without PadstCallback")
        self._stored = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *given: Any) -> None:
        """Log the runtime's metrics under `padst/`."""
        if self.runtime is not None:
            pl_module.log_dict({f"padst/{name}": value for name, value in self.runtime.metrics().items()})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finalize the module."""
        if self.runtime is not None:
            finalize(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """For Lightning's checkpoint."""
        return {"runtime": None if self.runtime is None else self.runtime.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what Lightning found in a checkpoint until the training starts."""
        self._stored = state_dict["runtime"]
