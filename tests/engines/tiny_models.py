"""Tiny ONNX modules and builders for the tests of `fastface_trt.engines`."""

import json
import os
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from fastface_trt.engines.engine import check_inputs
from fastface_trt.engines.files import describe_file
from fastface_trt.engines.manifest import BuildReport, ModuleSpec, TensorSpec

ELEMENT = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}
WIDTH = 16
OUT = 32


def write_module(folder, name="affine", dtype="float32", external=False, factor=2.0, extra=""):
    """y = x · W + 1 with W = `factor` everywhere, in a model-local function; x is [batch, 16]."""
    folder = Path(folder) / name
    folder.mkdir(parents=True, exist_ok=True)
    weight = np.full((WIDTH, OUT), factor, dtype)
    one = np.ones(OUT, dtype)  # 128 bytes or fewer: external here, inline in the engine
    function = helper.make_function(
        "tiny",
        "Affine",
        ["x", "w", "b"],
        ["y"],
        [helper.make_node("MatMul", ["x", "w"], ["p"]), helper.make_node("Add", ["p", "b"], ["y"])],
        [helper.make_opsetid("", 18)],
    )
    graph = helper.make_graph(
        [helper.make_node("Affine", ["x", "w", "b"], ["y"], domain="tiny")],
        f"{name}{extra}",
        [helper.make_tensor_value_info("x", ELEMENT[dtype], ["batch", WIDTH])],
        [helper.make_tensor_value_info("y", ELEMENT[dtype], ["batch", OUT])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(one, "b")],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("tiny", 1)]
    model = helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=9)
    if external:
        onnx.save(
            model,
            folder / "model.onnx",
            save_as_external_data=True,
            location="model.data",
            size_threshold=0,
        )
    else:
        onnx.save(model, folder / "model.onnx")
    root = folder.parent
    return ModuleSpec(
        name=name,
        inputs=(TensorSpec(name="x", dtype=dtype, shape=("batch", WIDTH)),),
        outputs=(TensorSpec(name="y", dtype=dtype, shape=("batch", OUT)),),
        files=tuple(
            describe_file(root, folder / file)
            for file in ("model.onnx", "model.data")
            if (folder / file).exists()
        ),
    )


def expected(x, factor=2.0):
    return np.repeat(x.sum(axis=1, keepdims=True) * factor + 1, OUT, axis=1)


def tree(folder):
    """Every path below `folder`, but for the lock files, which stay."""
    paths = (path.relative_to(folder).as_posix() for path in Path(folder).rglob("*"))
    return sorted(path for path in paths if path.split("/")[0] != "locks")


class ChunkEngine:
    """Adds what `ChunkBuilder` wrote: a wrong or missing byte changes the result or fails."""

    def __init__(self, spec, folder, files):
        self.spec = spec
        self._content = b"".join((folder / f"part{index}").read_bytes() for index in range(files))

    def __call__(self, **inputs):
        x = check_inputs(self.spec, inputs)["x"]
        return {"y": expected(x) + (self._content != self.content_of(len(self._content)))}

    @staticmethod
    def content_of(length):
        return bytes(index % 251 for index in range(length))

    def close(self):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


class ChunkBuilder:
    """A builder that writes a few files in slow chunks and notes each build in a log file."""

    backend = "chunks"

    def __init__(self, log=None, files=3, chunks=4, pause=0.0, **identity):
        self.log = log
        self.files = files
        self.chunks = chunks
        self.pause = pause
        self.extra = identity

    def identity(self, module):
        return {
            "backend": self.backend,
            "backend_version": "1",
            "options": {"files": self.files},
            "hardware": {"machine": "test"},
        } | self.extra

    def check_runs_here(self):
        pass

    def takes(self, manifest):
        return False

    def build(self, module, source, target, progress):
        if self.log is not None:
            with open(self.log, "a", encoding="utf-8") as log:
                log.write(json.dumps({"pid": os.getpid()}) + "\n")
        content = ChunkEngine.content_of(self.files * self.chunks * 1000)
        parts = [content[i : i + 1000] for i in range(0, len(content), 1000)]
        for index in range(self.files):
            with open(target / f"part{index}", "wb", buffering=0) as file:
                for part in parts[index * self.chunks : (index + 1) * self.chunks]:
                    self.write(file, part)
                    time.sleep(self.pause)
        return BuildReport()

    def write(self, file, part):
        file.write(part)

    def open(self, manifest, folder):
        return ChunkEngine(manifest.module, folder, self.files)

    def builds(self):
        return len(self.log.read_text(encoding="utf-8").splitlines()) if self.log.exists() else 0
