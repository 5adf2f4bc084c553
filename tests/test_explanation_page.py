"""The HTML page of an explanation: everything is on it, nothing on it is code, and a browser shows it."""

from __future__ import annotations

import os
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from padst_compile.cli import app
from padst_compile.explain import Explanation, LayerExplanation
from padst_compile.explanation_page import explanation_page, write_page
from padst_compile.passes.pipeline import PermutationAccount
from padst_compile.permutation_fates import PermutationFate

HOSTILE = (
    "<script>document.title = 'taken over'</script>",
    '"><img src=x onerror="document.title=\'taken over\'">',
    "{{ 7 * 7 }}{% raw %}",
    "</td></table></body>",
    "a & b &amp; c",
    "block\u202e.0",
)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
VOID = {"meta", "img", "br", "hr", "link", "input"}


def explanation(*names: str, breaks: tuple[str, ...] = ()) -> Explanation:
    return Explanation(
        layers=tuple(
            LayerExplanation(n, "8 -> 4", "block:2x2", 0.25, "native", ("bias", "residual"), f"why {n}", 2.0, 1.5e-3, 3e-3)
            for n in names
        ),
        permutations=PermutationAccount(total=len(names), fused=len(names)),
        fates=tuple(PermutationFate(n, "input", "read by the kernel", f"because {n}", 1234) for n in names),
        refusals=tuple(("PlacePermutations", n, f"not {n}") for n in names),
        graph_breaks=breaks,
        compilations=1,
        dense_bytes=4000,
        sparse_bytes=1000,
        pass_seconds=0.25,
    )


class Page(HTMLParser):
    """The rows of all tables by the heading above them, all tags, and whether each is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.title = self._section = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "h2":
            self._section = dict(attrs)["id"] or ""
        elif tag == "tr":
            self.tables.setdefault(self._section, []).append([])
        elif tag == "td":
            self.tables[self._section][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self._open:
            self.tables[self._section][-1][-1] += data
        elif self._open and self._open[-1] == "h1":
            self.title += data

    def column(self, section: str, number: int) -> list[str]:
        return [row[number] for row in self.tables.get(section, []) if row]


def test_every_layer_permutation_and_refusal_appears() -> None:
    page = Page(explanation_page(explanation("a.b", "c", breaks=("print",)), "model", {"batch": "1"}))
    assert page.tables["layers"][1] == [
        "a.b", "8 -> 4", "block:2x2", "0.250", "native", "bias, residual", "1.500", "3.000", "why a.b",
    ]  # fmt: skip
    assert page.tables["permutations"][1:] == [
        [name, "input", "read by the kernel", "1,234", f"because {name}"] for name in ("a.b", "c")
    ]
    assert page.tables["refusals"][1:] == [["PlacePermutations", name, f"not {name}"] for name in ("a.b", "c")]
    assert page.title == "model"


def test_a_page_without_anything_to_tell() -> None:
    page = Page(explanation_page(explanation(), "model", {}))
    assert page.tables.keys() == {"layers"}


@given(
    st.lists(
        st.sampled_from(HOSTILE) | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\0")), max_size=3
    )
)
def test_names_are_words_whatever_they_hold(names: list[str]) -> None:
    page = Page(explanation_page(explanation(*names), "".join(names), dict.fromkeys(names, "x")))
    assert page.column("layers", 0) == page.column("permutations", 0) == names
    assert page.column("refusals", 2) == [f"not {name}" for name in names]
    assert page.title == "".join(names)
    assert [tag for tag, _ in page.tags] == [
        tag for tag, _ in Page(explanation_page(explanation(*"x" * len(names)), "x", {})).tags
    ]


def test_nothing_is_loaded_from_elsewhere_and_nothing_runs() -> None:
    page = Page(explanation_page(explanation(*HOSTILE), "model", {}, "<svg><title>t</title></svg>"))
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "img", "iframe", "object")
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "href")]


def test_the_command_writes_page_and_picture(tmp_path: Path) -> None:
    page, graph = tmp_path / "new" / "page.html", tmp_path / "block.svg"
    result = CliRunner().invoke(
        app,
        ["explain", "hf:gpt2,n_layer=1,n_embd=32,n_head=2,vocab_size=64,n_positions=16", "--structure", "block:8",
         "--sparsity", "0.75", "--tokens", "8", "--html", str(page), "--graph", str(graph)],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    read = Page(page.read_text())
    layers = ["h.0.attn.c_attn", "h.0.attn.c_proj", "h.0.mlp.c_fc", "h.0.mlp.c_proj"]
    assert [name for name in read.column("layers", 0) if ".h." in f".{name}"] == [f"transformer.{name}" for name in layers]
    assert set(read.column("permutations", 0)) == {f"transformer.{name}" for name in layers}
    assert "svg" in [tag for tag, _ in read.tags]
    assert graph.read_text().startswith("<svg")


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    return found


def browsed(browser: str, folder: Path, page: Path, *options: str) -> str:
    """What a headless browser prints about a page; it has no network and a profile of its own."""
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        f"--user-data-dir={folder / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=2000",
        *options, page.as_uri(),
    ]  # fmt: skip
    environment = {**os.environ, "HOME": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=True)
    return done.stdout


@pytest.mark.slow
def test_a_browser_shows_the_page(tmp_path: Path, browser: str) -> None:
    image: Any = pytest.importorskip("PIL.Image")
    page, shot = tmp_path / "page.html", tmp_path / "page.png"
    write_page(page, explanation("blocks.0.mlp.fc1", *HOSTILE), "a model", {"batch": "1"})
    dom = Page(browsed(browser, tmp_path, page, "--dump-dom").removeprefix("<!DOCTYPE html>").strip())
    assert dom.column("layers", 0) == dom.column("permutations", 0) == ["blocks.0.mlp.fc1", *HOSTILE]
    assert dom.title == "a model"
    browsed(browser, tmp_path, page, f"--screenshot={shot}", "--window-size=1000,1400")
    with image.open(shot) as seen:
        assert seen.size == (1000, 1400)
        for top in range(0, 1400, 350):  # something is drawn everywhere
            low, high = seen.convert("L").crop((0, top, 1000, top + 350)).getextrema()
            assert high - low > 100
