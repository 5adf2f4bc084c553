"""Benchmarks that keep what they have measured, and go on."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

from progress import Record, measure_cases  # type: ignore[import-not-found]  # noqa: E402  # beside the scripts

sys.path.remove(str(BENCHMARKS))  # or transformers would take kernels.py for Hugging Face's package


@dataclasses.dataclass(frozen=True)
class Case:
    """Something to measure."""

    name: str


CASES = [Case("a"), Case("b"), Case("c")]
HEAD = {"schema": 1, "machine": {"gpu": "one"}}


class Measuring:
    """Takes ten seconds of a clock of its own for each case."""

    def __init__(self) -> None:
        self.now, self.measured = 0.0, list[str]()

    def __call__(self, case: Case) -> dict[str, Any]:
        self.now += 10
        self.measured.append(case.name)
        return {**dataclasses.asdict(case), "milliseconds": self.now}

    def run(self, path: Path | None, head: dict[str, Any] = HEAD, seconds: float | None = None) -> list[str]:
        """The names of all results."""
        options: dict[str, Any] = {"seconds": seconds, "clock": lambda: self.now, "say": lambda line: None}
        return [result["name"] for result in measure_cases(CASES, self, Record(path, head), **options)]


def test_no_case_begins_after_the_deadline_and_the_next_run_goes_on(tmp_path: Path) -> None:
    path, measuring = tmp_path / "results.json", Measuring()
    assert measuring.run(path, seconds=15) == ["a", "b"]
    assert json.loads(path.read_text())["left"] == 1
    assert measuring.run(path, seconds=15) == ["a", "b", "c"]
    assert measuring.measured == ["a", "b", "c"]
    data = json.loads(path.read_text())
    assert data.keys() == {*HEAD, "cases"} and [case["milliseconds"] for case in data["cases"]] == [10, 20, 30]


def test_a_finished_run_and_one_on_another_machine_are_not_continued(tmp_path: Path) -> None:
    path, measuring = tmp_path / "results.json", Measuring()
    measuring.run(path)
    assert measuring.run(path, seconds=5) == ["a"]
    other = {**HEAD, "machine": {"gpu": "two"}}
    assert measuring.run(path, other, seconds=5) == ["a"]
    assert json.loads(path.read_text())["machine"] == {"gpu": "two"}
    assert measuring.measured == ["a", "b", "c", "a", "a"]


def test_nothing_is_written_without_a_path() -> None:
    assert Measuring().run(None) == ["a", "b", "c"]


def test_results_are_on_disk_before_the_next_case_begins(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    seen = []

    def measure(case: Case) -> dict[str, Any]:
        seen.append(len(json.loads(path.read_text())["cases"]) if path.exists() else 0)
        return dataclasses.asdict(case)

    measure_cases(CASES, measure, Record(path, HEAD), say=lambda line: None)
    assert seen == [0, 1, 2]


def test_a_case_that_fails_is_named_and_not_tried_again_and_the_others_are_measured(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    measuring = Measuring()

    def measure(case: Case) -> dict[str, Any]:
        result = measuring(case)
        if case.name == "a":
            raise MemoryError("no room\nfor that")
        return result

    record, lines = Record(path, HEAD), list[str]()
    first = measure_cases(CASES, measure, record, seconds=15, clock=lambda: measuring.now, say=lines.append)
    assert [result["name"] for result in first] == ["b"] and "failed: no room" in lines
    measure_cases(CASES, measure, record, say=lines.append)
    assert measuring.measured == ["a", "b", "c"]
    assert json.loads(path.read_text())["failed"] == [{"name": "a", "reason": "no room"}]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_is_measured_is_returned_when_the_process_is_told_to_end(number: int, tmp_path: Path) -> None:
    def measure(case: Case) -> dict[str, Any]:
        if case.name == "b":
            os.kill(os.getpid(), number)
        return dataclasses.asdict(case)

    lines: list[str] = []
    before = signal.getsignal(signal.SIGTERM)
    results = measure_cases(CASES, measure, Record(tmp_path / "results.json", HEAD), say=lines.append)
    assert [result["name"] for result in results] == ["a"]
    assert lines[-1] == "2 cases are left; the same command goes on"
    assert signal.getsignal(signal.SIGTERM) == before
