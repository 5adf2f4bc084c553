"""Writes a script that reproduces a failed verification of two graphs."""

from __future__ import annotations

import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph_module import _format_import_block
from torch.package.importer import sys_importer

_SCRIPT = '''\
"""Pass {name} changed what this graph computes: running this raises NotEquivalentError. Written with torch {torch}."""

from pathlib import Path

import torch

import padst_compile as padst
from padst_compile.equivalence.reproduction import attach
{imports}


class Before(torch.nn.Module):
{before}


class After(torch.nn.Module):
{after}


with torch.serialization.safe_globals([{classes}]):
    saved = torch.load(Path(__file__).with_name("tensors.pt"), weights_only=True)
inputs = [
{inputs}
]
before, after = (attach(kind(), saved["attributes"]) for kind in (Before, After))
padst.verify(before, after, *inputs).raise_if_different()
'''
_NATIVE = "\nfrom padst_compile.kernels import native\n\nassert native.load()  # registers the operators of the graph"


def write_reproduction(
    name: str, before: fx.GraphModule, after: fx.GraphModule, inputs: Sequence[Any], folder: Path | None = None
) -> Path:
    """Write `repro.py` and `tensors.pt` into a new folder.

    The script holds both graphs as code, and the shapes and dtypes of floating inputs, whose values do not matter. Integer
    inputs and what the graphs hold themselves lie beside it, in a file that the script reads as data: tensors, and modules of
    the classes that it names.

    Args:
        name: of the pass.
        before: the graph that was right.
        after: the graph that the pass made of it.
        inputs: of both.
        folder: in which the new folder is made; by default the system's for temporary files.

    Returns:
        The path of the script.
    """
    place = Path(tempfile.mkdtemp(prefix=f"padst-{name}-", dir=folder))
    codes = [graph.graph.python_code("self") for graph in (before, after)]
    attributes = {**_attributes(before), **_attributes(after)}
    classes = {f"{kind.__name__}{number}": kind for number, kind in enumerate(_classes(attributes))}
    imports = _imports({key: value for code in codes for key, value in code.globals.items()} | classes)
    if any("padst_native" in code.src for code in codes):
        imports += _NATIVE
    lines = [_input_line(number, value) for number, value in enumerate(inputs)]
    bodies = [textwrap.indent(code.src.strip(), "    ") for code in codes]
    torch.save({"attributes": attributes, "inputs": _integers(inputs)}, place / "tensors.pt")
    script = _SCRIPT.format(
        name=name,
        torch=torch.__version__,
        imports=imports,
        before=bodies[0],
        after=bodies[1],
        classes=", ".join(classes),
        inputs="\n".join(lines),
    )
    (place / "repro.py").write_text(script)
    return place / "repro.py"


def attach(module: nn.Module, saved: dict[str, Any]) -> nn.Module:
    """Give a module what was saved for it, under dotted names."""
    for path, value in saved.items():
        *parents, name = path.split(".")
        owner = module
        for parent in parents:
            if not hasattr(owner, parent):
                setattr(owner, parent, nn.Module())
            owner = getattr(owner, parent)
        if isinstance(value, torch.Tensor):
            owner.register_buffer(name, value)
        else:
            setattr(owner, name, value)
    return module


def _imports(names: dict[str, Any]) -> str:
    """The imports that generated code relies on; annotations that are strings are assigned."""
    objects = {name: value for name, value in names.items() if not isinstance(value, str)}
    strings = [f"{name} = {value!r}" for name, value in names.items() if isinstance(value, str)]
    return "\n".join([_format_import_block(objects, sys_importer), *strings])


def _attributes(module: fx.GraphModule) -> dict[str, Any]:
    """Tensors and modules that a graph names, by dotted name."""
    names = {str(node.target) for node in module.graph.nodes if node.op in ("get_attr", "call_module")}
    return {name: _detached(_attribute(module, name)) for name in sorted(names)}


def _attribute(module: nn.Module, path: str) -> Any:
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _classes(attributes: dict[str, Any]) -> list[type[nn.Module]]:
    """Of all modules in there, each once."""
    modules = [module for value in attributes.values() if isinstance(value, nn.Module) for module in value.modules()]
    return list(dict.fromkeys(type(module) for module in modules))


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value


def _integers(inputs: Sequence[Any]) -> dict[int, torch.Tensor]:
    """The inputs whose values matter, by position."""
    tensors = {number: value for number, value in enumerate(inputs) if isinstance(value, torch.Tensor)}
    return {number: value.detach() for number, value in tensors.items() if not value.is_floating_point()}


def _input_line(number: int, value: Any) -> str:
    """The source of an input."""
    if not isinstance(value, torch.Tensor):
        return f"    {value!r},"
    if value.is_floating_point():
        return f"    torch.zeros({list(value.shape)}, dtype={value.dtype}),"
    return f'    saved["inputs"][{number}],  # {str(value.dtype).removeprefix("torch.")} {list(value.shape)}'
