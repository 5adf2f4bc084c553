"""Sparse training in transformers' `Trainer`.

    from padst_compile.integrations.transformers import PadstCallback

    model = padst.sparsify(model, spec)
    config = lambda steps: padst.DSTConfig(method="rigl", total_steps=steps)
    trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[PadstCallback(config)])
    trainer.train()

The callback attaches when the training begins, puts the runtime's metrics into the log, saves its state beside each checkpoint
of the trainer, goes on from there when the training is resumed, and finalizes the model at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from padst_compile.errors import AttachError, ResumeError
from padst_compile.files import replace_file
from padst_compile.integrations.transformers_quantizer import PadstConfig
from padst_compile.training import DSTConfig, Runtime, attach, finalize
from padst_compile.training.state_file import read_state

__all__ = ["PadstCallback", "PadstConfig"]

_STATE = "padst_runtime.pt"
_PREFIX = "padst/"


class PadstCallback(TrainerCallback):
    """See the module.

    Args:
        config: of the training, or a function that makes it from the number of optimizer steps, which the trainer knows.

    Attributes:
        runtime: of the training, from its beginning on.
    """

    def __init__(self, config: DSTConfig | Callable[[int], DSTConfig]) -> None:
        self.config = config
        self.runtime: Runtime | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Attach, and load what belongs to the checkpoint that the trainer goes on from.

        Raises:
            AttachError: see `padst.attach`; or a soft permutation in float16, whose loss scale a callback cannot know.
            ResumeError: the checkpoint has no state of the runtime, or another's.
        """
        config = self.config(state.max_steps) if callable(self.config) else self.config
        if args.fp16 and config.permutation is not None and config.permutation.method == "autoshuffle":
            raise AttachError("autoshuffle needs the GradScaler of float16, which Trainer hides; train in bfloat16")
        self.runtime = attach(given["model"], given["optimizer"], config)
        if state.global_step > 0:
            file = _checkpoint(args, state) / _STATE
            if not file.exists():
                raise ResumeError(f"{file.parent} has no state of the sparse training; it was saved without PadstCallback")
            try:
                found = read_state(file)
            except (OSError, ValueError) as error:
                raise ResumeError(f"{file} cannot be read ({error}); resume from another checkpoint") from error
            self.runtime.load_state_dict(found)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Save the runtime's state into the trainer's checkpoint."""
        if self.runtime is not None:
            found = self.runtime.state_dict()
            if state.is_world_process_zero:
                folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
                replace_file(folder / _STATE, lambda draft: torch.save(found, draft))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **given: Any,
    ) -> None:
        """Add the runtime's metrics to those of the trainer, under `padst/`."""
        if self.runtime is None or logs is None or "loss" not in logs:
            return
        metrics = {_PREFIX + name: value for name, value in self.runtime.metrics().items()}
        logs.update(metrics)
        state.log_history[-1].update(metrics)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **given: Any,
    ) -> None:
        """Finalize the model."""
        if model is not None and self.runtime is not None:
            finalize(model)


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """The folder that the trainer goes on from."""
    if isinstance(args.resume_from_checkpoint, str) and Path(args.resume_from_checkpoint).is_dir():
        return Path(args.resume_from_checkpoint)
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
