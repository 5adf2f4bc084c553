"""Functions of the package with one place of their source changed: what tests need to see that a mistake is noticed."""

from __future__ import annotations

import ast
import contextlib
import inspect
import textwrap
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

_CALLS = "_padst_calls_of_the_edited_function"


@contextlib.contextmanager
def edited(function: Callable[..., Any], old: str, new: str) -> Iterator[list[None]]:
    """Run with `new` in place of `old` in the source of a function or method, wherever it is called from.

    The function stays the same object with other code, so that tables and modules which hold it need no change.

    Args:
        function: without free variables; decorators that keep or wrap it are left alone.
        old: occurs once in its source.
        new: what is written there instead.

    Yields:
        One entry for each call so far.

    Raises:
        LookupError: `old` does not occur exactly once.
    """
    function = inspect.unwrap(function)
    assert isinstance(function, FunctionType)
    source = textwrap.dedent(inspect.getsource(function))
    if source.count(old) != 1:
        raise LookupError(f"{function.__qualname__} has {source.count(old)} places that read {old!r}; it takes one")
    calls: list[None] = []
    original = function.__code__
    function.__globals__[_CALLS] = calls
    function.__code__ = _compiled(function, source.replace(old, new)).__code__
    try:
        yield calls
    finally:
        function.__code__ = original
        del function.__globals__[_CALLS]


def _compiled(function: FunctionType, source: str) -> FunctionType:
    """A function from changed source, which counts its calls."""
    tree = ast.parse(source)
    (definition,) = tree.body
    assert isinstance(definition, ast.FunctionDef)
    definition.decorator_list = []
    definition.body[:0] = ast.parse(f"{_CALLS}.append(None)").body
    ast.fix_missing_locations(tree)
    flags = annotations.compiler_flag  # what is imported for type checkers alone is not there at run time
    made: dict[str, Any] = {}
    code = compile(tree, function.__code__.co_filename, "exec", flags, dont_inherit=True)
    exec(code, dict(function.__globals__), made)  # defines the function; its code is run with the original's globals
    return made[definition.name]  # type: ignore[no-any-return]  # what the source defines
