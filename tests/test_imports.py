"""The direction of imports, read from the sources, and what importing the package costs."""

from __future__ import annotations

import ast
import functools
import graphlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "padst_compile"

# Every unit may import itself and what stands before it. A unit is a module or folder directly under the package;
# `__init__` is the package's own file, whose names only what stands after it may use. What judges the compiler
# (`equivalence`) stands before the kernels and the passes, so that it shares no code with them; `testing`, which runs the
# compiler, stands after it.
LAYERS = (
    "errors",
    "registered",
    "files",
    "permutation",
    "kaleidoscope",
    "tolerance",
    "structures",
    "permutation_search",
    "distribution",
    "spec",
    "planning",
    "equivalence",
    "kernels",
    "autotune",
    "layers",
    "calibration",
    "layout",
    "transformers_config",
    "conversion",
    "passes",
    "options",
    "specialization",
    "backend",
    "testing",
    "permutation_fates",
    "explain",
    "tuning",
    "foldable",
    "training",
    "deployment",
    "integrations",
    "__init__",
    "benchmarking",
    "recipes",
    "drawing",
    "explanation_page",
    "doctor",
    "user_modules",
    "command_errors",
    "train_command",
    "cli",
)
FOR_TESTS_ALONE = "testing"
FOR_OTHER_LOOPS = "integrations"  # each module is imported by who has its package
OPTIONAL = ("timm", "transformers", "accelerate", "lightning", "torchvision", "pyarrow", "PIL", "matplotlib")
LATE = (*OPTIONAL, "hypothesis", "typer", "rich", "resvg_py")
ROOT_FOLDERS = ("kernels", "passes", "autotune")


@functools.cache
def modules() -> dict[str, ast.Module]:
    """Syntax trees of the package's modules by dotted name; `__init__` files under the name of their folder."""
    found = {}
    for folder, subfolders, files in os.walk(ROOT / PACKAGE, followlinks=True):
        subfolders[:] = [name for name in subfolders if name != "__pycache__"]
        for file in files:
            path = Path(folder, file)
            if path.suffix == ".py":
                parts = path.relative_to(ROOT).with_suffix("").parts
                name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
                found[name] = ast.parse(path.read_text(), filename=str(path))
    return found


def unit(module: str) -> str:
    """The unit that a module of the package belongs to."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that a tree imports; `from a import b` gives `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def at_module_level(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """The imports that run when the module is imported: not those inside functions or `if TYPE_CHECKING:`."""
    stack: list[ast.stmt] = list(tree.body)
    while stack:
        node = stack.pop()
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from imports(node)
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            stack.extend(node.orelse)
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            stack.extend(child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt))


def resolve(name: str) -> str | None:
    """The module of the package that an imported name means or is defined in; None for other packages."""
    if name.partition(".")[0] != PACKAGE:
        return None
    while name not in modules():
        name = name.rpartition(".")[0]
    return name


def test_the_sources_are_found() -> None:
    units = {unit(module) for module in modules()}
    assert {*ROOT_FOLDERS, "structures", "backend"} <= units


@pytest.mark.parametrize("module", modules())
def test_imports_point_one_way(module: str) -> None:
    place = unit(module)
    assert place in LAYERS, f"{place!r} is new: give it a place in LAYERS, after all that it imports"
    allowed = LAYERS[: LAYERS.index(place) + 1]
    resolved = [(line, name, resolve(name)) for line, name in imports(modules()[module])]
    wrong = [f"line {line}: {name}" for line, name, target in resolved if target and unit(target) not in allowed]
    assert not wrong, f"{module} may import {', '.join(allowed)}"


def test_no_module_imports_itself_through_others() -> None:
    graph = {
        module: {target for _, name in at_module_level(tree) if (target := resolve(name)) not in (None, module)}
        for module, tree in modules().items()
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


@pytest.mark.parametrize("module", modules())
def test_root_folders_are_imported_by_their_full_names(module: str) -> None:
    wrong = [f"line {line}: {name}" for line, name in imports(modules()[module]) if name.split(".")[0] in ROOT_FOLDERS]
    assert not wrong


@pytest.mark.parametrize("module", sorted(name for name in modules() if unit(name) != FOR_OTHER_LOOPS))
def test_optional_packages_are_imported_late(module: str) -> None:
    wrong = [f"line {line}: {name}" for line, name in at_module_level(modules()[module]) if name.split(".")[0] in OPTIONAL]
    assert not wrong


@pytest.mark.parametrize("module", sorted(name for name in modules() if unit(name) != FOR_TESTS_ALONE))
def test_no_module_needs_what_is_for_tests(module: str) -> None:
    testing = (f"{PACKAGE}.{FOR_TESTS_ALONE}", "hypothesis", "pytest")
    assert not [f"line {line}: {name}" for line, name in imports(modules()[module]) if name.startswith(testing)]


def test_importing_the_package_is_cheap(tmp_path: Path) -> None:
    """No optional package, no terminal library and no C++ build."""
    code = (
        f"import padst_compile, sys; print(*(name for name in {[*LATE, 'torch.utils.cpp_extension']} if name in sys.modules))"
    )
    environment = {**os.environ, "PADST_CACHE_DIR": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []
    assert list(tmp_path.iterdir()) == []
