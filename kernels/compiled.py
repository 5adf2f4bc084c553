"""Compiles a launch for a GPU that need not be there, and reads off the machine code what it uses.

A launch of meta tensors is enough: the compiler specialises it as the launcher would. Needs a Triton that compiles, so
`TRITON_INTERPRET` must not be set.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import triton
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from padst_compile.kernels.triton_support import Launch


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a compiled kernel uses.

    Args:
        registers: of one thread.
        spilled_bytes: registers that had to go to memory, of one thread.
        shared_bytes: shared memory of one program.
        products: how many tensor-core instructions there are, by name ("wgmma", "mma", "tcgen05", "mfma").
        wide_loads: copies of 16 bytes to shared memory, or of whole tiles, that do not wait.
        vector_loads: loads of 16 bytes into registers.
        carried_tiles: tiles of 16-bit numbers that a loop hands from step to step in registers.
    """

    registers: int
    spilled_bytes: int
    shared_bytes: int
    products: dict[str, int]
    wide_loads: int
    vector_loads: int
    carried_tiles: int


TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_PRODUCTS = {"wgmma": "wgmma.mma_async", "mma": "mma.sync", "tcgen05": "tcgen05.mma", "mfma": "v_mfma"}


def compile_launch(launch: Launch, target: str) -> Compiled:
    """Compile `launch` for one of `TARGETS`.

    Raises:
        triton.TritonError: it does not compile.
    """
    compiled = triton.compile(_source(launch, TARGETS[target]), target=TARGETS[target], options=launch.options)
    if "cubin" not in compiled.asm:
        return _from_amdgcn(compiled.asm, compiled.metadata.shared)
    usage, ptx = _resource_usage(compiled.asm["cubin"]), compiled.asm["ptx"]
    return Compiled(
        registers=usage["REG"],
        spilled_bytes=usage["STACK"] + usage["LOCAL"],
        shared_bytes=compiled.metadata.shared,
        products={name: count for name, text in _PRODUCTS.items() if (count := ptx.count(text))},
        wide_loads=len(re.findall(r"cp\.async\.[^;]*, 0x10|cp\.async\.bulk\.tensor", ptx)),
        vector_loads=len(re.findall(r"ld\.global[.\w:]*\.v4\.b32", ptx)),
        carried_tiles=_carried_tiles(compiled.asm["ttgir"]),
    )


def _source(launch: Launch, target: GPUTarget) -> ASTSource:
    """What `triton.compile` takes: types, compile-time values and alignment, found as `JITFunction` finds them."""
    backend = make_backend(target)
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        kind, alignment = ("constexpr", None) if parameter.is_constexpr else _specialised(backend, value)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[parameter.name] = value
        elif isinstance(alignment, str):
            attributes[index,] = backend.parse_attr(alignment)
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)


def _specialised(backend: Any, value: Any) -> tuple[str, Any]:
    """The type of an argument and its alignment."""
    kind, alignment = native_specialize_impl(type(backend), value, False, True, True)
    return kind, alignment


def _resource_usage(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}


def _carried_tiles(ttgir: str) -> int:
    loops = re.findall(r"scf\.for .*-> \((.*)\)", ttgir)
    return sum(len(re.findall(r"tensor<\d+x\d+xb?f16", carried)) for carried in loops)


def _from_amdgcn(asm: Mapping[str, str], shared_bytes: int) -> Compiled:
    assembly = asm["amdgcn"]
    vector_loads = len(re.findall(r"(?:global|buffer)_load_dwordx4", assembly))  # through registers to shared memory, too
    numbers = {key: int(value) for key, value in re.findall(r"\.(vgpr_count|vgpr_spill_count):\s*(\d+)", assembly)}
    return Compiled(
        registers=numbers["vgpr_count"],
        spilled_bytes=4 * numbers["vgpr_spill_count"],
        shared_bytes=shared_bytes,
        products={name: count for name, text in _PRODUCTS.items() if (count := assembly.count(text))},
        wide_loads=vector_loads,
        vector_loads=vector_loads,
        carried_tiles=_carried_tiles(asm["ttgir"]),
    )
