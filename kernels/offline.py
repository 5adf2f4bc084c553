"""Compiles the kernels for GPUs that are not there: `python -m padst_compile.kernels.offline`, or `make kernels-offline`.

Every tile that a tuner may choose must compile without spilled registers, within the chip's shared memory, to the
tensor-core instructions, the wide copies and loads, and the depth of pipeline that its kernel claims. What it uses is printed;
for the default tiles it is compared with a recorded file, one part for each version of Triton, so that a change of kernels or
of the compiler shows. With a version that is not recorded nothing is compared, which is said; the claims are checked all the
same.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import importlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import triton
from rich.console import Console
from rich.table import Table

from padst_compile.files import replace_text
from padst_compile.kernels import triton_limits
from padst_compile.kernels.compiled import Compiled, compile_launch
from padst_compile.kernels.offline_case import DEVICES, Case, Target

# What was recorded of one architecture: problem -> default tile, and what it uses.
Golden: TypeAlias = dict[str, str]

# Modules with a function `offline_cases(target)`.
MODULES = tuple(f"padst_compile.kernels.{kind}.offline_cases" for kind in ("block", "nm", "diagonal"))


@dataclasses.dataclass(frozen=True)
class Finding:
    """What one case compiled to.

    Args:
        case: what was compiled.
        compiled: what it uses, or None where it did not compile.
        faults: sentences about what must not be.
    """

    case: Case
    compiled: Compiled | None
    faults: tuple[str, ...]

    @property
    def record(self) -> str:
        """What is kept in the recorded file."""
        if self.compiled is None:
            return "does not compile"
        return f"{self.compiled.registers} registers, {self.compiled.shared_bytes} bytes, depth {self.depth}, {self.products}"

    @property
    def products(self) -> str:
        """The instructions that multiply."""
        return "+".join(sorted(self.compiled.products)) or "fma" if self.compiled else ""

    @property
    def depth(self) -> int:
        """Steps of the loop that shared memory holds at once."""
        return self.compiled.shared_bytes // self.case.step_bytes if self.compiled and self.case.step_bytes else 0


def all_cases(target: Target) -> Iterator[Case]:
    """The cases of every module, each once."""
    names = set()
    for module in MODULES:
        for case in importlib.import_module(module).offline_cases(target):
            if (case.subject, case.form) not in names:
                names.add((case.subject, case.form))
                yield case


def examine(case: Case, target: Target) -> Finding:
    """Compile a case and list its faults."""
    try:
        compiled = compile_launch(case.launch, target)
    except Exception as error:  # whatever a compiler raises is a finding about the kernel
        return Finding(case, None, (f"does not compile: {str(error).splitlines()[0]}",))
    limit = triton_limits.limits_of(case.problem.device).shared_bytes
    faults = []
    if compiled.spilled_bytes:
        faults.append(f"{compiled.spilled_bytes} bytes of registers spill")
    if compiled.shared_bytes > limit:
        faults.append(f"{compiled.shared_bytes} bytes of shared memory, {limit} are there")
    if case.product is not None and case.product not in compiled.products:
        faults.append(f"no {case.product}, but {'+'.join(compiled.products) or 'none'}")
    if case.wide_loads and not compiled.wide_loads:
        faults.append("no wide copies")
    if case.vector_loads and not compiled.vector_loads:
        faults.append("no loads of 16 bytes")
    if case.carried and not compiled.carried_tiles:
        faults.append("no tile of the next step in registers")
    finding = Finding(case, compiled, ())
    if finding.depth < case.depth:
        faults.append(f"a pipeline of depth {finding.depth}, not {case.depth}")
    return dataclasses.replace(finding, faults=tuple(faults))


def recorded(findings: Sequence[Finding]) -> Golden:
    """What is kept of the findings of default tiles."""
    return {finding.case.subject: f"{finding.case.form}: {finding.record}" for finding in findings}


def differences(findings: Sequence[Finding], golden: Golden, whole: bool) -> list[str]:
    """How what was found of default tiles differs from what was recorded; `whole` if all of them were compiled."""
    found = recorded(findings)
    changed = [f"{name} | {golden[name]} -> {found[name]}" for name in found if golden.get(name, found[name]) != found[name]]
    new = [f"{name}: not recorded" for name in found if name not in golden]
    gone = [f"{name}: recorded, but no case" for name in golden if name not in found] if whole else []
    return changed + new + gone


def table(target: Target, findings: Sequence[Finding]) -> Table:
    """What was found, one line for each case."""
    result = Table(title=f"{target}, triton {triton.__version__}")
    for column in ("case", "registers", "shared KiB", "depth", "products", "faults"):
        result.add_column(column, overflow="fold", justify="left" if column in ("case", "products", "faults") else "right")
    for finding in findings:
        compiled, name = finding.compiled, f"{finding.case.subject} | {finding.case.form}"
        cells = (compiled.registers, f"{compiled.shared_bytes / 1024:.0f}", finding.depth) if compiled else ("", "", "")
        result.add_row(name, *map(str, cells), finding.products, "; ".join(finding.faults))
    return result


def check(target: Target, cases: Sequence[Case], workers: int) -> list[Finding]:
    """Compile all cases, in their order."""
    if workers == 1:
        return [examine(case, target) for case in cases]
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:  # the compiler lets go of Python's lock
        return list(pool.map(examine, cases, [target] * len(cases)))


def version() -> str:
    """The version of Triton, as the recorded file names it: without the patch level."""
    return ".".join(triton.__version__.split(".")[:2])


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, print and compare; 1 where something is wrong."""
    options = _options(arguments)
    console = Console(width=None if sys.stdout.isatty() else 200)
    golden = json.loads(options.golden.read_text()) if options.golden.exists() else {}
    compared = options.record or version() in golden
    section = golden.setdefault(version(), {})
    wrong = 0
    for target in options.target:
        cases = [case for case in all_cases(target) if all(word in case.subject for word in options.only)]
        defaults = {case.subject: case for case in reversed(cases)}  # each problem's first
        number, parts = options.part
        chosen = list(defaults.values())[::-1] if options.first else cases[number - 1 :: parts]
        whole = not options.only and parts == 1
        findings = check(target, chosen, options.workers)
        of_defaults = [finding for finding in findings if defaults[finding.case.subject] is finding.case]
        if options.record:
            section[target] = {**({} if whole else section.get(target, {})), **recorded(of_defaults)}
        changes = differences(of_defaults, section.get(target, {}), whole) if compared else []
        wrong += _report(console, target, findings, changes)
    if not compared:
        console.print(_not_recorded(golden), markup=False, highlight=False, soft_wrap=True)
    if options.record:
        replace_text(options.golden, json.dumps(golden, indent=0, sort_keys=True) + "\n")
    return int(wrong > 0)


