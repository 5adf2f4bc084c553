"""Training of sparse models: dynamic topology, learned permutations, checkpoints."""

from padst_compile.training.attach import attach, finalize
from padst_compile.training.config import DSTConfig, LearnedPermutation
from padst_compile.training.runtime import Runtime

__all__ = ["DSTConfig", "LearnedPermutation", "Runtime", "attach", "finalize"]
