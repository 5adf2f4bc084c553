"""Runs README's example of where permutations go, and writes below it what it printed. `--check` only compares.

The picture beside it is drawn by the example too. Times are left out of the comparison: they differ from run to run.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
_EXAMPLE = re.compile(
    r"(<!-- example -->\n```python\n)(.*?)(\n```\n\nprints\n\n```text\n)(.*?)(```\n<!-- /example -->)", re.DOTALL
)
_TIMES = re.compile(r"\d+\.\d+ s\b")


def run(code: str) -> str:
    """What a program prints, run in the repository's root."""
    printed = io.StringIO()
    os.chdir(ROOT)
    with contextlib.redirect_stdout(printed):
        exec(compile(code, str(README), "exec"), {})  # our own document
    return printed.getvalue().rstrip()


def main() -> None:
    """Rewrite the section, or with `--check` exit with an error if it would change."""
    text = README.read_text()
    found = _EXAMPLE.search(text)
    if found is None:
        sys.exit("README.md has no example between <!-- example --> and <!-- /example -->")
    output = run(found[2])
    if "--check" in sys.argv[1:]:
        same = _TIMES.sub("… s", output) == _TIMES.sub("… s", found[4].rstrip())
        sys.exit(0 if same else f"README's example prints something else now:\n{output}")
    README.write_text(text[: found.start(4)] + output + "\n" + text[found.end(4) :])


if __name__ == "__main__":
    main()
