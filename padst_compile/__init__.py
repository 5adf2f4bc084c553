"""Permuted structured-sparse linear layers for PyTorch: sparsify, compile, verify."""

from padst_compile.conversion import densify, sparse_layers, sparsify_report
from padst_compile.deployment import decompose, load_pretrained, save_pretrained
from padst_compile.equivalence import Verification, verify
from padst_compile.explain import Explanation, explain
from padst_compile.foldable import FoldableGroup, foldable_permutations, sparsify
from padst_compile.kernels.formats import register_kernel
from padst_compile.kernels.triton_support import split_tf32
from padst_compile.layers import PermutedSparseLinear
from padst_compile.passes.pipeline import register_pass
from padst_compile.spec import SparsitySpec, load_spec, save_spec
from padst_compile.structures import NM, Block, Diagonal, Unstructured, register_structure
from padst_compile.training import (
    DSTConfig,
    LearnedPermutation,
    PermutationReport,
    Runtime,
    attach,
    finalize,
    load_checkpoint,
    permutation_report,
    presets,
    save_checkpoint,
)

__version__ = "0.1.0"

__all__ = [
    "NM",
    "Block",
    "DSTConfig",
    "Diagonal",
    "Explanation",
    "FoldableGroup",
    "LearnedPermutation",
    "PermutationReport",
    "PermutedSparseLinear",
    "Runtime",
    "SparsitySpec",
    "Unstructured",
    "Verification",
    "attach",
    "decompose",
    "densify",
    "explain",
    "finalize",
    "foldable_permutations",
    "load_checkpoint",
    "load_pretrained",
    "load_spec",
    "permutation_report",
    "presets",
    "register_kernel",
    "register_pass",
    "register_structure",
    "save_checkpoint",
    "save_pretrained",
    "save_spec",
    "sparse_layers",
    "sparsify",
    "sparsify_report",
    "split_tf32",
    "verify",
]
