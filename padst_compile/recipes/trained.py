"""A trained model in files: weights as safetensors, the specification as JSON; nothing in them is executed."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

from padst_compile.errors import RunFolderError
from padst_compile.files import replace_file
from padst_compile.recipes.config import TrainConfig
from padst_compile.recipes.data import Data
from padst_compile.recipes.run_folder import RunFolder
from padst_compile.recipes.session import build_sparse, find_device
from padst_compile.recipes.tasks import Task, make_task
from padst_compile.recipes.writing import writing
from padst_compile.spec import save_spec


def save_trained(model: nn.Module, config: TrainConfig, data: Data, folder: RunFolder) -> None:
    """Write `model.safetensors`, `spec.json` (of a sparse model) and `data.json`.

    Raises:
        RunFolderError: one of them cannot be written.
    """
    with writing(folder.weights):
        replace_file(folder.weights, lambda draft: save_model(model, str(draft)))  # knows tied weights
    if config.final_sparsity is not None:
        with writing(folder.spec):
            save_spec(config.final_sparsity, folder.spec)
    folder.write(folder.data, data.describe())


def load_trained(path: str | Path) -> nn.Module:
    """The model of a run of `padst train`, in evaluation mode, on the run's device.

    Args:
        path: folder of the run. Its data must still be there: it decides sizes of the model.

    Raises:
        RunFolderError: no trained model there, or a damaged one.
        PadstError: the data or a package is missing.
    """
    folder = RunFolder(Path(path))
    config = folder.read_config()
    return load_weights(folder, config, make_task(config))


def load_weights(folder: RunFolder, config: TrainConfig, task: Task) -> nn.Module:
    """As `load_trained`, with what is known already."""
    model = build_sparse(task, config.final_sparsity).to(find_device(config.device))
    try:
        load_model(model, str(folder.weights))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise RunFolderError(f"{folder.weights} does not hold this run's model: {error}") from error
    return model.eval()
