"""The folder of a run: whose it is, what is in it, and that one process works in it at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock

from padst_compile.errors import PadstError, RunFolderError
from padst_compile.files import remove_drafts, replace_file
from padst_compile.recipes.config import TrainConfig, differences
from padst_compile.recipes.rows import Rows
from padst_compile.recipes.writing import writing

_LOCK = ".lock"


class RunFolder:
    """Files of a run.

    `config.json`, `metrics.jsonl` (the same numbers for the same configuration), `timing.jsonl` (seconds, which differ),
    `checkpoint.pt`; at the end `model.safetensors`, `spec.json`, `data.json`, `curves.png` and `result.json`.

    Args:
        path: of the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config, self.checkpoint = path / "config.json", path / "checkpoint.pt"
        self.weights, self.spec, self.data = path / "model.safetensors", path / "spec.json", path / "data.json"
        self.curves, self.result = path / "curves.png", path / "result.json"
        self.metrics, self.timing = Rows(path / "metrics.jsonl"), Rows(path / "timing.jsonl")

    @property
    def finished(self) -> bool:
        """Whether the run has ended; its result is written last."""
        return self.result.exists()

    @contextmanager
    def claimed(self, config: TrainConfig) -> Iterator[None]:
        """Work in the folder for a configuration; it is made where it is missing.

        Raises:
            RunFolderError: it is another run's, in use by another process, or holds other files.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFolderError(f"cannot make the folder {self.path}: {error.strerror}") from error
        lock = filelock.FileLock(self.path / _LOCK)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout as error:
            raise RunFolderError(f"another process is training in {self.path}; wait for it, or give another folder") from error
        except OSError as error:
            raise RunFolderError(f"cannot write in {self.path}: {error.strerror}") from error
        with lock:
            self._check_owner(config)
            for file in self._files():
                remove_drafts(file)
            yield

    def keep_config(self, config: TrainConfig) -> None:
        """Give the folder to a configuration, once it is known to work."""
        if not self.config.exists():
            self.write(self.config, config.to_dict())

    def read_config(self) -> TrainConfig:
        """The configuration of the run.

        Raises:
            RunFolderError: there is none, or none that can be read.
        """
        return _config(self.config)

    def write(self, path: Path, content: Any) -> None:
        """Replace a JSON file of the run.

        Raises:
            RunFolderError: it cannot be written.
        """
        with writing(path):
            replace_file(path, lambda draft: draft.write_text(json.dumps(content, indent=1) + "\n"))

    def read(self, path: Path) -> Any:
        """A JSON file of the run.

        Raises:
            RunFolderError: it is missing or damaged.
        """
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise RunFolderError(f"{path} cannot be read: {error}") from error

    def _check_owner(self, config: TrainConfig) -> None:
        if not self.config.exists():
            known = {_LOCK, *(f".{file.name}." for file in self._files())}
            strange = [p.name for p in self.path.iterdir() if not any(p.name == k or p.name.startswith(k) for k in known)]
            if strange:
                raise RunFolderError(f"{self.path} is no run folder: it holds {strange[0]!r}; give an empty or a new one")
            return
        odd = differences(_config(self.config).to_dict(), json.loads(json.dumps(config.to_dict())))
        if odd:
            raise RunFolderError(
                f"{self.path} holds a run of another configuration, which differs in {', '.join(odd)}; "
                "give the same values to continue it, or another folder"
            )

    def _files(self) -> list[Path]:
        files = (self.config, self.checkpoint, self.weights, self.spec, self.data, self.curves, self.result)
        return [*files, self.metrics.path, self.timing.path]


def _config(path: Path) -> TrainConfig:
    try:
        return TrainConfig.from_dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        problem = str(error) if isinstance(error, PadstError) else f"{type(error).__name__}: {error}"
        raise RunFolderError(f"{path} is no configuration of a run ({problem})") from error
