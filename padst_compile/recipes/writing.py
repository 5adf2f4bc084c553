"""What a run says where it cannot write."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from padst_compile.errors import RunFolderError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within this, the file `path` of a run is written.

    Raises:
        RunFolderError: it cannot be, as on a full disk.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save raises RuntimeError
        raise RunFolderError(f"cannot write {path}: {error}; once that is possible, the same call continues the run") from error
