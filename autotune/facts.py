"""What a compiler says about one tile of a kernel, asked before anything is launched."""

from __future__ import annotations

import importlib
import logging
import re

from padst_compile.autotune.space import Facts
from padst_compile.kernels import triton_support
from padst_compile.kernels.launch import Problem, Tile

logger = logging.getLogger(__name__)


def compiled_facts(problem: Problem, tile: Tile) -> Facts | None:
    """Compile a launch for the problem's device, which need not be there; the launch itself finds the result in Triton's cache.

    Returns:
        None where there is nothing to ask: on the CPU, in Triton's interpreter, for architectures that `kernels/compiled.py`
        does not know, for kernels that make no launch from sizes alone (`launch_of` in their `offline_cases`), and where the
        compiler gives up.
    """
    capability = re.search(r"\((\d+)\.(\d+)\)$", problem.device)
    if capability is None or not triton_support.installed() or triton_support.interpreting():
        return None
    from padst_compile.kernels.compiled import TARGETS, compile_launch  # needs a Triton that compiles

    target = f"sm_{capability[1]}{capability[2]}"
    if target not in TARGETS:
        return None
    try:
        cases = importlib.import_module(f"padst_compile.kernels.{problem.kernel.partition('_')[0]}.offline_cases")
        compiled = compile_launch(cases.launch_of(problem, tile), target)
    except Exception as error:  # a kernel without offline cases; whatever a compiler raises
        logger.debug("nothing is known of %s with %s: %s", problem.kernel, tile, error)
        return None
    return Facts(compiled.shared_bytes, compiled.registers, compiled.spilled_bytes)
