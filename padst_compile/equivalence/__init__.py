"""Proof by execution that two modules compute the same function. It shares no code with the passes that it judges."""

from padst_compile.equivalence.comparison import Difference
from padst_compile.equivalence.pass_check import PassCheck
from padst_compile.equivalence.verification import Verification, verify

__all__ = ["Difference", "PassCheck", "Verification", "verify"]
