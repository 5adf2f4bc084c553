"""One layer in another library, in a process of its own: `python foreign_process.py LIBRARY FOLDER`, started by foreign.py.

FOLDER holds weight.npy [out_features, in_features] with its zeros, bias.npy and x.npy [tokens, in_features], float32. The
process writes y.npy and answers in JSON, a line each: first {"version": …} or {"error": …}, then {"seconds": …} to each number
of bytes on its standard input: the time of one call after so many bytes of something else went through the cache. One thread.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Arrays(NamedTuple):
    """The layer and its input."""

    weight: Any
    bias: Any
    x: Any


Run = Callable[[], Any]


def onnxruntime(layer: Arrays, folder: Path) -> Run:
    """Dense, whatever zeros there are."""
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = runtime.InferenceSession(_onnx(layer, folder), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"x": layer.x})[0]


def deepsparse(layer: Arrays, folder: Path) -> Run:
    """Unstructured sparse kernels, generated for the zeros of the weight."""
    engine = importlib.import_module("deepsparse").compile_model(_onnx(layer, folder), batch_size=len(layer.x), num_cores=1)
    return lambda: engine.run([layer.x])[0]


def sparselab(layer: Arrays, _: Path) -> Run:
    """Padded CSR, as its SparseLinear calls it in inference."""
    torch, library = importlib.import_module("torch"), importlib.import_module("sparselab")
    torch.set_num_threads(1)
    weight = library.PaddedCSR.from_dense(torch.from_numpy(layer.weight))
    x, bias = torch.from_numpy(layer.x), torch.from_numpy(layer.bias)
    return lambda: library.spmm(weight, x.t().contiguous()).t() + bias


LIBRARIES: dict[str, Callable[[Arrays, Path], Run]] = {
    "onnxruntime": onnxruntime,
    "deepsparse": deepsparse,
    "sparselab": sparselab,
}


def _onnx(layer: Arrays, folder: Path) -> str:
    """The path of the layer as a model of a single node."""
    onnx = importlib.import_module("onnx")
    make, number = onnx.helper, onnx.TensorProto.FLOAT
    tokens, (out_features, in_features) = len(layer.x), layer.weight.shape
    graph = make.make_graph(
        [make.make_node("Gemm", ["x", "weight", "bias"], ["y"], transB=1)],
        "layer",
        [make.make_tensor_value_info("x", number, [tokens, in_features])],
        [make.make_tensor_value_info("y", number, [tokens, out_features])],
        [onnx.numpy_helper.from_array(getattr(layer, name), name) for name in ("weight", "bias")],
    )
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 13)], ir_version=8)
    path = str(folder / "layer.onnx")
    onnx.save(model, path)
    return path


def main() -> None:
    """Prepare, then time a call for each line."""
    library, folder = sys.argv[1], Path(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries greet on the standard output
    layer = Arrays(*(np.load(folder / f"{name}.npy") for name in Arrays._fields))
    try:
        run = LIBRARIES[library](layer, folder)
        np.save(folder / "y.npy", np.asarray(run()))
    except Exception as error:  # a library may refuse in any way
        answers.write(json.dumps({"error": f"{type(error).__name__}: {error}".splitlines()[0]}) + "\n")
        return
    answers.write(json.dumps({"version": importlib.metadata.version(library)}) + "\n")
    for line in sys.stdin:
        np.ones(int(line), dtype=np.int8).sum()
        began = time.perf_counter()
        run()
        answers.write(json.dumps({"seconds": time.perf_counter() - began}) + "\n")


if __name__ == "__main__":
    main()