def _not_recorded(golden: Mapping[str, object]) -> str:
    known = ", ".join(sorted(golden.keys() - {version()})) or "nothing"
    return f"Triton {version()} is not recorded, but {known}: faults were looked for, nothing was compared; --record adds it"


def _report(console: Console, target: Target, findings: Sequence[Finding], changes: Sequence[str]) -> int:
    """Print everything about one architecture; how much of it is wrong."""
    console.print(table(target, findings))
    faults = [f"{finding.case.subject} | {finding.case.form}: {fault}" for finding in findings for fault in finding.faults]
    for line in (*(f"FAULT {fault}" for fault in faults), *(f"CHANGED {change}" for change in changes)):
        console.print(f"{target}: {line}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"{target}: {len(findings)} kernels, {len(faults)} faults, {len(changes)} changes")
    return len(faults) + len(changes)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compile all kernels for GPUs that are not there, and check what they use.")
    parser.add_argument("--target", action="append", choices=list(DEVICES), help="architectures (default: all)")
    parser.add_argument("--only", action="append", default=[], help="problems whose description has this in it")
    parser.add_argument("--first", action="store_true", help="the default tile of each problem alone")
    parser.add_argument("--part", type=_part, default=(1, 1), metavar="I/N", help="of N parts of the cases, the I-th")
    parser.add_argument("--golden", type=Path, required=True, help="the recorded file to compare with")
    parser.add_argument("--record", action="store_true", help="write what was compiled into that file")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="threads")
    options = parser.parse_args(arguments)
    options.target = options.target or list(DEVICES)
    return options


def _part(text: str) -> tuple[int, int]:
    number, parts = (int(word) for word in text.split("/"))
    if not 1 <= number <= parts:
        raise ValueError(text)
    return number, parts


if __name__ == "__main__":
    sys.exit(main())
