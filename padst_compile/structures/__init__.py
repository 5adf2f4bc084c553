"""Sparsity structures: which weights may be active together, and how the active ones are stored."""

from padst_compile.structures.base import Shape, Structure, Topology
from padst_compile.structures.block import Block
from padst_compile.structures.diagonal import Diagonal
from padst_compile.structures.nm import NM
from padst_compile.structures.registry import STRUCTURES, check_registered, parse, register_structure, structure_from_dict
from padst_compile.structures.unstructured import Unstructured

__all__ = [
    "NM",
    "STRUCTURES",
    "Block",
    "Diagonal",
    "Shape",
    "Structure",
    "Topology",
    "Unstructured",
    "check_registered",
    "parse",
    "register_structure",
    "structure_from_dict",
]
