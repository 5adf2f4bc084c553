"""Cases of a benchmark, measured one after the other: each result is kept at once, and no case begins after a deadline.

What was left is measured when the same command runs again on the same machine, with the same versions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from padst_compile.benchmarking.report import write_json

CaseT = TypeVar("CaseT")


@dataclasses.dataclass(frozen=True)
class Record:
    """The file of one benchmark.

    Args:
        path: where it is written after each case; None for nowhere.
        head: what it says besides its cases, "machine" among it; results of another machine are not continued.
    """

    path: Path | None
    head: dict[str, Any]

    def kept(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Results, and cases that failed, of an unfinished run on this machine."""
        if self.path is None or not self.path.exists():
            return [], []
        data = json.loads(self.path.read_text())
        same = data.get("machine") == json.loads(json.dumps(self.head["machine"]))
        return (data["cases"], data.get("failed", [])) if same and data.get("left", 0) else ([], [])

    def write(self, results: Sequence[dict[str, Any]], failed: Sequence[dict[str, Any]], left: int) -> None:
        """Replace the file, atomically; a finished one names no cases that are left."""
        if self.path is not None:
            data = {**self.head, "cases": results}
            data |= ({"failed": failed} if failed else {}) | ({"left": left} if left else {})
            write_json(data, self.path)


def measure_cases(
    cases: Sequence[CaseT],
    measure: Callable[[CaseT], dict[str, Any]],
    record: Record,
    *,
    seconds: float | None = None,
    clock: Callable[[], float] = time.monotonic,
    say: Callable[[str], object] = print,
) -> list[dict[str, Any]]:
    """Measure what is not measured yet, in the order of the cases; SIGTERM and Ctrl-C end it like the deadline.

    Args:
        cases: dataclasses, the most important first.
        measure: gives the fields of a case and what was measured, as JSON; what it raises is kept as the case's failure.
        record: where results are kept.
        seconds: no case begins later than this; None for no limit.
        clock: seconds that pass.
        say: takes lines for the user.

    Returns:
        All results that there are now, those of earlier runs first.
    """
    results, failed = record.kept()
    begun = clock()
    known = [*results, *failed]
    waiting = [case for case in cases if not any(_fields(case).items() <= result.items() for result in known)]
    if known:
        say(f"{len(known)} cases are measured already")
    with contextlib.suppress(KeyboardInterrupt), _stopped_by_termination():
        while waiting and (seconds is None or clock() - begun < seconds):
            say(f"measuring {waiting[0]}")
            try:
                results.append(measure(waiting[0]))
            except Exception as error:  # a model or peer may fail in any way, and the others shall be measured
                failed.append({**_fields(waiting[0]), "reason": (str(error) or type(error).__name__).splitlines()[0][:200]})
                say(f"failed: {failed[-1]['reason']}")
            waiting.pop(0)
            record.write(results, failed, len(waiting))
    if waiting:
        say(f"{len(waiting)} cases are left; the same command goes on")
    return results


def _fields(case: Any) -> dict[str, Any]:
    fields: dict[str, Any] = dataclasses.asdict(case)
    return fields


@contextlib.contextmanager
def _stopped_by_termination() -> Iterator[None]:
    """Within this, SIGTERM raises KeyboardInterrupt, so that what is measured can be printed; in the main thread alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
