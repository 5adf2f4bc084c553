"""How many small changes to the passes the tests notice: writes results/mutants.json.

mutmut makes the changes and runs, for each, those tests of a fast subset that reach the changed function. It mutates files
below a package of their name, so it is given a copy of the tree in which `padst_compile/passes` is a folder and not a link.
Decorated functions it leaves alone: what registers itself by `@rule` (`passes/axes/rules/`) and properties have
`tests/test_wrong_variants.py` instead.

    python benchmarks/mutants.py                                       all passes; hours
    python benchmarks/mutants.py permutation.py passes/axes/axis.py    some modules, below padst_compile/
"""

from __future__ import annotations

import argparse
import collections
import importlib.metadata
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from padst_compile.files import replace_text

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "padst_compile"
RESULT = Path(__file__).parent / "results" / "mutants.json"
MODULES = ("permutation.py", "passes/*.py", "passes/axes/*.py")
TESTS = (
    "test_permutation.py", "test_axes.py", "test_axis_rules.py", "test_costs.py", "test_graph_helpers.py", "test_labelling.py",
    "test_passes_*.py", "test_pipeline.py",
)  # fmt: skip
# What mutmut stores for a mutant: the exit status of pytest, or a signal's.
_OUTCOMES = {
    0: "survived",
    1: "killed",
    3: "killed",
    5: "untested",
    33: "untested",
    36: "timeout",
    24: "timeout",
    -24: "timeout",
}
_MOST_BYTES = 4 << 30
_SCHEMA = 1


def copied(into: Path, modules: Sequence[str], tests: Sequence[str]) -> None:
    """The package with real folders, the tests, and a configuration for mutmut."""
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / PACKAGE, into / PACKAGE, ignore=ignored)
    shutil.copytree(ROOT / "tests", into / "tests", ignore=ignored)
    shutil.copytree(ROOT / "benchmarks" / "results", into / "benchmarks" / "results")
    settings = {
        "source_paths": [PACKAGE],
        "also_copy": ["benchmarks"],
        "only_mutate": [f"{PACKAGE}/{module}" for module in modules],
        "pytest_add_cli_args": ["-p", "no:cacheprovider", "-p", "no:xdist", "-x"],
        "pytest_add_cli_args_test_selection": sorted(
            str(path.relative_to(ROOT)) for pattern in tests for path in (ROOT / "tests").glob(pattern)
        ),
        "process_isolation": "forkserver",  # torch starts threads, which a fork of the process that ran tests would lack
        "use_git_change_detection": False,
    }
    lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
    text = (ROOT / "pyproject.toml").read_text()
    (into / "pyproject.toml").write_text("\n".join([text, "[tool.mutmut]", *lines, ""]))


def outcomes(of: Path) -> dict[str, dict[str, str]]:
    """What became of each mutant, by module."""
    found: dict[str, dict[str, str]] = {}
    for path in sorted(of.rglob("*.py.meta")):
        codes: Mapping[str, int | None] = json.loads(path.read_text())["exit_code_by_key"]
        if codes:
            module = str(path.relative_to(of / PACKAGE)).removesuffix(".meta")
            found[module] = {
                name.rpartition(".")[2]: "not run" if code is None else _OUTCOMES.get(code, f"exit status {code}")
                for name, code in codes.items()
            }
    return found


def summary(found: Mapping[str, str]) -> dict[str, Any]:
    """Counts, and the names of those that no test noticed."""
    counts = collections.Counter(found.values())
    return {**dict(sorted(counts.items())), "surviving": [name for name, outcome in found.items() if outcome == "survived"]}


def main() -> None:
    """Mutate, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", help=f"below {PACKAGE}/; {' '.join(MODULES)} by default")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="files in tests/ to run, as patterns")
    parser.add_argument("--seconds", type=int, help="stop after this time; the rest counts as not run")
    parser.add_argument(
        "--keep", type=Path, help="folder for the copy: `mutmut show NAME` works there, and a later run goes on"
    )
    arguments = parser.parse_args()
    modules = arguments.modules or MODULES
    resource.setrlimit(resource.RLIMIT_DATA, (_MOST_BYTES, _MOST_BYTES))  # a mutant that loops may collect, too
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / PACKAGE).exists():
            copied(folder, modules, arguments.tests)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", "HYPOTHESIS_PROFILE": "dev"}
        command = [sys.executable, "-m", "mutmut", "run", "--max-children", str(os.cpu_count() or 1)]
        process = subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True)
        try:
            if process.wait(arguments.seconds) != 0:
                print(f"mutmut ended with status {process.returncode}: what it had not come to counts as not run")
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)
            process.wait()
        found = outcomes(folder / "mutants")
    if all(outcome == "not run" for module in found.values() for outcome in module.values()):
        sys.exit("no mutant ran: the tests must pass on mutmut's copy of the tree")
    total = collections.Counter(outcome for module in found.values() for outcome in module.values())
    result = {
        "schema": _SCHEMA,
        "mutmut": importlib.metadata.version("mutmut"),
        "tests": arguments.tests,
        "score": round(total["killed"] / max(1, total["killed"] + total["survived"] + total["untested"]), 3),
        "total": dict(sorted(total.items())),
        "modules": {module: summary(mutants) for module, mutants in found.items()},
    }
    replace_text(RESULT, json.dumps(result, indent=1) + "\n")
    print(f"{result['total']}, score {result['score']}; written to {RESULT}")


if __name__ == "__main__":
    main()
