"""The training loop: steps, rows of metrics, validation, checkpoints."""

from __future__ import annotations

import math
import time

import torch

from padst_compile.errors import TrainingDivergedError
from padst_compile.recipes.checkpoint import load_checkpoint, save_checkpoint
from padst_compile.recipes.reporting import Reporter
from padst_compile.recipes.run_folder import RunFolder
from padst_compile.recipes.session import Session


class _Clock:
    """Seconds of training, and those of processor time in it; those before an interruption included."""

    def __init__(self, seconds: float, processor_seconds: float) -> None:
        self._began = time.perf_counter() - seconds
        self._processor_began = time.process_time() - processor_seconds

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began

    def read(self) -> dict[str, float]:
        return {"seconds": self.seconds, "processor_seconds": time.process_time() - self._processor_began}


def train(session: Session, folder: RunFolder, reporter: Reporter) -> float:
    """Take all steps that are left, from the folder's checkpoint if it has one.

    Whatever is written is a function of configuration and step, so that a run which was killed, and continues, leaves what
    an unbroken one does: rows behind the checkpoint are dropped and written again.

    Returns:
        Seconds of training in all, validation and checkpoints included.

    Raises:
        TrainingDivergedError: the loss is not finite.
        RunFolderError: a checkpoint that cannot be read or used.
    """
    clock = _resume(session, folder, reporter)
    config, numbers = session.config, dict[str, float]()
    while session.step < config.steps:
        loss = session.train_step()
        step = session.step
        if _due(step, config.log_interval, config.steps):
            numbers |= _log(session, folder, clock, _finite(loss, session, folder))
        if _due(step, config.eval_interval, config.steps):
            scores = session.validate()
            found = {"validation_loss": scores.loss, "validation_accuracy": scores.accuracy}
            folder.metrics.append({"step": step, **found})
            numbers |= found
        if _due(step, config.checkpoint_interval, config.steps):
            _finite(loss, session, folder)  # the checkpoint before is worth keeping
            _save(session, folder, clock)
        reporter.progress(step, config.steps, numbers)
    return clock.seconds


def _due(step: int, interval: int, steps: int) -> bool:
    return step % interval == 0 or step == steps


def _finite(loss: torch.Tensor, session: Session, folder: RunFolder) -> float:
    value = loss.item()
    if not math.isfinite(value):
        raise TrainingDivergedError(
            f"the loss is {value} at step {session.step}; lower the learning rate ({session.config.lr:g}), raise warmup or "
            f"lower clip, and give another folder than {folder.path}"
        )
    return value


def _log(session: Session, folder: RunFolder, clock: _Clock, loss: float) -> dict[str, float]:
    found = {"loss": loss, **session.metrics()}
    folder.metrics.append({"step": session.step, **found})
    folder.timing.append({"step": session.step, **clock.read(), **session.times()})
    return found


def _save(session: Session, folder: RunFolder, clock: _Clock) -> None:
    folder.metrics.flush()  # no checkpoint is ahead of the rows before it
    folder.timing.flush()
    save_checkpoint(folder.checkpoint, {**session.state_dict(), **clock.read()})


def _resume(session: Session, folder: RunFolder, reporter: Reporter) -> _Clock:
    state = load_checkpoint(folder.checkpoint, session.device)
    if state is not None:
        session.load_state_dict(state)
        reporter.say(f"continuing at step {session.step} of {session.config.steps}")
    for rows in (folder.metrics, folder.timing):
        rows.keep_until(session.step)
    known = state or {}
    return _Clock(known.get("seconds", 0.0), known.get("processor_seconds", 0.0))
