"""What is shipped: the contents of sdist and wheel, the entry points, and that the layout hides nobody else's packages."""

from __future__ import annotations

import configparser
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import padst_compile

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "padst_compile"
LINKED = ("passes", "kernels", "autotune")
OLDEST_SETUPTOOLS = 77
SHIPPED_SUFFIXES = (".py", ".cpp", ".h", ".json", ".html")


def run_python(*arguments: str, cwd: Path, **environment: str) -> str:
    """Standard output of a fresh interpreter."""
    result = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what packaging reads, links as links, so that a build leaves nothing behind in the real one."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in (PACKAGE, *LINKED):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    # A result of tuning, as releases may hold some.
    (copy / "autotune" / "configs").mkdir(exist_ok=True)
    (copy / "autotune" / "configs" / "some-device.json").write_text("[]")
    return copy


@pytest.fixture(scope="module")
def distributions(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("dist")
    recent = int(importlib.metadata.version("setuptools").partition(".")[0]) >= OLDEST_SETUPTOOLS
    isolation = ["--no-isolation"] if recent else []  # an isolated build fetches what pyproject.toml asks for
    run_python("-m", "build", *isolation, "--outdir", str(folder), str(checkout), cwd=checkout)
    return folder


@pytest.fixture(scope="module")
def wheel(distributions: Path) -> zipfile.ZipFile:
    (path,) = distributions.glob("*.whl")
    return zipfile.ZipFile(path)


def sources(checkout: Path) -> dict[str, bytes]:
    """Path and content of every file of the package, through the links."""
    found = {}
    for folder, _, files in os.walk(checkout / PACKAGE, followlinks=True):
        for file in files:
            path = Path(folder, file)
            if path.suffix in SHIPPED_SUFFIXES or file == "py.typed":
                found[path.relative_to(checkout).as_posix()] = path.read_bytes()
    return found


def dist_info(wheel: zipfile.ZipFile, name: str) -> str:
    (path,) = (entry for entry in wheel.namelist() if entry.endswith(f".dist-info/{name}"))
    return wheel.read(path).decode()


@pytest.mark.slow
def test_wheel_has_every_file_of_the_package_and_nothing_else(checkout: Path, wheel: zipfile.ZipFile) -> None:
    expected = sources(checkout)
    assert {f"{PACKAGE}/{folder}" for folder in LINKED} <= {"/".join(name.split("/")[:2]) for name in expected}
    assert any(name.endswith(".cpp") for name in expected)
    assert any(name.endswith(".h") for name in expected)
    shipped = {name: wheel.read(name) for name in wheel.namelist() if ".dist-info/" not in name}
    assert shipped == expected


@pytest.mark.slow
def test_wheel_has_one_top_level_package(wheel: zipfile.ZipFile) -> None:
    top = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {PACKAGE}


@pytest.mark.slow
def test_sdist_has_real_files_and_no_links(checkout: Path, distributions: Path) -> None:
    (path,) = distributions.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        members = archive.getmembers()
    files = {member.name.partition("/")[2] for member in members if member.isfile()}
    assert set(sources(checkout)) <= files
    assert not [member.name for member in members if member.issym() or member.islnk()]


@pytest.mark.slow
def test_wheel_works_away_from_the_checkout(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path / "site")
    code = (
        "import padst_compile.backend, padst_compile.autotune.cache\n"
        "from padst_compile.kernels import native\n"
        "print(padst_compile.__file__, native.source_hash(), sep='\\n')"
    )
    where, digest = run_python("-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site")).split("\n")[:2]
    assert Path(where).is_relative_to(tmp_path)
    from padst_compile.kernels import native

    assert digest == native.source_hash()


@pytest.mark.slow
def test_wheel_declares_its_entry_points(wheel: zipfile.ZipFile) -> None:
    parser = configparser.ConfigParser()
    parser.read_string(dist_info(wheel, "entry_points.txt"))
    assert {section: dict(parser[section]) for section in parser.sections()} == {
        "torch_dynamo_backends": {"padst": "padst_compile.backend:padst"},
        "console_scripts": {"padst": "padst_compile.cli:app"},
    }


@pytest.mark.slow
def test_wheel_has_the_version_of_the_package_and_its_licence(wheel: zipfile.ZipFile) -> None:
    metadata = Parser().parsestr(dist_info(wheel, "METADATA"))
    assert metadata["Version"] == padst_compile.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "Apache License" in dist_info(wheel, "licenses/LICENSE")


def test_the_version_is_written_in_one_place() -> None:
    assert padst_compile.__version__ not in (ROOT / "pyproject.toml").read_text()
    holders = [path for path in (ROOT / PACKAGE).rglob("*.py") if f'"{padst_compile.__version__}"' in path.read_text()]
    assert holders == [ROOT / PACKAGE / "__init__.py"]


def test_kernels_folder_is_no_regular_package() -> None:
    """An `__init__.py` there would be found as Hugging Face's `kernels` by whoever runs Python at the root."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    for name in LINKED:
        assert (ROOT / PACKAGE / name).samefile(ROOT / name)


def test_transformers_works_from_the_root_of_the_checkout() -> None:
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    run_python("-c", "import transformers\nfrom transformers import GPT2LMHeadModel", cwd=ROOT)


def test_torch_lists_the_backend(tmp_path: Path) -> None:
    try:
        importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("padst_compile is not installed here, so it has no entry points; make test installs it")
    backends = run_python("-c", "import torch._dynamo; print(*torch._dynamo.list_backends())", cwd=tmp_path).split()
    assert backends.count("padst") == 1
