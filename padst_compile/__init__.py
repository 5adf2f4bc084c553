"""Permuted structured-sparse linear layers for PyTorch: sparsify, compile, verify."""

from padst_compile.conversion import densify, sparse_layers, sparsify, sparsify_report
from padst_compile.explain import Explanation, explain
from padst_compile.layers import PermutedSparseLinear
from padst_compile.spec import SparsitySpec, load_spec, save_spec
from padst_compile.structures import NM, Block, Diagonal, Unstructured

__version__ = "0.1.0"

__all__ = [
    "NM",
    "Block",
    "Diagonal",
    "Explanation",
    "PermutedSparseLinear",
    "SparsitySpec",
    "Unstructured",
    "densify",
    "explain",
    "load_spec",
    "save_spec",
    "sparse_layers",
    "sparsify",
    "sparsify_report",
]
