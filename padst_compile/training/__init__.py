"""Training of sparse models: dynamic topology, learned permutations, checkpoints."""

from padst_compile.training import presets
from padst_compile.training.attach import attach, finalize
from padst_compile.training.checkpoint import load_checkpoint, save_checkpoint
from padst_compile.training.config import DSTConfig, LearnedPermutation
from padst_compile.training.permutation_report import LayerPermutation, PermutationReport, permutation_report
from padst_compile.training.runtime import Runtime

__all__ = [
    "DSTConfig",
    "LayerPermutation",
    "LearnedPermutation",
    "PermutationReport",
    "Runtime",
    "attach",
    "finalize",
    "load_checkpoint",
    "permutation_report",
    "presets",
    "save_checkpoint",
]
