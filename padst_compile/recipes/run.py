"""A whole run: from its configuration to a trained, saved, compiled and checked model, in one resumable call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from padst_compile.errors import MissingPackageError, RunFolderError
from padst_compile.recipes.config import TrainConfig
from padst_compile.recipes.evaluation import check_trained
from padst_compile.recipes.loop import train
from padst_compile.recipes.plots import draw_curves
from padst_compile.recipes.reporting import Reporter, Silent
from padst_compile.recipes.result import Result
from padst_compile.recipes.run_folder import RunFolder
from padst_compile.recipes.session import Session, density
from padst_compile.recipes.tasks import make_task
from padst_compile.recipes.trained import load_weights, save_trained


def run(
    config: TrainConfig,
    path: str | Path,
    reporter: Reporter | None = None,
    prepare: Callable[[nn.Module], None] | None = None,
) -> Result:
    """Train a model, or go on where an earlier call was interrupted, and keep everything in a folder.

    The same call with the same folder continues from the last checkpoint, at whatever moment the process before was killed,
    and ends with the numbers of an unbroken run: on a CPU and without `compile`, bit for bit. A finished run is not repeated.

    Args:
        config: of the run.
        path: its folder, see `RunFolder`; made where it is missing.
        reporter: hears of the progress.
        prepare: is given the sparse model with its random weights, on the CPU, and may change its tensors (to begin with
            other weights or permutations). The folder does not know of it: give the same again when a run goes on.

    Raises:
        PadstError: something about the configuration, the data, the model, the folder or the training is wrong; what the
            folder holds is left as it is.
    """
    reporter, folder = reporter or Silent(), RunFolder(Path(path))
    with folder.claimed(config), torch.random.fork_rng(devices=[]), _threads(config.threads):
        if folder.finished:
            reporter.say(f"{folder.path} holds this run, finished; there is nothing to do")
            return read_result(folder)
        reporter.say(f"reading {config.data}")
        task = make_task(config)
        session = Session(config, task, prepare)
        folder.keep_config(config)
        seconds = train(session, folder, reporter)
        save_trained(session.finish(), config, task.data, folder)
        del session
        reporter.say("compiling the trained model and comparing it with itself")
        model = load_weights(folder, config, task)
        check = check_trained(model, task.data, next(model.parameters()).device, config.dtype)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        result = Result.of(check, density=density(model), parameters=parameters, steps=config.steps, seconds=seconds)
        try:
            draw_curves(folder.metrics.read(), folder.curves)
        except MissingPackageError as error:
            reporter.say(f"no curves are drawn: {error}")
        folder.write(folder.result, result.to_dict())  # the last file: with it the run is finished
        return result


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def read_result(folder: RunFolder) -> Result:
    """The result of a finished run.

    Raises:
        RunFolderError: there is none, or a damaged one.
    """
    try:
        return Result.from_dict(folder.read(folder.result))
    except (TypeError, KeyError, AttributeError) as error:
        raise RunFolderError(
            f"{folder.result} is no result of a run: {error}; delete it to evaluate the model again"
        ) from error
