"""Jobs of several ranks on one machine: their start and their end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path

from torch import distributed

# The innermost frames of the rank that died, as Python prints them: nothing but PyTorch down from the wait for a collective.
_CRASH_IN_COLLECTIVE = re.compile(
    r"Fatal Python error: Segmentation fault\n+(?:Current thread|Thread) .*\n"
    r'(?:  File "[^"\n]*/torch/[^"\n]*", line \d+ in \w+\n){0,8}?'
    r'  File "[^"\n]*/torch/distributed/_functional_collectives\.py", line \d+ in wait_tensor\n'
)


def leave() -> None:
    """End this process at once, with exit code 0, when all ranks have come here.

    An orderly end may hang or abort under PyTorch 2.11: DistributedDataParallel, which holds gloo's process group last, joins
    its thread while holding Python's lock, for which that thread waits to drop the tensors of its last broadcast.
    """
    distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def torchrun(script: Path, ranks: int, *arguments: object, restarts: int = 0, seconds: float = 180) -> str:
    """Run a script on ranks of this machine, with one thread each.

    PyTorch 2.15 was seen to crash once in some hundred jobs while it waits for a collective of gloo, which a sanitizer does not
    put down to the kernels here. Such a job runs a second time, with a warning, unless it may restart by itself.

    Args:
        script: run by each rank.
        ranks: how many processes.
        arguments: of the script.
        restarts: how often torchrun starts all ranks again when one has died.
        seconds: after which the whole job is killed.

    Returns:
        What torchrun and the ranks wrote to stderr.

    Raises:
        AssertionError: the job failed or did not end in time; with what was written.
    """
    code, errors = _run(script, ranks, arguments, restarts, seconds)
    if code != 0 and restarts == 0 and crashed_in_collective(errors):
        warnings.warn(
            f"PyTorch crashed while {script.name} waited for a collective; it runs again", RuntimeWarning, stacklevel=2
        )
        code, errors = _run(script, ranks, arguments, restarts, seconds)
    assert code == 0, errors
    return errors


def crashed_in_collective(errors: str) -> bool:
    """Whether a rank died inside PyTorch's wait for a collective, from what the job wrote to stderr."""
    return _CRASH_IN_COLLECTIVE.search(errors) is not None


def _run(script: Path, ranks: int, arguments: tuple[object, ...], restarts: int, seconds: float) -> tuple[int, str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [f"--max-restarts={restarts}", str(script), *map(str, arguments)]
    root = Path(__file__).resolve().parents[2]
    # Otherwise ranks that are restarted find the addresses of those before them in torchrun's store, and wait for the dead.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            _, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise AssertionError(f"{script.name} did not end in {seconds:g} s: {process.communicate()[1]}") from None
    return process.returncode, errors
