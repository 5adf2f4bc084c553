"""The name under which a search's result is kept: readable fields, and a file name made from them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from typing import Any

from padst_compile.autotune.environment import Environment
from padst_compile.autotune.problem import LayerProblem, MlpProblem
from padst_compile.kernels.launch import Problem

_NEAR = ("tokens", "epilogue")  # what two problems of one family may differ in
_KINDS = {LayerProblem: "layer", MlpProblem: "mlp", Problem: "launch"}
_SOFTWARE = ("torch", "triton")  # what a shipped result need not share


@dataclasses.dataclass(frozen=True)
class Key:
    """A problem, and where it was solved."""

    problem: LayerProblem | MlpProblem | Problem
    environment: Environment

    def to_dict(self) -> dict[str, Any]:
        """JSON form, in JSON's own types."""
        kind = _KINDS[type(self.problem)]
        fields = {"problem": dataclasses.asdict(self.problem), "environment": dataclasses.asdict(self.environment)}
        return {"kind": kind, **json.loads(json.dumps(fields))}

    @property
    def family(self) -> str:
        """A file name's beginning, shared by problems that differ in their tokens or epilogue alone."""
        problem = self.problem
        name = f"{problem.structure}_{problem.in_features}to{problem.out_features}_{problem.dtype}"
        digest = hashlib.sha256(json.dumps(relatives(self.to_dict()), sort_keys=True).encode()).hexdigest()
        return f"{re.sub('[^A-Za-z0-9_]', '-', name)}_{digest[:16]}"

    @property
    def name(self) -> str:
        """A file name without its ending."""
        epilogue = re.sub("[^A-Za-z0-9_]", "-", self.problem.epilogue)
        return f"{self.family}_t{self.problem.tokens}_{epilogue or 'plain'}"


def relatives(key: dict[str, Any]) -> dict[str, Any]:
    """A key's JSON form without what members of a family may differ in."""
    problem = {name: value for name, value in key["problem"].items() if name not in _NEAR}
    return {**key, "problem": problem}


def anywhere(key: dict[str, Any]) -> dict[str, Any]:
    """A key's JSON form without the versions of software that the kernels do not depend on."""
    environment = {name: value for name, value in key["environment"].items() if name not in _SOFTWARE}
    return {**key, "environment": environment}
