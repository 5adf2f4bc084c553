"""Other libraries as peers of the layer benchmark: in their own processes, right, timed in turns, or missing with a reason."""

from __future__ import annotations

import importlib.util
import sys
from contextlib import closing
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import foreign  # type: ignore[import-not-found]  # noqa: E402  # beside the scripts
from peers import Layer  # type: ignore[import-not-found]  # noqa: E402

from padst_compile.autotune.effort import Budget  # noqa: E402
from padst_compile.structures import Block  # noqa: E402
from padst_compile.tolerance import allowed_error, relative_error  # noqa: E402

sys.path.remove(str(BENCHMARKS))  # or transformers would take kernels.py for Hugging Face's package
CPU = torch.device("cpu")


def layer(dtype: torch.dtype = torch.float32) -> Layer:
    return Layer(Block(8), 0.5, 32, 48, 7, dtype, CPU)


@pytest.fixture
def nothing_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(foreign, "INSTALLED", tmp_path)
    return tmp_path


@pytest.mark.usefixtures("nothing_installed")
def test_onnxruntime_computes_the_layer_and_is_timed_in_turns() -> None:
    pytest.importorskip("onnxruntime")
    sparse = layer()
    expected, dense = sparse.products(sparse.weight)
    with closing(foreign.Foreign("onnxruntime", sparse)) as peer:
        assert relative_error([peer.result], [expected]) <= allowed_error(relative_error([dense], [expected]), torch.float32)
        ours = {"ours": lambda: sparse.products(sparse.weight)}
        samples = foreign.in_turns(ours, {"onnxruntime": peer}, Budget(None, 3, 1e9))
        process = peer._process
    assert process.returncode == 0  # ended with its input
    assert {name: len(times) for name, times in samples.items()} == {"ours": 3, "onnxruntime": 3}
    assert all(seconds > 0 for times in samples.values() for seconds in times)
    assert peer.version


@pytest.mark.usefixtures("nothing_installed")
def test_a_library_that_is_not_there_says_so() -> None:
    with pytest.raises(foreign.ForeignError, match="No module named 'sparselab'"):
        foreign.Foreign("sparselab", layer())


def test_the_package_of_its_folder_is_found_first(nothing_installed: Path) -> None:
    package = nothing_installed / "deepsparse" / "deepsparse"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('the one in the folder')")
    with pytest.raises(foreign.ForeignError, match="the one in the folder"):
        foreign.Foreign("deepsparse", layer())


@pytest.mark.usefixtures("nothing_installed")
def test_a_process_that_dies_is_a_reason() -> None:
    pytest.importorskip("onnxruntime")
    with closing(foreign.Foreign("onnxruntime", layer())) as peer:
        peer._process.kill()
        peer._process.wait()
        with pytest.raises(foreign.ForeignError, match="ended without an answer"):
            peer.seconds()


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(foreign.ForeignError, match="float32 alone"):
        foreign.Foreign("onnxruntime", layer(torch.bfloat16))


@pytest.mark.slow
def test_a_case_holds_times_and_versions_of_libraries_and_why_others_are_missing(
    nothing_installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    for library in ("onnxruntime", "sparselab"):
        (nothing_installed / library).mkdir()  # as if installed: the one is in this environment, the other nowhere
    spec = importlib.util.spec_from_file_location("layers_beside_peers", BENCHMARKS / "kernels.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setitem(sys.modules, spec.name, script)  # dataclasses look their annotations up there
    spec.loader.exec_module(script)
    case = script.Case(64, 48, "block:16", 0.5, "float32", 8)
    found = script.measure(case, CPU, Budget(None, 2, 1e9), ["onnxruntime", "sparselab"])
    assert {"dense", "padst", "onnxruntime"} <= found["milliseconds"].keys()
    assert list(found["versions"]) == ["onnxruntime"]
    assert "No module named 'sparselab'" in found["missing"]["sparselab"]
    assert "onnxruntime" not in found["missing"]


def test_what_does_not_install_leaves_nothing_behind(nothing_installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign, "REQUIREMENTS", {"none": ("./no-such-folder", "--no-index")})
    with pytest.raises(foreign.ForeignError, match="does not install: .*no-such-folder"):
        foreign.install("none")
    assert list(nothing_installed.iterdir()) == []
