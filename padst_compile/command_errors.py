"""How commands report mistakes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.markup import escape

from padst_compile.errors import PadstError


@contextmanager
def reported() -> Iterator[None]:
    """Our own errors are the user's: one line on stderr and exit status 2, without a traceback."""
    try:
        yield
    except PadstError as error:
        Console(stderr=True).print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True, highlight=False)
        raise typer.Exit(2) from None
