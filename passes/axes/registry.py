"""Which rule speaks for which operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from padst_compile.passes.axes.trace import Rule

_RULES: dict[Any, Rule] = {}


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Register a rule for operators; a packet (`torch.ops.aten.add`) stands for all its overloads."""

    def register(function: Rule) -> Rule:
        for target in targets:
            _RULES[target] = function
        return function

    return register


def rule_for(target: Any) -> Rule | None:
    """The rule of an operator: its own, that of its packet, or that of all pointwise operators."""
    for key in (target, getattr(target, "overloadpacket", None)):
        if key in _RULES:
            return _RULES[key]
    tags = getattr(target, "tags", ())
    if torch.Tag.nondeterministic_seeded in tags:
        return None  # random numbers are drawn by position
    return _RULES.get(torch.Tag.pointwise) if torch.Tag.pointwise in tags else None
