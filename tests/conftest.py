"""Set-up that every test shares: Hypothesis profiles, a cache folder of the checkout's own, fresh compiler state."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

# Without a deadline, because a first call may compile; without a database, so that a run depends on the code alone.
_COMMON: dict[str, Any] = {"deadline": None, "database": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("dev", max_examples=50, **_COMMON)
hypothesis.settings.register_profile("ci", max_examples=200, derandomize=True, print_blob=True, **_COMMON)
hypothesis.settings.register_profile("fuzz", max_examples=2000, print_blob=True, **_COMMON)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))

# Native builds are kept between runs, but neither read from nor written to the user's own cache.
os.environ.setdefault("PADST_CACHE_DIR", str(Path(__file__).resolve().parents[1] / ".cache" / "padst_compile"))


# Without a GPU, Triton's interpreter runs the kernels. Triton looks when it is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# On a GPU, references are computed there too, and `poisoned_memory` asks for deterministic algorithms: cuBLAS has them with
# a fixed workspace.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture
def triton_device() -> Iterator[torch.device]:
    """Where Triton kernels run: the GPU, or the CPU in Triton's interpreter."""
    from padst_compile.kernels import triton_support

    if not triton_support.installed():
        pytest.skip("there is no Triton on this system")
    if torch.cuda.is_available():
        yield torch.device("cuda")
        return
    _repair_interpreter()
    with triton_support.interpreted():
        yield torch.device("cpu")


@functools.cache
def _repair_interpreter() -> None:
    """Triton 3.6's interpreter takes the bounds of a loop from arrays of one element, which numpy 2.4 refuses to convert."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_lang_tensor


@pytest.fixture
def fresh_registries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Begin without registered structures, passes and kernels, and leave none behind."""
    from padst_compile import registered
    from padst_compile.kernels import formats
    from padst_compile.passes import pipeline
    from padst_compile.structures import STRUCTURES, parse

    monkeypatch.setattr(registered, "_versions", {})
    monkeypatch.setattr(formats, "_REGISTERED", {})
    monkeypatch.setattr(pipeline, "_registered", [])
    before = dict(STRUCTURES)
    yield
    STRUCTURES.clear()
    STRUCTURES.update(before)
    parse.cache_clear()


@pytest.fixture(autouse=True)
def _fresh_compiler_state() -> Iterator[None]:
    """Forget what Dynamo compiled in a test, so that no test meets the recompilation limit of another."""
    yield
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """NaN in whatever `torch.empty` and `at::empty` return, so that a kernel that leaves an output unwritten shows."""
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    was_filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(was_deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = was_filling


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The wrong variants of `test_wrong_variants.py`, what noticed each, and those that survived."""
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.getreports(outcome)]
    found = dict(value for report in reports for name, value in report.user_properties if name == "wrong_variant")
    if found:
        surviving = [variant for variant, check in found.items() if check is None]
        terminalreporter.section("wrong variants, and what noticed them")
        for variant, check in found.items():
            terminalreporter.write_line(f"{variant:<62} {check or 'SURVIVED'}")
        terminalreporter.write_line(f"{len(found)} variants, surviving: {', '.join(surviving) or 'none'}")
