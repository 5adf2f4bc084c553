"""The documentation: tutorials run and print what they say, commands exist, and the site builds without a warning."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import io
import os
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import typer

import padst_compile
from padst_compile import recipes
from padst_compile.cli import app

ROOT = Path(padst_compile.__file__).parent.parent
DOCS = ROOT / "docs"
TUTORIALS = sorted((DOCS / "tutorials").glob("*.md"))
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
INSTALLED = any(e.name == "padst" for e in importlib.metadata.entry_points(group="torch_dynamo_backends"))

# Every block of output says whether it is what the blocks before it print, or an example of it.
CHECKED, EXAMPLE = "prints", "prints, depending on"


@dataclasses.dataclass(frozen=True)
class Fence:
    """A fenced block of a page."""

    language: str
    title: str
    text: str
    line: int


def fences(page: Path) -> list[Fence]:
    """The fenced blocks of a page in order, with files that it includes."""
    found = []
    for match in re.finditer(
        r'^```(?: *{ *\.)?(\w*)(?: title="([^"]*)")?(?: *})?\n(.*?)^```$', page.read_text(), re.DOTALL | re.MULTILINE
    ):
        language, title, text = match.group(1), match.group(2) or "", match.group(3)
        text = re.sub(r'^--8<-- "(.*)"$', lambda include: (ROOT / include.group(1)).read_text(), text, flags=re.MULTILINE)
        found.append(Fence(language, title, text, page.read_text()[: match.start()].count("\n") + 2))
    return found


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder as the current one, in which modules can be imported and are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="the package is not installed, so torch does not know its entry point")
@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
@pytest.mark.usefixtures("fresh_registries")
def test_a_tutorial_runs_in_an_empty_folder_and_prints_what_it_says(
    page: Path, empty_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tutorial = types.ModuleType("tutorial")
    monkeypatch.setitem(sys.modules, "tutorial", tutorial)  # dataclasses look their annotations up there
    printed, checked = "", 0
    with torch.random.fork_rng():
        for fence in fences(page):
            if fence.language == "python" and fence.title:
                (empty_folder / fence.title).write_text(fence.text)
            elif fence.language == "python":
                printed += _run(fence, page, tutorial)
            elif fence.language == "text":
                if fence.title == CHECKED:
                    assert printed == fence.text, f"{page.name}:{fence.line}"
                    checked += 1
                printed = ""
    assert checked, f"{page.name} checks nothing"


def _run(fence: Fence, page: Path, module: types.ModuleType) -> str:
    printed = io.StringIO()
    code = compile("\n" * (fence.line - 1) + fence.text, str(page), "exec")  # errors then name the page's lines
    with contextlib.redirect_stdout(printed):
        exec(code, module.__dict__)  # our own document
    return printed.getvalue()


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_blocks_of_tutorials_say_what_they_are(page: Path) -> None:
    for fence in fences(page):
        where = f"{page.name}:{fence.line}"
        assert fence.language in ("python", "text", "bash"), where
        if fence.language == "text":
            assert fence.title == CHECKED or fence.title.startswith(EXAMPLE), where


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="the package is not installed, so torch does not know its entry point")
def test_the_program_in_the_readme_runs_as_it_is_in_an_empty_folder(tmp_path: Path) -> None:
    part = (ROOT / "README.md").read_text().partition("<!-- script -->\n```python\n")[2]
    program, end, _ = part.partition("```\n<!-- /script -->")
    assert end
    (tmp_path / "program.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "program.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    first, *explanation, last = done.stdout.strip().splitlines()
    found = re.fullmatch(r"loss ([\d.]+) after (\d+) updates", first)
    assert found, first
    assert float(found[1]) < 0.9  # predicting zeros gives 1
    assert int(found[2]) == 7  # of the first 75 steps
    assert any("block:32x32" in line for line in explanation)
    assert last == "True"
    assert {path.suffix for path in (tmp_path / "folder").iterdir()} == {".safetensors", ".json"}


def commands() -> list[str]:
    """All `padst …` that a page tells somebody to type."""
    found = []
    for page in PAGES:
        text = re.sub(r"\\\n\s*", "", page.read_text())
        indented = [line.strip() for line in text.splitlines() if re.match(r"(    )?padst [a-z]", line)]
        found += indented + [span for span in re.findall(r"`(padst [a-z][^`]*)`", text) if span.split()[1] != "…"]
    return sorted(set(found))


@pytest.mark.parametrize("line", commands())
def test_commands_in_the_documents_exist(line: str) -> None:
    arguments = shlex.split(line, comments=True)[1:]
    command = typer.main.get_command(app).commands[arguments[0]]
    if len(arguments) == 1 or line.endswith((" --html", " --graph")):  # only mentioned
        assert all(any(argument in option.opts for option in command.params) for argument in arguments[1:])
        return
    with contextlib.suppress(typer.Exit):  # of --help
        command.make_context(arguments[0], arguments[1:])


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: page.stem)
def test_pages_hold_no_figures_of_their_own(page: Path) -> None:
    """Times and ratios come from recorded results, by benchmarks/figures.py."""
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    assert not re.search(
        r"\d(\.\d+)?\s?x (faster|slower|smaller)|\d (ms|milliseconds|GFLOP)|\d+(\.\d+)? times (as )?fast", prose
    )


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    for package in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(package)
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    reference = (tmp_path / "site" / "api" / "index.html").read_text()
    names = [*padst_compile.__all__, *recipes.__all__, "PadstConfig"]
    missing = [name for name in names if not re.search(rf'id="padst_compile[\w.]*\.{name}"', reference)]
    assert missing == []
    assert "<table>" in (tmp_path / "site" / "measurements" / "index.html").read_text()
    assert "load_pretrained" in (tmp_path / "site" / "index.html").read_text()
